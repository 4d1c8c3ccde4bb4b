"""n and g of every row of a stack of matrices, in one pass over W0.

    n^2 = n0^2 + rowsum(s B (2 W0 A^T + s B A A^T))

It is what `row_norm` computes of one matrix from the vendor's products, which for stacks would need a copy of W0 in
fp32. In half precision A is the sum of two parts, as there, and a program multiplies by both.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# (a kernel is launched with arguments that its signature does not have)

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_mm.core.functional import CANCELLED
from dora_mm.kernels.common import MIN_DOT, num_blocks
from dora_mm.kernels.operands import REST_FACTOR
from dora_mm.kernels.row_norm import _squares

BLOCK_O, BLOCK_R = 64, 32  # ranks from 33 on read W0 again for each 32
BLOCK_I, ODD_I = {2: 64, 4: 16}, 16  # by bytes of an entry of W0; where rows begin between multiples of 32 bytes
DENSE_I = 32  # where W0 and the update nearly cancel


@triton.jit
def _grouped_norm(
    W0, G, A, B, n0, magnitude, norm, gain,  # (E, O, I), (E, R, R), (E, R, I), (E, O, R), (E, O) four times
    num_out, num_in, rank, scaling, rest_factor, cancelled,
    stride_we, stride_w, stride_wi, stride_ae, stride_a, stride_ai, stride_be, stride_b, stride_br,
    HAS_BASE: tl.constexpr, HAS_REST: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr, DENSE_R: tl.constexpr, DENSE_I: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(num_out, BLOCK_O)
    matrix = (tl.program_id(0) // across).to(tl.int64)
    W0 += matrix * stride_we
    A += matrix * stride_ae
    B += matrix * stride_be
    G += matrix * rank * rank
    rows = ((tl.program_id(0) % across) * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    is_row = rows < num_out
    change = tl.zeros([BLOCK_O], dtype=tl.float32)
    for first in range(0, rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        is_r = r < rank
        product = tl.zeros([BLOCK_O, BLOCK_R], dtype=tl.float32)
        rest = tl.zeros([BLOCK_O, BLOCK_R], dtype=tl.float32)
        for start in range(0, num_in, BLOCK_I):
            columns = (start + tl.arange(0, BLOCK_I)).to(tl.int64)
            is_column = columns < num_in
            where = rows[:, None] * stride_w + columns[None, :] * stride_wi
            w = tl.load(W0 + where, mask=is_row[:, None] & is_column[None, :], other=0.0)
            a = tl.load(
                A + r[None, :].to(tl.int64) * stride_a + columns[:, None] * stride_ai,
                mask=is_column[:, None] & is_r[None, :],
                other=0.0,
            )
            rounded = a.to(w.dtype)
            product = tl.dot(w, rounded, product, input_precision="ieee")
            if HAS_REST:
                left = ((a - rounded.to(tl.float32)) * rest_factor).to(w.dtype)
                rest = tl.dot(w, left, rest, input_precision="ieee")
        if HAS_REST:
            product += rest / rest_factor
        inner = 2.0 * product
        for second in range(0, rank, BLOCK_R):
            k = second + tl.arange(0, BLOCK_R)
            mask = is_row[:, None] & (k < rank)[None, :]
            c = scaling * tl.load(B + rows[:, None] * stride_b + k[None, :] * stride_br, mask=mask, other=0.0)
            gram = tl.load(G + k[:, None] * rank + r[None, :], mask=(k < rank)[:, None] & is_r[None, :], other=0.0)
            inner = tl.dot(c, gram, inner, input_precision="ieee")
        mask = is_row[:, None] & is_r[None, :]
        b = scaling * tl.load(B + rows[:, None] * stride_b + r[None, :] * stride_br, mask=mask, other=0.0)
        change += tl.sum(b * inner, 1)
    of_row = matrix * num_out + rows
    if HAS_BASE:
        base = tl.load(n0 + of_row, mask=is_row, other=0.0)
    else:
        base = tl.sqrt_rn(
            _squares(
                W0, A, B, rows, is_row, num_in, 0, scaling, stride_w, stride_wi, stride_a, stride_ai, stride_b,
                stride_br, BLOCK_O, DENSE_I, DENSE_R,
            )
        )  # fmt: skip
    updated = base * base + change
    is_lost = updated < base * base * cancelled
    n = tl.sqrt_rn(tl.maximum(updated, 0.0))
    if tl.max(is_lost.to(tl.int32), 0) > 0:
        dense = _squares(
            W0, A, B, rows, is_row, num_in, rank, scaling, stride_w, stride_wi, stride_a, stride_ai, stride_b,
            stride_br, BLOCK_O, DENSE_I, DENSE_R,
        )  # fmt: skip
        n = tl.where(is_lost, tl.sqrt_rn(dense), n)
    n = tl.where(change == 0.0, base, n)  # n0 bit for bit where there is no update
    m = tl.load(magnitude + of_row, mask=is_row, other=0.0)
    tl.store(norm + of_row, n, mask=is_row)
    tl.store(gain + of_row, tl.where(n == 0.0, 1.0, tl.div_rn(m, tl.where(n == 0.0, 1.0, n))), mask=is_row)


def grouped_norm(
    W0: Tensor, G: Tensor, A: Tensor, B: Tensor, scaling: float, n0: Tensor | None, magnitude: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes n = ||W0 + s B A|| per row, and g = m / n.

    Where W0 and the update nearly cancel, n is the norm of their sum itself.

    Args:
        W0: W0 (E, O, I), in any floating dtype below float64 and any layout.
        G: A A^T (E, R, R) in fp32, contiguous.
        A: A (E, R, I) in fp32.
        B: B (E, O, R) in fp32.
        scaling: s.
        n0: The row norms of W0 (E, O) in fp32, contiguous; computed where it is None.
        magnitude: m (E, O) in fp32.

    Returns:
        n and g, (E, O) each in fp32. n is n0 bit for bit where there is no update, and g is 1 where n is 0.
    """
    num_matrices, num_out, num_in = W0.shape
    rank, has_rest = A.shape[1], W0.dtype.itemsize < 4
    magnitude = magnitude.contiguous()
    norm, gain = torch.empty_like(magnitude), torch.empty_like(magnitude)
    with torch.cuda.device_of(W0):
        _grouped_norm[(num_matrices * num_blocks(num_out, BLOCK_O),)](
            W0, G, A, B, n0, magnitude, norm, gain,
            num_out, num_in, rank, scaling, REST_FACTOR[W0.dtype] if has_rest else 1.0, CANCELLED,
            *W0.stride(), *A.stride(), *B.stride(),
            HAS_BASE=n0 is not None, HAS_REST=has_rest,
            BLOCK_O=BLOCK_O, BLOCK_I=ODD_I if num_in % 16 else BLOCK_I[W0.dtype.itemsize], DENSE_I=DENSE_I,
            BLOCK_R=MIN_DOT if rank <= MIN_DOT else BLOCK_R, DENSE_R=MIN_DOT, num_warps=4,
        )  # fmt: skip
    return norm, gain
