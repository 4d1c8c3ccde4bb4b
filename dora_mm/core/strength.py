"""The strength of an adapter: one number, or several by part and block of the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches

from dora_mm.core.spec import finite_number

Strength = float | Mapping[str, float]


def strengths_of(
    strength: Strength, paths: Collection[str], short: Mapping[str, str] | None = None
) -> dict[str, float]:
    """The strength of each adapted module.

    Args:
        strength: A number for all, or numbers by the first pieces of paths, such as {"unet.down_blocks": 0.5,
            "text_encoder": 1}. Of several that fit a path the longest counts, and 1 where none does; "" fits all paths.
        paths: The paths of the modules.
        short: Pieces of paths by the short names that may stand for them, where some path has the piece.

    Raises:
        ValueError: A strength is not a finite number, or no path begins with its name.
    """
    if not isinstance(strength, Mapping):
        return dict.fromkeys(paths, finite_number("strength", strength))

    present = {piece for path in paths for piece in path.split(".")}
    long = {name: piece for name, piece in (short or {}).items() if piece in present}

    def pieces(path: str) -> tuple[str, ...]:
        return tuple(long.get(piece, piece) for piece in path.split(".")) if path else ()

    strengths = {pieces(name): finite_number(f"the strength of {name}", value) for name, value in strength.items()}
    if len(strengths) < len(strength):
        raise ValueError(f"strength has two names for one place: {', '.join(strength)}")
    prefixes = {path: [pieces(path)[:length] for length in range(len(pieces(path)), -1, -1)] for path in paths}
    known = {prefix for found in prefixes.values() for prefix in found}
    for name in strength:
        if pieces(name) not in known:
            near = get_close_matches(name, sorted({".".join(prefix) for prefix in known if prefix}), n=3, cutoff=0.0)
            raise ValueError(f"strength: no adapted module is in {name!r}, the nearest names are {', '.join(near)}")
    return {path: next((strengths[p] for p in found if p in strengths), 1.0) for path, found in prefixes.items()}
