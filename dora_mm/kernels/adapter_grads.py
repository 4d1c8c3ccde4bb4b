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
    product, dots, gain, B, norm, dB, dm,  # (O, P), (slabs, O), (O,), (O, R), (O,), (O, R), (O,)
    num_out, rank, padded_rank, slabs, scaling, stride_b, stride_br,
    HAS_GAIN: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_DOTS: tl.constexpr, ADDS_BRANCH: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    is_row = rows < num_out
    magnitude_grad = tl.zeros([BLOCK_O], dtype=tl.float32)
    if HAS_DOTS:
        total = tl.zeros([BLOCK_S, BLOCK_O], dtype=tl.float32)  # added up once, after the loop
        for start in range(0, slabs, BLOCK_S):
            slab = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
            mask = (slab < slabs)[:, None] & is_row[None, :]
            total += tl.load(dots + slab[:, None] * num_out + rows[None, :], mask=mask, other=0.0)
        magnitude_grad += tl.sum(total, 0)
    if HAS_BRANCH:
        own = tl.zeros([BLOCK_O, BLOCK_R], dtype=tl.float32)
        factor = tl.full([BLOCK_O], 1.0, dtype=tl.float32) * scaling
        if HAS_GAIN:
            factor *= tl.load(gain + rows, mask=is_row, other=0.0)
        for start in range(0, rank, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            mask = is_row[:, None] & (r < rank)[None, :]
            value = tl.load(product + rows[:, None] * padded_rank + r[None, :], mask=mask, other=0.0)
            tl.store(
                dB + rows[:, None] * rank + r[None, :], (value * factor[:, None]).to(dB.dtype.element_ty), mask=mask
            )
            if ADDS_BRANCH:
                own += value * tl.load(B + rows[:, None] * stride_b + r[None, :] * stride_br, mask=mask, other=0.0)
        if ADDS_BRANCH:
            n = tl.load(norm + rows, mask=is_row, other=0.0)
            share = tl.div_rn(scaling * tl.sum(own, 1), tl.where(n == 0.0, 1.0, n))
            magnitude_grad += tl.where(n == 0.0, 0.0, share)
    if HAS_DOTS:
        tl.store(dm + rows, magnitude_grad.to(dm.dtype.element_ty), mask=is_row)


@operator("dora_mm::adapter_grads")
def adapter_grads(
    product: Tensor | None,
    rank: int,
    dots: Tensor | None,
    gain: Tensor | None,
    scaling: float,
    B: Tensor | None = None,
    norm: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Computes dB = s g (dY^T h), and dm as the sum of its parts, in a fixed order.

    With B and n it adds to dm what its parts leave out where they come from the output of a base layer: the sums over
    ranks of s (dY^T h) B / n.

    Args:
        product: dY^T h (O, R or more) in fp32, contiguous, or None.
        rank: R.
        dots: The parts of dm (slabs, O) in fp32, from `output_grad`, or None.
        gain: g (O,) in fp32, or None for 1.
        scaling: s.
        B: B (O, R), or None.
        norm: n (O,) in fp32, or None; nothing is added where it is 0.
        dtype: That of the results, to which they are rounded once.

    Returns:
        dB (O, R) and dm (O,) in `dtype`, contiguous; empty where there is nothing to compute them from.
    """
    given = product if product is not None else dots
    assert given is not None
    num_out = given.shape[0] if dots is None else dots.shape[1]
    dB = given.new_empty((0, 0) if product is None else (num_out, rank), dtype=dtype)
    dm = given.new_empty(0 if dots is None else num_out, dtype=dtype)
    with torch.cuda.device_of(given):
        _adapter_grads[(num_blocks(num_out, BLOCK_O),)](
            product, dots, gain, B, norm, dB, dm,
            num_out, rank, 0 if product is None else product.shape[1], 0 if dots is None else dots.shape[0], scaling,
            *((0, 0) if B is None else B.stride()),
            HAS_GAIN=gain is not None, HAS_BRANCH=product is not None, HAS_DOTS=dots is not None,
            ADDS_BRANCH=B is not None,
            BLOCK_O=BLOCK_O, BLOCK_R=BLOCK_R, BLOCK_S=BLOCK_S, num_warps=1,
        )  # fmt: skip
    return dB, dm


@adapter_grads.register_fake
def _(product, rank, dots, gain, scaling, B=None, norm=None, dtype=torch.float32):
    given = product if product is not None else dots
    assert given is not None
    num_out = given.shape[0] if dots is None else dots.shape[1]
    dB = given.new_empty((0, 0) if product is None else (num_out, rank), dtype=dtype)
    return dB, given.new_empty(0 if dots is None else num_out, dtype=dtype)
