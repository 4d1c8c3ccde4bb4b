"""Sums of outer products over the rows of each matrix of a stack: dA = u^T x and dB = s g (dY^T h) of all experts."""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a kernel is launched with arguments that its signature does not have)

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_mm.kernels.common import MIN_DOT, num_blocks
from dora_mm.kernels.groups import rows_of

BLOCK_C, BLOCK_R = 128, 32
BLOCK_S = {2: 32, 4: 16}  # by bytes of an entry: products in fp32 keep their operands in registers


@triton.jit
def _grouped_outer(
    a, b, gain, out, ends,  # (S, P), (S, C), (E, C), (E, R, C), (E,)
    num_columns, rank, factor,
    stride_a, stride_b, stride_bc, stride_oe, stride_or, stride_oc,
    HAS_GAIN: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    across, deep = tl.cdiv(num_columns, BLOCK_C), tl.cdiv(rank, BLOCK_R)
    columns = ((tl.program_id(0) % across) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    r = (tl.program_id(0) // across) % deep * BLOCK_R + tl.arange(0, BLOCK_R)
    matrix = (tl.program_id(0) // (across * deep)).to(tl.int64)
    is_r, is_column = r < rank, columns < num_columns
    begin, end = rows_of(matrix, ends)
    acc = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for start in range(begin, end, BLOCK_S):
        rows = start + tl.arange(0, BLOCK_S)
        is_row = rows < end
        left = tl.load(a + rows[None, :] * stride_a + r[:, None], mask=is_r[:, None] & is_row[None, :], other=0.0)
        right = tl.load(
            b + rows[:, None] * stride_b + columns[None, :] * stride_bc,
            mask=is_row[:, None] & is_column[None, :],
            other=0.0,
        )
        acc = tl.dot(left, right, acc, input_precision="ieee")
    acc *= factor
    if HAS_GAIN:
        acc *= tl.load(gain + matrix * num_columns + columns, mask=is_column, other=0.0)[None, :]
    where = matrix * stride_oe + r[:, None] * stride_or + columns[None, :] * stride_oc
    tl.store(out + where, acc, mask=is_r[:, None] & is_column[None, :])


def grouped_outer(
    a: Tensor, b: Tensor, ends: Tensor, out: Tensor, *, gain: Tensor | None = None, factor: float = 1.0
) -> Tensor:
    """Computes f g (a^T b) over the rows of each matrix; zeros for one without rows.

    Args:
        a: a (S, R or more), its rows contiguous.
        b: b (S, C), of the dtype of a, in any layout.
        ends: The end of the rows of each matrix (E,), integers that ascend to S.
        out: The result (E, R, C) in fp32, in any layout; it is overwritten.
        gain: g (E, C) in fp32, contiguous, or None for 1.
        factor: f.

    Returns:
        `out`.
    """
    num_matrices, rank, num_columns = out.shape
    block_r = max(MIN_DOT, min(BLOCK_R, 1 << (rank - 1).bit_length()))
    block_c = max(MIN_DOT, min(BLOCK_C, 1 << (num_columns - 1).bit_length()))
    with torch.cuda.device_of(b):
        _grouped_outer[(num_matrices * num_blocks(rank, block_r) * num_blocks(num_columns, block_c),)](
            a, b, gain, out, ends,
            num_columns, rank, factor, a.stride(0), *b.stride(), *out.stride(),
            HAS_GAIN=gain is not None, BLOCK_S=BLOCK_S[b.dtype.itemsize], BLOCK_R=block_r, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip
    return out
