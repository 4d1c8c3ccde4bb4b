"""The kernels of fused PEFT layers, with one pass over y in the forward and one over dz and y in the backward.

The functions are those of `dora_mm.peft.formula` of the same names, for a Linear without dropout.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dora_mm.core.functional import Adapter, cast
from dora_mm.core.ops import as_rows
from dora_mm.core.passes import PassCache
from dora_mm.kernels.adapter_grads import adapter_grads
from dora_mm.kernels.common import float_product
from dora_mm.kernels.dora_linear import TRITON_STEPS
from dora_mm.kernels.low_rank_add import low_rank_add
from dora_mm.kernels.output_grad import output_grad


def output(y, shift, gain, h, B, scaling: float, dtype: torch.dtype) -> Tensor:
    """Returns z = g y + `shift` + h (s g B)^T in `dtype`."""
    if y.dim() == 2:
        return low_rank_add(y, shift, gain, h, B, scaling, dtype)
    return low_rank_add(as_rows(y), shift, gain, as_rows(h), B, scaling, dtype).view(y.shape)


def gradients(scaling, dz, needs, y, bias, h, B, divisor, gain, dtype) -> Sequence[Tensor | None]:
    """Returns the gradients of y, b, h, B and m that are needed, those of B and m in `dtype`."""
    needs_y, needs_bias, needs_h, needs_B, needs_m = needs
    d, rows, dB, dm = as_rows(dz), as_rows(h), None, None
    of_rows = bias, divisor, divisor, gain
    scaled, dots, operand = output_grad(d, as_rows(y), None, None, rows, B, *of_rows, scaling, needs_y, needs_m)
    dbias = (1 - gain) * d.sum(0) if needs_bias else None
    dy = cast(scaled, y.dtype).view(y.shape) if needs_y else None
    d = cast(d, h.dtype)
    dh = (d @ operand).view(h.shape) if needs_h else None
    if needs_B or needs_m:
        product = float_product(d.t(), rows)
        own = (dots, gain, scaling, B, divisor) if needs_m else (None, gain, scaling, None, None)
        dB, dm = adapter_grads(product, B.shape[1], *own, dtype)
    return dy, dbias, dh, dB if needs_B else None, dm if needs_m else None


def gains(W0: Tensor, A: Tensor, B: Tensor, m: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Computes g and n, without a dense sum; n is 0 where it is, which the other kernels know."""
    A, B, m = (cast(t, torch.float32) for t in (A, B, m))
    rows, _ = TRITON_STEPS.row_gains(W0, Adapter(A, B, m, scaling), PassCache())
    assert rows is not None
    return rows.gain, rows.norm
