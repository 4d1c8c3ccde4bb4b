"""The pass after a product of the vendor's library, P in fp32: y = g (P + s h B^T) + b, rounded once."""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a kernel is launched with arguments that its signature does not have)

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_mm.kernels.common import add_low_rank, num_blocks, operator, rank_block

BLOCK_M, BLOCK_N = 64, 64  # an fp32 tile of P and the accumulator take 32 registers per thread each, with 4 warps


@triton.jit
def _low_rank_add(
    P, h, B, gain, bias, y,  # (M, N), (M, R), (N, R), (N,), (N,), (M, N)
    M, N, R, num_h, scaling,
    stride_p, stride_pn, stride_h, stride_bn, stride_br,
    GAIN_FIRST: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BRANCH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # A grid of one dimension, since the second dimension of a grid is limited to 65,535 blocks.
    across = tl.cdiv(N, BLOCK_N)
    rows = (tl.program_id(0) // across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) % across).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row, is_column = rows < M, columns < N
    both = is_row[:, None] & is_column[None, :]
    acc = tl.load(P + rows[:, None] * stride_p + columns[None, :] * stride_pn, mask=both, other=0.0).to(tl.float32)
    if HAS_GAIN and GAIN_FIRST:
        acc *= tl.load(gain + columns, mask=is_column, other=0.0)[None, :]
    if HAS_BRANCH:
        acc = add_low_rank(
            acc, h, B, scaling, rows, columns, M, N, R, num_h, stride_h, stride_bn, stride_br, BLOCK_R
        )  # fmt: skip
    if HAS_GAIN and not GAIN_FIRST:
        acc *= tl.load(gain + columns, mask=is_column, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    tl.store(y + rows[:, None] * N + columns[None, :], acc.to(y.dtype.element_ty), mask=both)


@operator("dora_mm::low_rank_add")
def low_rank_add(
    P: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    h: Tensor | None,
    B: Tensor | None,
    scaling: float,
    dtype: torch.dtype,
    gain_first: bool = False,
) -> Tensor:
    """Computes y = g (P + s h B^T) + b, rounded once.

    Args:
        P: The product (T, O), in any floating dtype and layout.
        bias: b (O,), in any floating dtype, or None.
        gain: g (O,) in fp32, or None for 1.
        h: h (T, R or more), its rows contiguous and zeros from R on, or None.
        B: B (O, R); s B is rounded to the dtype of h in the kernel. Or None.
        scaling: s.
        dtype: The dtype of the result.
        gain_first: Whether g multiplies P alone.

    Returns:
        y (T, O), contiguous.
    """
    y = torch.empty_like(P, dtype=dtype, memory_format=torch.contiguous_format)
    M, N = P.shape
    rank = 0 if B is None else B.shape[1]
    if y.numel():
        with torch.cuda.device_of(P):
            _low_rank_add[(num_blocks(M, BLOCK_M) * num_blocks(N, BLOCK_N),)](
                P, h, B, gain, bias, y,
                M, N, rank, 0 if h is None else h.shape[1], scaling,
                *P.stride(), 0 if h is None else h.stride(0), *((0, 0) if B is None else B.stride()),
                GAIN_FIRST=gain_first, HAS_GAIN=gain is not None, HAS_BIAS=bias is not None, HAS_BRANCH=rank > 0,
                BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_R=rank_block(max(rank, 1), y), num_warps=4,
            )  # fmt: skip
    return y


@low_rank_add.register_fake
def _(P, bias, gain, h, B, scaling, dtype, gain_first=False):
    return P.new_empty(P.shape, dtype=dtype)
