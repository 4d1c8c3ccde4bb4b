"""A product and its low-rank branch: y = g (x W^T + s h B^T) + b, and dX = (g dY) W + u A, the gradient of x.

In one kernel, both sums are accumulated in one fp32 accumulator and rounded once; the result is written once. Or the
vendor's library multiplies, and `low_rank_add` does the rest (see `cards`).
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a kernel is launched with arguments that its signature does not have)

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_mm.kernels.common import add_low_rank, float_product, num_blocks, operator, rank_block, tile_order
from dora_mm.kernels.gpus import ODD, gpu
from dora_mm.kernels.low_rank_add import low_rank_add

GROUP = 8  # rows of tiles that share the columns of W in the L2 cache


@triton.jit
def _low_rank_matmul(
    x, W, h, B, gain, bias, y,  # (M, K), (N, K), (M, R), (N, R), (N,) or (K,), (N,), (M, N)
    M, N, K, R, num_h, scaling,
    stride_x, stride_xk, stride_wn, stride_wk, stride_h, stride_bn, stride_br, stride_y,
    GAIN_FIRST: tl.constexpr, GAIN_OUT: tl.constexpr, GAIN_IN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BRANCH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tile_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row, is_column = rows < M, columns < N
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if HAS_BRANCH and not GAIN_FIRST:  # while the accumulator is empty: its operands need registers
        acc = add_low_rank(
            acc, h, B, scaling, rows, columns, M, N, R, num_h, stride_h, stride_bn, stride_br, BLOCK_R
        )  # fmt: skip
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        is_k = k < K
        a = tl.load(
            x + rows[:, None] * stride_x + k[None, :].to(tl.int64) * stride_xk,
            mask=is_row[:, None] & is_k[None, :],
            other=0.0,
        )
        if GAIN_IN:
            g = tl.load(gain + k, mask=is_k, other=0.0)
            a = (a.to(tl.float32) * g[None, :]).to(a.dtype)
        w = tl.load(
            W + columns[None, :] * stride_wn + k[:, None].to(tl.int64) * stride_wk,
            mask=is_k[:, None] & is_column[None, :],
            other=0.0,
        )
        acc = tl.dot(a, w, acc, input_precision="ieee")
    if GAIN_OUT:
        acc *= tl.load(gain + columns, mask=is_column, other=0.0)[None, :]
    if HAS_BRANCH and GAIN_FIRST:
        acc = add_low_rank(
            acc, h, B, scaling, rows, columns, M, N, R, num_h, stride_h, stride_bn, stride_br, BLOCK_R
        )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    where = rows[:, None] * stride_y + columns[None, :]
    tl.store(y + where, acc.to(y.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def _launch(x, W, stride_wn, stride_wk, N, h, B, stride_bn, stride_br, scaling, gain, gain_in, gain_first, bias):
    M, K = x.shape
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    chosen = (gpu(x).tile_back if gain_in else gpu(x).tile) if K % 16 == 0 and N % 16 == 0 else ODD
    rank = 0 if B is None else B.shape[1]
    with torch.cuda.device_of(x):
        _low_rank_matmul[(num_blocks(M, chosen["BLOCK_M"]) * num_blocks(N, chosen["BLOCK_N"]),)](
            x, W, h, B, gain, bias, y,
            M, N, K, rank, 0 if h is None else h.shape[1], scaling,
            x.stride(0), x.stride(1), stride_wn, stride_wk,
            0 if h is None else h.stride(0), stride_bn, stride_br, y.stride(0),
            GAIN_FIRST=gain_first, GAIN_OUT=gain is not None and not gain_in, GAIN_IN=gain is not None and gain_in,
            HAS_BIAS=bias is not None, HAS_BRANCH=rank > 0, BLOCK_R=rank_block(max(rank, 1), x), GROUP=GROUP, **chosen,
        )  # fmt: skip
    return y


@operator("dora_mm::low_rank_linear")
def low_rank_linear(
    x: Tensor,
    W0: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    h: Tensor | None,
    B: Tensor | None,
    scaling: float,
    gain_first: bool,
    vendor: bool,
) -> Tensor:
    """Computes y = g (x W0^T + s h B^T) + b, rounded once.

    Args:
        x: x (T, I), in any layout.
        W0: W0 (O, I), of the dtype of x, in any layout.
        bias: b (O,), in any floating dtype, or None.
        gain: g (O,) in fp32, or None for 1.
        h: h (T, R or more), of the dtype of x, its rows contiguous and zeros from R on, or None.
        B: B (O, R); s B is rounded to the dtype of x in the kernel. Or None.
        scaling: s.
        gain_first: Whether g multiplies x W0^T alone.
        vendor: Whether the vendor's library multiplies.

    Returns:
        y (T, O), contiguous, in the dtype of x.
    """
    if vendor:
        return low_rank_add(float_product(x, W0.t()), bias, gain, h, B, scaling, x.dtype, gain_first)
    strides = (0, 0) if B is None else (B.stride(0), B.stride(1))
    weight = W0, W0.stride(0), W0.stride(1), W0.shape[0]
    return _launch(x, *weight, h, B, *strides, scaling, gain, False, gain_first, bias)


@low_rank_linear.register_fake
def _(x, W0, bias, gain, h, B, scaling, gain_first, vendor):
    return x.new_empty(x.shape[0], W0.shape[0])


@operator("dora_mm::low_rank_grad_input")
def low_rank_grad_input(
    dY: Tensor, W0: Tensor, gain: Tensor | None, u: Tensor | None, A: Tensor | None, vendor: bool
) -> Tensor:
    """Computes dX = (g dY) W0 + u A, rounded once.

    Args:
        dY: dY (T, O), in any layout.
        W0: W0 (O, I), of the dtype of dY, in any layout.
        gain: g (O,) in fp32, or None for 1. g dY is rounded to the dtype of dY. The vendor's product takes no gain.
        u: u (T, R or more), of the dtype of dY, its rows contiguous and zeros from R on, or None.
        A: A (R, I), rounded to the dtype of dY in the kernel, or None.
        vendor: Whether the vendor's library multiplies.

    Returns:
        dX (T, I), contiguous, in the dtype of dY.
    """
    if vendor:
        assert gain is None
        return low_rank_add(float_product(dY, W0), None, None, u, None if A is None else A.t(), 1.0, dY.dtype)
    A = None if A is None else A.t()
    strides = (0, 0) if A is None else (A.stride(0), A.stride(1))
    weight = W0, W0.stride(1), W0.stride(0), W0.shape[1]
    return _launch(dY, *weight, u, A, *strides, 1.0, gain, True, False, None)


@low_rank_grad_input.register_fake
def _(dY, W0, gain, u, A, vendor):
    return dY.new_empty(dY.shape[0], W0.shape[1])
