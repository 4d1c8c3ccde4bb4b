# pyright: reportArgumentType=false, reportCallIssue=false
# (a kernel is launched with arguments that its signature does not have)

"""dm from sums over tokens, where x V^T / n is (y - b) / m; in rows where that is not safe, from x V^T itself.

Which rows those are is known only on the GPU. There is a program per row, which ends at once where the row is safe. So
the CPU does not wait for the answer, and the kernel can be part of CUDA graphs and compiled graphs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_mm.kernels.common import operator

BLOCK_T, BLOCK_I = 32, 128


@triton.jit
def _magnitude_grad(
    dots, squares, magnitude, norm, gain, bias,  # (O,) each
    dY, x, W0, A, B, dm,  # (T, O), (T, I), (O, I), (R, I), (O, R), (O,)
    num_tokens, num_in, rank, scaling, small_gain, large_bias,
    stride_d, stride_do, stride_x, stride_xi, stride_w, stride_wi, stride_a, stride_b,
    HAS_BIAS: tl.constexpr, HAS_BRANCH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(norm + row)
    if n == 0.0:
        tl.store(dm + row, 0.0)
        return
    is_safe = tl.abs(tl.load(gain + row)) > small_gain
    if HAS_BIAS:
        rms = tl.sqrt(tl.load(squares + row) / num_tokens)
        is_safe = is_safe & (tl.abs(tl.load(bias + row).to(tl.float32)) <= large_bias * rms)
    if is_safe:
        tl.store(dm + row, tl.div_rn(tl.load(dots + row), tl.load(magnitude + row)))
        return
    total = tl.zeros([BLOCK_I], dtype=tl.float32)
    for start in range(0, num_in, BLOCK_I):
        columns = (start + tl.arange(0, BLOCK_I)).to(tl.int64)
        is_column = columns < num_in
        products = tl.zeros([BLOCK_T, BLOCK_I], dtype=tl.float32)  # sums of dY x, added up once, after the loop
        for first in range(0, num_tokens, BLOCK_T):
            tokens = (first + tl.arange(0, BLOCK_T)).to(tl.int64)
            is_token = tokens < num_tokens
            d = tl.load(dY + tokens * stride_d + row * stride_do, mask=is_token, other=0.0).to(tl.float32)
            where = tokens[:, None] * stride_x + columns[None, :] * stride_xi
            values = tl.load(x + where, mask=is_token[:, None] & is_column[None, :], other=0.0).to(tl.float32)
            products += d[:, None] * values
        v = tl.load(W0 + row * stride_w + columns * stride_wi, mask=is_column, other=0.0).to(tl.float32)
        if HAS_BRANCH:
            for k in range(0, rank):
                b = tl.load(B + row * stride_b + k) * scaling
                v += b * tl.load(A + k * stride_a + columns, mask=is_column, other=0.0)
        total += tl.sum(products, 0) * v
    tl.store(dm + row, tl.div_rn(tl.sum(total, 0), n))


@operator("dora_mm::magnitude_grad")
def magnitude_grad(
    dots: Tensor, squares: Tensor, magnitude: Tensor, norm: Tensor, gain: Tensor, bias: Tensor | None,
    dY: Tensor, x: Tensor, W0: Tensor, A: Tensor | None, B: Tensor | None,
    scaling: float, small_gain: float, large_bias: float,
) -> Tensor:  # fmt: skip
    """Computes dm = dots / m, and in rows that are not safe the sum over tokens of dY (x V^T) / n, V = W0 + s B A.

    Not safe are rows with |g| <= small_gain, or |b| > large_bias times the root mean square of y - b.

    Args:
        dots: Sums over tokens of dY (y - b), from `row_sums` (O,).
        squares: Sums over tokens of (y - b)^2, from `row_sums` (O,).
        magnitude: m (O,) in fp32.
        norm: n (O,) in fp32.
        gain: g (O,) in fp32.
        bias: b (O,), or None.
        dY: dY (T, O), in any layout.
        x: x (T, I), in any layout.
        W0: W0 (O, I), in any layout.
        A: A (R, I) in fp32, contiguous, or None.
        B: B (O, R) in fp32, contiguous, or None.
        scaling: s.
        small_gain: See above.
        large_bias: See above.

    Returns:
        dm (O,) in fp32, 0 where n is 0.
    """
    num_out, num_in = W0.shape
    dm = torch.empty(num_out, dtype=torch.float32, device=W0.device)
    rank = 0 if A is None else A.shape[0]
    with torch.cuda.device_of(W0):
        _magnitude_grad[(num_out,)](
            dots, squares, magnitude, norm, gain, bias,
            dY, x, W0, A, B, dm,
            x.shape[0], num_in, rank, scaling, small_gain, large_bias,
            *dY.stride(), *x.stride(), *W0.stride(),
            num_in, rank,
            HAS_BIAS=bias is not None, HAS_BRANCH=rank > 0, BLOCK_T=BLOCK_T, BLOCK_I=BLOCK_I, num_warps=4,
        )  # fmt: skip
    return dm


@magnitude_grad.register_fake
def _(dots, squares, magnitude, norm, gain, bias, dY, x, W0, A, B, scaling, small_gain, large_bias):
    return W0.new_empty(W0.shape[0], dtype=torch.float32)
