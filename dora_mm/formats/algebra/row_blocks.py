"""Weights a block of rows at a time: temporaries that fit into a core's cache cost a fraction of large ones.

What lies on rows alone, as everything of a magnitude on the output axis, is the same for a block as for the whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from dora_mm.formats.state import LayerState

_VALUES = 2**17  # of a block: 0.5 MB in fp32, of which some are in use at a time
_ON_ROWS = ("lora_B", "magnitude", "diff", "weight")


def row_blocks(weight: Tensor) -> Iterator[slice]:
    """The rows of a weight (O, ...), some at a time."""
    step = max(1, _VALUES // max(1, math.prod(weight.shape[1:])))
    yield from (slice(start, start + step) for start in range(0, weight.shape[0], step))


def in_rows(layer: LayerState, weight: Tensor) -> Iterator[tuple[slice, LayerState]]:
    """Blocks of rows, and the adapter of each; magnitudes on the input axis need all rows at once."""
    if layer.axis == "in":
        yield slice(None), layer
    else:
        yield from ((rows, rows_of(layer, rows)) for rows in row_blocks(weight))


def rows_of(layer: LayerState, rows: slice) -> LayerState:
    """The adapter of some rows of a weight, with magnitudes on the output axis."""
    assert layer.axis == "out"
    tensors = {name: t[rows] if name in _ON_ROWS else t for name, t in layer.tensors.items()}
    return LayerState(layer.spec, tensors, layer.axis, layer.norm)
