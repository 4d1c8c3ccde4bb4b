"""n and g of every output row from products of the vendor's library, which are small where R is: no V is built.

    n^2 = n0^2 + rowsum(s B (2 W0 A^T + s B A A^T))

In half precision, A is the sum of two parts (see `operands`), and both products are those of their stack: n is then
wrong by 3e-7 of itself, as it is with A in fp32, where the entries of A vary; by 8e-6 where all are rounded in the same
direction in bf16. (With the rounded A alone it would be 8e-5.)
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# (a kernel is launched with arguments that its signature does not have)

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_mm.core.functional import CANCELLED
from dora_mm.kernels.common import MIN_DOT, num_blocks, operator
from dora_mm.kernels.operands import REST_FACTOR

# A program has few rows, so that 1,280 of them keep 80 multiprocessors busy. It reads W0 only where n0 is not known,
# and where W0 and the update nearly cancel.
BLOCK_O, BLOCK_I = 16, 32


@triton.jit
def _row_norm(
    W0, Q, G, A, B, n0, magnitude, norm, gain,  # (O, I), (O, P or 2 P), (.., ..), (R, I), (O, R), (O,) four times
    num_out, num_in, rank, parts, scaling, rest, cancelled,
    stride_w, stride_wi, stride_a, stride_ai, stride_b, stride_br,
    HAS_BASE: tl.constexpr, HAS_REST: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr, DENSE_R: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    is_row = rows < num_out
    width = parts // 2 if HAS_REST else parts  # P: the ranks, filled up
    D = tl.zeros([BLOCK_O, BLOCK_R], dtype=tl.float32)  # added up once, after the loop
    for first in range(0, rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        mask = is_row[:, None] & (r < rank)[None, :]
        b = scaling * tl.load(B + rows[:, None] * stride_b + r[None, :] * stride_br, mask=mask, other=0.0)
        q = tl.load(Q + rows[:, None] * parts + r[None, :], mask=mask, other=0.0)
        if HAS_REST:
            q += rest * tl.load(Q + rows[:, None] * parts + width + r[None, :], mask=mask, other=0.0)
        inner = 2.0 * q
        for second in range(0, rank, BLOCK_R):
            k = second + tl.arange(0, BLOCK_R)
            is_k = is_row[:, None] & (k < rank)[None, :]
            c = scaling * tl.load(B + rows[:, None] * stride_b + k[None, :] * stride_br, mask=is_k, other=0.0)
            where, both = k[:, None] * parts + r[None, :], (k < rank)[:, None] & (r < rank)[None, :]
            gram = tl.load(G + where, mask=both, other=0.0)
            if HAS_REST:
                gram += rest * tl.load(G + where + width, mask=both, other=0.0)
                gram += rest * tl.load(G + where + width * parts, mask=both, other=0.0)
                gram += rest * rest * tl.load(G + where + width * parts + width, mask=both, other=0.0)
            inner = tl.dot(c, gram, inner, input_precision="ieee")
        D += b * inner
    change = tl.sum(D, 1)
    if HAS_BASE:
        base = tl.load(n0 + rows, mask=is_row, other=0.0)
    else:
        base = tl.sqrt_rn(
            _squares(
                W0, A, B, rows, is_row, num_in, 0, scaling, stride_w, stride_wi, stride_a, stride_ai, stride_b,
                stride_br, BLOCK_O, BLOCK_I, DENSE_R,
            )
        )  # fmt: skip
    updated = base * base + change
    is_lost = updated < base * base * cancelled
    n = tl.sqrt_rn(tl.maximum(updated, 0.0))
    if tl.max(is_lost.to(tl.int32), 0) > 0:
        dense = _squares(
            W0, A, B, rows, is_row, num_in, rank, scaling, stride_w, stride_wi, stride_a, stride_ai, stride_b,
            stride_br, BLOCK_O, BLOCK_I, DENSE_R,
        )  # fmt: skip
        n = tl.where(is_lost, tl.sqrt_rn(dense), n)
    n = tl.where(change == 0.0, base, n)  # n0 bit for bit where there is no update
    m = tl.load(magnitude + rows, mask=is_row, other=0.0)
    tl.store(norm + rows, n, mask=is_row)
    tl.store(gain + rows, tl.where(n == 0.0, 1.0, tl.div_rn(m, tl.where(n == 0.0, 1.0, n))), mask=is_row)


@triton.jit
def _squares(
    W0, A, B, rows, is_row, num_in, rank, scaling,
    stride_w, stride_wi, stride_a, stride_ai, stride_b, stride_br,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The squared norms of the rows of W0 + s B A, from the entries; those of W0 at rank 0."""
    square = tl.zeros([BLOCK_O, BLOCK_I], dtype=tl.float32)
    for start in range(0, num_in, BLOCK_I):
        columns = (start + tl.arange(0, BLOCK_I)).to(tl.int64)
        is_column = columns < num_in
        where = rows[:, None] * stride_w + columns[None, :] * stride_wi
        v = tl.load(W0 + where, mask=is_row[:, None] & is_column[None, :], other=0.0).to(tl.float32)
        for first in range(0, rank, BLOCK_R):
            k = first + tl.arange(0, BLOCK_R)
            is_k = k < rank
            b = tl.load(
                B + rows[:, None] * stride_b + k[None, :] * stride_br, mask=is_row[:, None] & is_k[None, :], other=0.0
            )
            a = tl.load(
                A + k[:, None].to(tl.int64) * stride_a + columns[None, :] * stride_ai,
                mask=is_k[:, None] & is_column[None, :],
                other=0.0,
            )
            v = tl.dot(b * scaling, a, v, input_precision="ieee")
        square += v * v
    return tl.sum(square, 1)


@operator("dora_mm::row_norm")
def row_norm(
    W0: Tensor,
    Q: Tensor,
    G: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    n0: Tensor | None,
    magnitude: Tensor,
) -> tuple[Tensor, Tensor]:
    """Computes n = ||W0 + s B A|| per row, and g = m / n.

    Where W0 and the update nearly cancel, n is the norm of their sum itself.

    Args:
        W0: W0 (O, I), in any floating dtype below float64 and any layout.
        Q: W0 A^T in fp32, where A is in fp32 (O, R); or W0 times the parts of A (O, 2 P).
        G: A A^T (R, R), or the product of the parts and themselves (2 P, 2 P), likewise.
        A: A (R, I) in fp32.
        B: B (O, R) in fp32.
        scaling: s.
        n0: The row norms of W0 (O,) in fp32; computed where it is None.
        magnitude: m (O,) in fp32.

    Returns:
        n and g, (O,) each in fp32. n is n0 bit for bit where there is no update, and g is 1 where n is 0.
    """
    num_out, num_in = W0.shape
    rank, parts = A.shape[0], Q.shape[1]
    has_rest = W0.dtype.itemsize < 4
    magnitude = magnitude.contiguous()
    norm, gain = torch.empty_like(magnitude), torch.empty_like(magnitude)
    with torch.cuda.device_of(W0):
        _row_norm[(num_blocks(num_out, BLOCK_O),)](
            W0, Q, G, A, B, n0, magnitude, norm, gain,
            num_out, num_in, rank, parts, scaling, 1 / REST_FACTOR[W0.dtype] if has_rest else 0.0, CANCELLED,
            *W0.stride(), *A.stride(), *B.stride(),
            HAS_BASE=n0 is not None, HAS_REST=has_rest,
            BLOCK_O=BLOCK_O, BLOCK_I=BLOCK_I, BLOCK_R=MIN_DOT if rank <= MIN_DOT else 2 * MIN_DOT, DENSE_R=MIN_DOT,
            num_warps=4,
        )  # fmt: skip
    return norm, gain


@row_norm.register_fake
def _(W0, Q, G, A, B, scaling, n0, magnitude):
    return torch.empty_like(magnitude), torch.empty_like(magnitude)
