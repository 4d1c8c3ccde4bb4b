"""n and g of every output row in one pass over W0: nothing of the size of W0 is written."""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a kernel is launched with arguments that its signature does not have)

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_mm.core.functional import CANCELLED
from dora_mm.kernels.common import MIN_DOT, num_blocks, operator

# A program holds BLOCK_O rows and loops along them: few rows, so that 1,280 of them keep 80 multiprocessors busy.
# Products of fp32 A and B keep their operands in registers: 64 x 64 with 64 columns of B spills 4,896 bytes per thread
# on sm_80.
BLOCK_O, BLOCK_I = 16, 64


@triton.jit
def _row_norm(
    W0, A, B, n0, magnitude, norm, gain,  # (O, I), (R, I), (O, R), (O,) four times
    num_out, num_in, rank, scaling, cancelled,
    stride_w, stride_wi, stride_a, stride_b,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    is_row = rows < num_out
    D = tl.zeros([BLOCK_O, BLOCK_I], dtype=tl.float32)  # added up once, after the loop
    square = tl.zeros([BLOCK_O, BLOCK_I], dtype=tl.float32)
    for start in range(0, num_in, BLOCK_I):
        columns = start + tl.arange(0, BLOCK_I)
        is_column = columns < num_in
        where = rows[:, None] * stride_w + columns[None, :].to(tl.int64) * stride_wi
        w = tl.load(W0 + where, mask=is_row[:, None] & is_column[None, :], other=0.0).to(tl.float32)
        delta = tl.zeros([BLOCK_O, BLOCK_I], dtype=tl.float32)
        for first in range(0, rank, BLOCK_R):
            k = first + tl.arange(0, BLOCK_R)
            is_k = k < rank
            b = tl.load(B + rows[:, None] * stride_b + k[None, :], mask=is_row[:, None] & is_k[None, :], other=0.0)
            a = tl.load(
                A + k[:, None] * stride_a + columns[None, :], mask=is_k[:, None] & is_column[None, :], other=0.0
            )
            delta = tl.dot(b, a, delta, input_precision="ieee")
        delta *= scaling
        D += delta * (2.0 * w + delta)
        square += (w + delta) * (w + delta)
    base = tl.load(n0 + rows, mask=is_row, other=0.0)
    change = tl.sum(D, 1)
    updated = base * base + change
    n = tl.where(updated < base * base * cancelled, tl.sum(square, 1), updated)
    n = tl.where(change == 0.0, base, tl.sqrt_rn(tl.maximum(n, 0.0)))  # n0 bit for bit where there is no update
    m = tl.load(magnitude + rows, mask=is_row, other=0.0)
    tl.store(norm + rows, n, mask=is_row)
    tl.store(gain + rows, tl.where(n == 0.0, 1.0, tl.div_rn(m, tl.where(n == 0.0, 1.0, n))), mask=is_row)


@operator("dora_mm::row_norm")
def row_norm(W0: Tensor, A: Tensor, B: Tensor, scaling: float, n0: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """Computes n = ||W0 + s B A|| per row, and g = m / n.

    Where W0 and the update nearly cancel, n is the norm of their sum itself.

    Args:
        W0: W0 (O, I), in any floating dtype below float64 and any layout.
        A: A (R, I) in fp32, contiguous.
        B: B (O, R) in fp32, contiguous.
        scaling: s.
        n0: The row norms of W0 (O,) in fp32.
        magnitude: m (O,) in fp32.

    Returns:
        n and g, (O,) each in fp32. n is n0 bit for bit where there is no update, and g is 1 where n is 0.
    """
    num_out, num_in = W0.shape
    norm, gain = torch.empty_like(n0), torch.empty_like(n0)
    with torch.cuda.device_of(W0):
        _row_norm[(num_blocks(num_out, BLOCK_O),)](
            W0, A, B, n0, magnitude, norm, gain,
            num_out, num_in, A.shape[0], scaling, CANCELLED,
            *W0.stride(), A.stride(0), B.stride(0),
            BLOCK_O=BLOCK_O, BLOCK_I=BLOCK_I, BLOCK_R=MIN_DOT, num_warps=4,
        )  # fmt: skip
    return norm, gain


@row_norm.register_fake
def _(W0, A, B, scaling, n0, magnitude):
    return torch.empty_like(n0), torch.empty_like(n0)
