"""Variants of the weights of a network, such as fp16: how diffusers and transformers name their files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

WEIGHTS = re.compile(r"[\w-]+?(?:\.(\w+))?(?:-\d{5}-of-\d{5})?(?:\.(\w+))?\.safetensors(?:\.index(?:\.(\w+))?\.json)?")
HALF = ("fp16", "bf16")  # the usual names of those in half precision


def variant_of(name: str) -> str | None:
    """The variant of a file of weights, or of an index of such; empty: it has no name; None: it is another file."""
    found = WEIGHTS.fullmatch(name)
    return next(filter(None, found.groups()), "") if found else None


def variants_in(names: Iterable[str]) -> set[str]:
    """The variants that files of one network are of."""
    return {found for found in map(variant_of, names) if found is not None}


def choose_variant(networks: Iterable[Iterable[str]], *, half: bool = False) -> str:
    """The variant with which all networks have weights, each this one or, where it lacks that, the one without a name.

    Args:
        networks: The names of the files of each network; those without weights do not count.
        half: One of half precision is preferred, which is half of a download; else the one without a name.

    Returns:
        Its name; empty: the one without a name.

    Raises:
        ValueError: None serves all.
    """
    found = [variants for variants in map(variants_in, networks) if variants]
    known: Sequence[str] = sorted(set().union(*found) - {"", *HALF}) if found else []
    order = [*HALF, "", *known] if half else ["", *HALF, *known]
    chosen = next((variant for variant in order if _serves(variant, found)), None)
    if chosen is None:
        listed = ", ".join(sorted(set().union(*found) - {""}))
        raise ValueError(f"its networks have weights of different variants ({listed}), and none serves all")
    return chosen


def _serves(variant: str, networks: Sequence[set[str]]) -> bool:
    has_it = not variant or any(variant in found for found in networks)
    return has_it and all({variant, ""} & found for found in networks)


def of_variant(names: Iterable[str], variant: str) -> list[str]:
    """The files of a network without the weights of other variants than this, or than the one without a name."""
    names = list(names)
    found = variants_in(names)
    wanted = variant if variant in found or "" not in found else ""
    return [name for name in names if variant_of(name) in (None, wanted)]


def with_variant(name: str, variant: str) -> str:
    """The name of a file of weights, or of their index, for a variant."""
    start, _, end = name.rpartition(".")
    return f"{start}.{variant}.{end}" if variant else name
