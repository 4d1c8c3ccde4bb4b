"""The steps of the layer that a backend replaces, in plain torch. kernels/ has them in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from dora_mm.core.functional import (
    SMALL_GAIN,
    Adapter,
    RowGains,
    adapter_dtype,
    as_matrix,
    can_read,
    directions,
    row_gains,
)
from dora_mm.core.ops import Op, per_row, row_sums

LARGE_BIAS = {torch.float32: 64.0, torch.float64: 64.0}  # |b| / rms(y - b) above which y - b has lost too many digits
LARGE_BIAS_HALF = 4.0


class Steps:
    """The steps of the layer in plain torch; a subclass has them in another implementation.

    Attributes:
        rounds_once: Whether `unmerged` adds the branch before it rounds to half precision. Added afterwards, small
            updates would be lost.
    """

    rounds_once: bool = False

    def reads_output(self) -> bool:
        """Whether `magnitude_grad` works here: it reads values."""
        return not torch.compiler.is_compiling()

    def row_gains(self, weight: Tensor, adapter: Adapter, n0: Tensor | None) -> RowGains | None:
        """`functional.row_gains`; `n0` are the row norms of the weight, where they are known."""
        return row_gains(weight, adapter, n0)

    def unmerged(
        self,
        op: Op,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        base_gain: Tensor | None,
        h: Tensor | None,
        B: Tensor | None,
    ) -> Tensor:
        """Returns y = e x W0^T + h B^T + b, in new memory.

        Args:
            op: The operation of the layer.
            x: Input of the layer.
            weight: W0.
            bias: b (O,), or None.
            base_gain: e (O,), or None for 1.
            h: x A^T of all adapters, or None.
            B: What h is multiplied by (O, R), scaled by s, t and g, in the adapter's dtype.
        """
        # The bias is part of the product, as b / e, so that a fresh adapter (e = 1, B = 0) changes no bit.
        outside = None
        if base_gain is not None and bias is not None:
            if can_read(base_gain) and is_divisor(base_gain):
                bias = bias / base_gain
            else:
                bias, outside = None, bias
        y = op(x, weight, bias)
        dtype = y.dtype
        y = y.to(adapter_dtype(dtype))  # fp32 for an embedding in half precision, which is rounded once, at the end
        if base_gain is not None:
            y = y.mul_(per_row(op, base_gain, y))
        if h is not None and B is not None:
            y = op.add_expanded(y, h, B)
        if outside is not None:
            y = y.add_(per_row(op, outside, y))
        return y.to(dtype)

    def unmerged_grad_input(
        self,
        op: Op,
        dY: Tensor,
        x: Tensor,
        weight: Tensor,
        base_gain: Tensor | None,
        u: Tensor | None,
        A: Tensor | None,
    ) -> Tensor:
        """Returns dX = (e dY) W0 + u A. Of x only the shape is read."""
        dX = op.grad_input(dY if base_gain is None else dY * per_row(op, base_gain, dY), x, weight)
        return dX if u is None or A is None else op.add_grad_reduced(dX, u, x, A)

    def magnitude_grad(
        self,
        op: Op,
        dY: Tensor,
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        adapter: Adapter,
    ) -> Tensor:
        """Returns dm (O,) of the only adapter, at strength 1, from the output y of the layer; 0 where n is 0.

        It is the sum over tokens of dY (y - b), / m, where that is safe. Rows with a small gain, or with a bias much
        larger than y - b, use `inner_dots`.
        """
        rows = adapter.rows
        assert adapter.magnitude is not None
        assert rows is not None
        dots, squares = row_sums(op, dY, y, bias)
        dm = dots / adapter.magnitude
        if rows.regular and bias is None:
            return dm
        chosen = is_zero = None
        if bias is not None and squares is not None:
            rms = (squares / max(op.num_tokens(x, weight), 1)).sqrt()
            chosen = bias.abs() > large_bias(y.dtype) * rms
        if not rows.regular:
            is_zero, unsafe = rows.norm == 0, rows.gain.abs() <= SMALL_GAIN
            chosen = (unsafe if chosen is None else unsafe | chosen) & ~is_zero
        if chosen is not None and chosen.any():
            dm = torch.where(chosen, inner_dots(op, dY, x, weight, adapter, chosen) / rows.norm, dm)
        return dm if is_zero is None else dm.masked_fill_(is_zero, 0)


TORCH_STEPS = Steps()


def is_divisor(gain: Tensor) -> bool:
    """Whether every |g| is above SMALL_GAIN; nearly always every g is, which takes one pass to see. Waits."""
    return gain.min().item() > SMALL_GAIN or not (gain.abs() <= SMALL_GAIN).any()


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
