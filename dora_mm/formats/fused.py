"""Fused projections: adapters of q, k and v as one adapter of their stacked weight, and back, exactly.

W = [W_q; W_k; W_v] has A = [A_q; A_k; A_v] and a block-diagonal B, so its rank and alpha are sums. A magnitude on the
output axis has an entry per row, and is stacked like the rows; one on the input axis cannot be fused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from dora_mm.formats.names import Target


class Factors(NamedTuple):
    """The adapter of one weight (O, I): A (R, I), B (O, R), alpha, and the magnitude (O,) if it is DoRA."""

    A: Tensor
    B: Tensor
    alpha: float
    magnitude: Tensor | None = None


def split(target: Target, fused: Factors) -> list[Factors]:
    """The adapters of the modules of a target, from that of the weight in a file, in the order of `target.names`.

    Also for a target of one module, whose rows may change places. Where B is block-diagonal, each part gets its own
    rank back, else A is shared.

    Raises:
        ValueError: The rows cannot be divided among the modules.
    """
    raise NotImplementedError


def fuse(target: Target, parts: Sequence[Factors]) -> Factors:
    """The adapter of the weight in a file, from those of the modules of a target: the inverse of `split`.

    Raises:
        ValueError: Only some of the parts have a magnitude: give the others that of W0.
    """
    raise NotImplementedError


def untouched(out_features: int, in_features: int, magnitude: Tensor | None = None) -> Factors:
    """An adapter of rank 1 that changes nothing, for a part of a fused projection that is not adapted.

    Args:
        magnitude: The row norms of W0 (O,), where the other parts are DoRA.
    """
    raise NotImplementedError


def split_rows(target: Target, weight: Tensor) -> list[Tensor]:
    """A weight (O, I) in a file as the weights of the modules of a target, views where their rows stay in place."""
    raise NotImplementedError


def stack_rows(target: Target, weights: Sequence[Tensor]) -> Tensor:
    """The weight (O, I) in a file from those of the modules of a target: the inverse of `split_rows`."""
    raise NotImplementedError
