"""Fused projections: adapters of q, k and v as one adapter of their stacked weight, and back, exactly.

W = [W_q; W_k; W_v] has A = [A_q; A_k; A_v] and a block-diagonal B, so its rank and alpha are sums. A magnitude on the
output axis has an entry per row, and is stacked like the rows; one on the input axis cannot be fused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dora_mm.core.spec import DoRASpec
from dora_mm.formats.naming.names import ModuleGroup
from dora_mm.formats.state import LayerState


def split(group: ModuleGroup, fused: LayerState) -> list[LayerState]:
    """The adapters of the modules of a group, from that of the weight in a file, in the order of `group.names`.

    Also for a group of one module, whose rows may be reordered. Where B is block-diagonal, each part gets its own
    rank back, else A is shared.

    Raises:
        ValueError: The rows cannot be divided among the modules, or it is no adapter whose rows can.
    """
    if group.is_stored_so:
        return [fused]
    if fused.axis == "in":
        raise ValueError("its magnitude scales the input columns of a fused projection, which cannot be divided")
    for name in ("diff", "weight"):
        if name in fused.tensors and len(fused.tensors) > 1:
            raise ValueError("it is a fused projection of a method without a low rank, which is not supported")
        if name in fused.tensors:
            return [replace(fused, tensors={name: part}) for part in split_rows(group, fused.tensors[name])]
    if "lora_A" not in fused.tensors:
        raise ValueError("it is a fused projection without A and B, which is not supported")
    A, magnitude = fused.tensors["lora_A"], fused.tensors.get("magnitude")
    blocks = split_rows(group, fused.tensors["lora_B"], A.shape[1])
    magnitudes = [None] * len(blocks) if magnitude is None else split_rows(group, magnitude, A.shape[1])
    used = torch.stack([block.bool().any(dim=0) for block in blocks])  # (parts, R): the columns that are not zero
    if len(blocks) == 1 or not (bool((used.sum(dim=0) == 1).all()) and bool(used.any(dim=1).all())):
        used = torch.ones_like(used)
    return [
        _part(fused, A[columns], block[:, columns], magnitude)
        for columns, block, magnitude in zip(used, blocks, magnitudes, strict=True)
    ]


def fuse(group: ModuleGroup, parts: Sequence[LayerState]) -> LayerState:
    """The adapter of the weight in a file, from those of the modules of a group: the inverse of `split`.

    Args:
        group: The modules.
        parts: The adapter of each, with A and B, and norm `updated`.

    Raises:
        ValueError: Only some of the parts have a magnitude (give the others that of W0), or they have different numbers
            of columns.
    """
    As, Bs = ([part.tensors[name] for part in parts] for name in ("lora_A", "lora_B"))
    in_features = As[0].shape[1]
    if any(A.shape[1] != in_features for A in As):
        raise ValueError(f"the parts of {group.names[0]} and the projections fused with it have different widths")
    magnitudes = [part.tensors["magnitude"] for part in parts if "magnitude" in part.tensors]
    if len(magnitudes) not in (0, len(parts)):
        raise ValueError(f"of {group.names[0]} and the projections fused with it, only some have a magnitude")
    magnitude = stack_rows(group, magnitudes, in_features) if magnitudes else None
    scalings = [part.spec.scaling for part in parts]
    scaling = max(scalings)
    if all(s == scaling and torch.equal(A, As[0]) for s, A in zip(scalings, As, strict=True)):
        return _part(parts[0], As[0], stack_rows(group, Bs, in_features), magnitude)
    B = torch.block_diag(*(B if s == scaling else B * (s / scaling) for s, B in zip(scalings, Bs, strict=True)))
    return _part(parts[scalings.index(scaling)], torch.cat(As), B, magnitude)


def _part(like: LayerState, A: Tensor, B: Tensor, magnitude: Tensor | None) -> LayerState:
    """The adapter of these tensors with the scaling of another one."""
    tensors = {"lora_A": A, "lora_B": B} | ({} if magnitude is None else {"magnitude": magnitude})
    rank = A.shape[0]
    alpha = like.spec.alpha if rank == like.spec.rank else like.spec.scaling * rank
    spec = DoRASpec(rank, alpha, method="lora" if magnitude is None else "dora")
    return replace(like, spec=spec, tensors=tensors)


def untouched(out_features: int, in_features: int, magnitude: Tensor | None = None) -> LayerState:
    """An adapter of rank 1 that changes nothing, for a part of a fused projection that is not adapted.

    Args:
        out_features: The rows of the weight.
        in_features: Its columns.
        magnitude: The row norms of W0 (O,), where the other parts are DoRA.
    """
    one = LayerState(DoRASpec(1, 1.0), {})
    return _part(one, torch.zeros(1, in_features), torch.zeros(out_features, 1), magnitude)


def split_rows(group: ModuleGroup, tensor: Tensor, in_features: int | None = None) -> list[Tensor]:
    """A weight (O, I) in a file as the weights of the modules of a group, views where their rows stay in place.

    Args:
        group: The modules.
        tensor: The weight, or another tensor with its rows.
        in_features: I, where it is another tensor.

    Raises:
        ValueError: The rows cannot be divided among the modules.
    """
    pieces = group.pieces(tensor.shape[0], tensor.shape[1] if in_features is None else in_features)
    return [
        torch.cat([tensor[start:stop] for start, stop in ranges]) if len(ranges) > 1 else tensor[slice(*ranges[0])]
        for ranges in pieces
    ]


def stack_rows(group: ModuleGroup, tensors: Sequence[Tensor], in_features: int | None = None) -> Tensor:
    """The weight (O, I) in a file from those of the modules of a group: the inverse of `split_rows`."""
    stacked = torch.cat(list(tensors))
    pieces = group.pieces(stacked.shape[0], stacked.shape[1] if in_features is None else in_features)
    order = torch.cat([torch.arange(*part) for ranges in pieces for part in ranges])
    return stacked[order.argsort()]
