"""Trained weights besides adapters (new tokens, LyCORIS' norms and biases), and the formats that can hold them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from dora_mm.formats.naming.spellings import Names, Spelling
from dora_mm.formats.reader import LayerReader
from dora_mm.formats.tokens import EMBEDDINGS, keys_by_word
from dora_mm.formats.tools.tool import Export


def leave_out(layers: LayerReader, to: str, export: Export | None, *, allow_lossy: bool) -> tuple[str, ...]:
    """Leaves out of a conversion the extras that its target cannot hold.

    Args:
        layers: The adapters to convert; norms that the target cannot hold are removed from them.
        to: The target.
        export: Its form; None for a merged model, which can hold norms, but no biases and no new tokens.
        allow_lossy: Whether anything may be left out.

    Returns:
        The names in the file of what is left out.

    Raises:
        ValueError: Something would be, and `allow_lossy` is not set; or nothing would be, and the target is merged.
    """
    found = layers.extras()
    norms = found.norms if export else ()
    lost = () if export and export.holds.extras else (*norms, *found.biases)
    tokens = unsupported_tokens(found.embeddings, export)
    form = "comfy" if to == "comfy" else "kohya"  # whose magnitudes ComfyUI reads
    ways = f"use --to {form} or --to diff, or --allow-lossy, which leaves them out"
    if (without := (*lost, *tokens)) and not allow_lossy:
        raise ValueError(f"{layers.path} also holds {named(without)}, for which --to {to} has no place: {ways}")
    if allow_lossy and not without and export is None:
        raise ValueError(f"--allow-lossy has no effect on --to {to}: leave it out")
    if lost and norms:
        layers.leave_out(norms)
    return without


def unsupported_tokens(keys: Iterable[str], export: Export | None) -> tuple[str, ...]:
    """The keys of embeddings of new tokens that a form cannot hold; None: a merged model, which holds none."""
    if export is None or not export.holds.tokens:
        return tuple(keys)
    bundled = {key for found in keys_by_word(keys).values() for key in found.values()}  # others only have one inside
    return () if export.holds.tokens == "inside" else tuple(key for key in keys if key not in bundled)


def named(keys: tuple[str, ...]) -> str:
    """How many norms, biases and embeddings of new tokens there are, and the first one of each."""
    kinds = {"embeddings of new tokens": [key for key in keys if EMBEDDINGS.match(key)]}
    kinds = {"differences of norms and biases": [key for key in keys if not EMBEDDINGS.match(key)], **kinds}
    return " and ".join(f"{len(found)} {kind}, such as {found[0]}" for kind, found in kinds.items() if found)


def bias_tensors(
    layers: LayerReader, spelling: Spelling, strength: float, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The differences of biases in another file, by key.

    Raises:
        ValueError: A bias belongs to a module whose rows the file stacks with those of others.
    """
    names = Names(layers.weights or ())
    for own, bias in layers.extras().biases.items():
        ((key, group),) = names.write([bias.name], spelling).items()
        if not group.is_stored_so:
            raise ValueError(f"{layers.path}: {own} is of a module that is stacked with others: use --allow-lossy")
        yield f"{key}.{'b_norm' if bias.of_norm else 'diff_b'}", (strength * bias.change).to(dtype)
