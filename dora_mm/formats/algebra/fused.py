"""Fused projections: adapters of q, k and v as one adapter of their stacked weight, and back, exactly.

W = [W_q; W_k; W_v] has A = [A_q; A_k; A_v] and a block-diagonal B, so its rank and alpha are sums. A magnitude on the
output axis has an entry per row, and is stacked like the rows; one on the input axis cannot be fused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dora_mm.formats.naming.names import ModuleGroup


class Factors(NamedTuple):
    """The adapter of one weight (O, I): A (R, I), B (O, R), alpha, and the magnitude (O,) if it is DoRA."""

    A: Tensor
    B: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def scaling(self) -> float:
        """The factor of B A: alpha / rank."""
        return self.alpha / self.A.shape[0]


def split(group: ModuleGroup, fused: Factors) -> list[Factors]:
    """The adapters of the modules of a group, from that of the weight in a file, in the order of `group.names`.

    Also for a group of one module, whose rows may change places. Where B is block-diagonal, each part gets its own
    rank back, else A is shared.

    Raises:
        ValueError: The rows cannot be divided among the modules.
    """
    blocks = _split_rows(group, fused.B, fused.A.shape[1])
    magnitudes = (
        [None] * len(blocks) if fused.magnitude is None else _split_rows(group, fused.magnitude, fused.A.shape[1])
    )
    used = torch.stack([block.bool().any(dim=0) for block in blocks])  # (parts, R): the columns that are not zero
    if len(blocks) > 1 and bool((used.sum(dim=0) == 1).all()) and bool(used.any(dim=1).all()):
        ranks = [int(columns.sum()) for columns in used]
        return [
            Factors(fused.A[columns], block[:, columns], fused.scaling * rank, magnitude)
            for columns, block, rank, magnitude in zip(used, blocks, ranks, magnitudes, strict=True)
        ]
    return [
        Factors(fused.A, block, fused.alpha, magnitude) for block, magnitude in zip(blocks, magnitudes, strict=True)
    ]


def fuse(group: ModuleGroup, parts: Sequence[Factors]) -> Factors:
    """The adapter of the weight in a file, from those of the modules of a group: the inverse of `split`.

    Raises:
        ValueError: Only some of the parts have a magnitude (give the others that of W0), or they have different numbers
            of columns.
    """
    in_features = parts[0].A.shape[1]
    if any(part.A.shape[1] != in_features for part in parts):
        raise ValueError(f"the parts of {group.names[0]} and the projections fused with it have different widths")
    magnitudes = [part.magnitude for part in parts if part.magnitude is not None]
    if len(magnitudes) not in (0, len(parts)):
        raise ValueError(f"of {group.names[0]} and the projections fused with it, only some have a magnitude")
    magnitude = _stack_rows(group, magnitudes, in_features) if magnitudes else None
    first = parts[0]
    if all(part.scaling == first.scaling and torch.equal(part.A, first.A) for part in parts):
        return Factors(first.A, _stack_rows(group, [p.B for p in parts], in_features), first.alpha, magnitude)
    scaling = max(part.scaling for part in parts)
    rank = sum(part.A.shape[0] for part in parts)
    B = torch.block_diag(*(p.B if p.scaling == scaling else p.B * (p.scaling / scaling) for p in parts))
    return Factors(torch.cat([part.A for part in parts]), B, scaling * rank, magnitude)


def untouched(out_features: int, in_features: int, magnitude: Tensor | None = None) -> Factors:
    """An adapter of rank 1 that changes nothing, for a part of a fused projection that is not adapted.

    Args:
        out_features: The rows of the weight.
        in_features: Its columns.
        magnitude: The row norms of W0 (O,), where the other parts are DoRA.
    """
    return Factors(torch.zeros(1, in_features), torch.zeros(out_features, 1), 1.0, magnitude)


def split_rows(group: ModuleGroup, weight: Tensor) -> list[Tensor]:
    """A weight (O, I) in a file as the weights of the modules of a group, views where their rows stay in place.

    Raises:
        ValueError: The rows cannot be divided among the modules.
    """
    return _split_rows(group, weight, weight.shape[1])


def stack_rows(group: ModuleGroup, weights: Sequence[Tensor]) -> Tensor:
    """The weight (O, I) in a file from those of the modules of a group: the inverse of `split_rows`."""
    return _stack_rows(group, weights, weights[0].shape[1])


def _split_rows(group: ModuleGroup, tensor: Tensor, in_features: int) -> list[Tensor]:
    pieces = group.pieces(tensor.shape[0], in_features)
    return [
        torch.cat([tensor[start:stop] for start, stop in ranges]) if len(ranges) > 1 else tensor[slice(*ranges[0])]
        for ranges in pieces
    ]


def _stack_rows(group: ModuleGroup, tensors: Sequence[Tensor], in_features: int) -> Tensor:
    stacked = torch.cat(list(tensors))
    pieces = group.pieces(stacked.shape[0], in_features)
    order = torch.cat([torch.arange(*part) for ranges in pieces for part in ranges])
    return stacked[order.argsort()]
