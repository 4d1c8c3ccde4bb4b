"""The end of the backward pass: dB from the product with dY, and dm from its parts, in the dtype of the parameters."""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a kernel is launched with arguments that its signature does not have)

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_mm.kernels.common import num_blocks, operator

BLOCK_O, BLOCK_R, BLOCK_S = 16, 16, 16


@triton.jit
def _adapter_grads(
    product, dots, gain, dB, dm,  # (O, P), (slabs, O), (O,), (O, R), (O,)
    num_out, rank, padded, slabs, scaling,
    HAS_GAIN: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_DOTS: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    is_row = rows < num_out
    if HAS_DOTS:
        total = tl.zeros([BLOCK_S, BLOCK_O], dtype=tl.float32)  # added up once, after the loop
        for start in range(0, slabs, BLOCK_S):
            slab = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
            mask = (slab < slabs)[:, None] & is_row[None, :]
            total += tl.load(dots + slab[:, None] * num_out + rows[None, :], mask=mask, other=0.0)
        tl.store(dm + rows, tl.sum(total, 0), mask=is_row)
    if HAS_BRANCH:
        factor = tl.full([BLOCK_O], 1.0, dtype=tl.float32) * scaling
        if HAS_GAIN:
            factor *= tl.load(gain + rows, mask=is_row, other=0.0)
        for start in range(0, rank, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            mask = is_row[:, None] & (r < rank)[None, :]
            value = tl.load(product + rows[:, None] * padded + r[None, :], mask=mask, other=0.0)
            tl.store(dB + rows[:, None] * rank + r[None, :], value * factor[:, None], mask=mask)


@operator("dora_mm::adapter_grads")
def adapter_grads(
    product: Tensor | None, rank: int, dots: Tensor | None, gain: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Computes dB = s g (dY^T h), and dm as the sum of its parts, in a fixed order.

    Args:
        product: dY^T h (O, R or more) in fp32, contiguous, or None.
        rank: R.
        dots: The parts of dm (slabs, O) in fp32, from `output_grad`, or None.
        gain: g (O,) in fp32, or None for 1.
        scaling: s.

    Returns:
        dB (O, R) and dm (O,) in fp32, contiguous; empty where there is nothing to compute them from.
    """
    given = product if product is not None else dots
    assert given is not None
    num_out = given.shape[0] if dots is None else dots.shape[1]
    dB = given.new_empty((0, 0) if product is None else (num_out, rank))
    dm = given.new_empty(0 if dots is None else num_out)
    with torch.cuda.device_of(given):
        _adapter_grads[(num_blocks(num_out, BLOCK_O),)](
            product, dots, gain, dB, dm,
            num_out, rank, 0 if product is None else product.shape[1], 0 if dots is None else dots.shape[0], scaling,
            HAS_GAIN=gain is not None, HAS_BRANCH=product is not None, HAS_DOTS=dots is not None,
            BLOCK_O=BLOCK_O, BLOCK_R=BLOCK_R, BLOCK_S=BLOCK_S, num_warps=1,
        )  # fmt: skip
    return dB, dm


@adapter_grads.register_fake
def _(product, rank, dots, gain, scaling):
    given = product if product is not None else dots
    assert given is not None
    num_out = given.shape[0] if dots is None else dots.shape[1]
    dB = given.new_empty((0, 0) if product is None else (num_out, rank))
    return dB, given.new_empty(0 if dots is None else num_out)
