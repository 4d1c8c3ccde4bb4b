"""The gradient of the magnitude: from the output where that is safe, else from a product of the size of the layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dora_mm.core.functional import SMALL_GAIN, Adapter, RowGains, as_matrix, directions
from dora_mm.core.ops import Op, row_sums
from dora_mm.core.passes import SavedPass
from dora_mm.core.reads import RowMask

LARGE_BIAS = {torch.float32: 64.0, torch.float64: 64.0}  # |b| / rms(y - b) above which y - b has lost too many digits
LARGE_BIAS_HALF = 4.0


def magnitude_grad(op: Op, dY: Tensor, saved: SavedPass, adapter: Adapter) -> Tensor:
    """Returns dm = t sum over tokens of dY * (x V^T), / n; 0 where n is 0. It takes a product."""
    assert adapter.rows is not None
    norm = adapter.rows.norm
    dots = inner_dots(op, dY, saved.x, saved.weight, adapter)
    return (adapter.strength * dots / norm).masked_fill_(norm == 0, 0)


def magnitude_grad_of_output(op: Op, dY: Tensor, saved: SavedPass, adapter: Adapter) -> Callable[[], Tensor]:
    """Starts to compute dm (O,) of the only adapter, at strength 1, from the output y of the layer; 0 where n is 0.

    It is the sum over tokens of dY (y - b), / m, where that is safe. Rows with a small gain, or with a bias much larger
    than y - b, use `inner_dots`; whether there are any is read back from a GPU, for all layers at once.

    Returns:
        What finishes it. Products that are launched before that keep a GPU busy while the program waits for the answer.
    """
    rows, y, weight, bias = adapter.rows, saved.y, saved.weight, saved.bias
    assert adapter.magnitude is not None
    assert rows is not None
    assert y is not None
    mask = rows.small if bias is None else saved.unsafe  # since the forward pass, where reading it waits
    dots, squares = row_sums(op, dY, y, bias, wants_squares=mask is None)
    dm = dots / adapter.magnitude
    if rows.regular and bias is None:
        return lambda: dm
    if mask is None:
        mean_squares = None if squares is None else squares / max(op.num_tokens(saved.x, weight), 1)
        mask = RowMask(unsafe_rows(rows, bias, mean_squares, y.dtype))
    chosen, any_chosen = mask.rows, mask.start_reading()

    def finish() -> Tensor:
        found = dm
        if any_chosen():
            found = torch.where(chosen, inner_dots(op, dY, saved.x, weight, adapter, chosen) / rows.norm, dm)
        return found if rows.regular else found.masked_fill_(rows.norm == 0, 0)

    return finish


def unsafe_rows(rows: RowGains, bias: Tensor | None, mean_squares: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The rows whose dm must not be computed from the output y: a mask (O,).

    Args:
        rows: n and g.
        bias: b (O,), or None.
        mean_squares: The means over tokens of (y - b)^2 (O,), where there is a bias.
        dtype: That of y.
    """
    unsafe = None if rows.regular else rows.gain.abs() <= SMALL_GAIN
    if bias is not None and mean_squares is not None:
        is_large = bias.abs() > large_bias(dtype) * mean_squares.sqrt()
        unsafe = is_large if unsafe is None else unsafe | is_large
    assert unsafe is not None
    return unsafe if rows.regular else unsafe & (rows.norm != 0)


def large_bias(dtype: torch.dtype) -> float:
    """The ratio |b| / rms(y - b) above which dm must not be computed from a y of this dtype."""
    return LARGE_BIAS.get(dtype, LARGE_BIAS_HALF)


def inner_dots(op: Op, dY: Tensor, x: Tensor, weight: Tensor, adapter: Adapter, chosen: Tensor | None = None) -> Tensor:
    """Returns the sums over tokens of dY (x V^T), (O,) in at least fp32, where V = W0 + s B A.

    Args:
        op: The operation of the layer.
        dY: Gradient of the output.
        x: Input of the layer.
        weight: W0.
        adapter: The adapter.
        chosen: A mask (O,) of the rows whose sums are wanted, or None for all; those of others may be 0.
    """
    V = directions(as_matrix(weight), adapter).view(weight.shape).to(dY.dtype)
    if chosen is None or op.groups > 1:  # a selection of rows does not divide into groups
        return row_sums(op, dY, op(x, V, None), None)[0]
    rows = chosen.nonzero()[:, 0]
    some = row_sums(op, dY.index_select(op.feature_dim, rows), op(x, V[rows], None), None)[0]
    return some.new_zeros(len(V)).index_copy_(0, rows, some)
