"""The gradient of the magnitudes of a stack: dm, the sums of dY (x V^T) / n over the rows of each matrix.

x V^T / n is y / m. Where the gain is small, or y was not kept, a program computes x V^T again for its rows and columns;
whether it does is decided on the GPU, as in `output_grad`. Where all gains are safe, it reads neither x nor W0.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# (a kernel is launched with arguments that its signature does not have)

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_mm.core.functional import SMALL_GAIN
from dora_mm.kernels.common import add_low_rank, num_blocks, rank_block
from dora_mm.kernels.groups import rows_of

BLOCK_S, BLOCK_O = 32, 64
BLOCK_I = {2: 32, 4: 16}  # by bytes of an entry: products in fp32 keep their operands in registers


@triton.jit
def _grouped_dots(
    dY, y, x, W0, h, B, magnitude, norm, gain, dm, ends,  # (S, O), (S, O), (S, I), (E, O, I), (S, P), .., (E, O) x 4
    num_out, num_in, rank, num_h, scaling, small_gain,
    stride_d, stride_do, stride_y, stride_yo, stride_x, stride_xi, stride_we, stride_w, stride_wi, stride_h,
    stride_be, stride_b, stride_br,
    HAS_BRANCH: tl.constexpr, HAS_OUTPUT: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(num_out, BLOCK_O)
    matrix = (tl.program_id(0) // across).to(tl.int64)
    columns = ((tl.program_id(0) % across) * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    is_column = columns < num_out
    begin, end = rows_of(matrix, ends)
    n = tl.load(norm + matrix * num_out + columns, mask=is_column, other=0.0)
    g = tl.load(gain + matrix * num_out + columns, mask=is_column, other=0.0)
    m = tl.load(magnitude + matrix * num_out + columns, mask=is_column, other=0.0)
    is_safe = n == 0.0
    total = tl.zeros([BLOCK_O], dtype=tl.float32)
    if HAS_OUTPUT:
        is_safe = is_safe | (tl.abs(g) > small_gain)
        dot = tl.zeros([BLOCK_S, BLOCK_O], dtype=tl.float32)  # added up once, after the loop
        for start in range(begin, end, BLOCK_S):
            rows = start + tl.arange(0, BLOCK_S)
            mask = (rows < end)[:, None] & is_column[None, :]
            d = tl.load(dY + rows[:, None] * stride_d + columns[None, :] * stride_do, mask=mask, other=0.0)
            z = tl.load(y + rows[:, None] * stride_y + columns[None, :] * stride_yo, mask=mask, other=0.0)
            dot += d.to(tl.float32) * z.to(tl.float32)
        total = tl.div_rn(tl.sum(dot, 0), tl.where(m == 0.0, 1.0, m))
    is_unsafe = is_column & (is_safe == 0)
    if tl.max(is_unsafe.to(tl.int32), 0) > 0:
        again = tl.zeros([BLOCK_S, BLOCK_O], dtype=tl.float32)
        for start in range(begin, end, BLOCK_S):
            rows = start + tl.arange(0, BLOCK_S)
            is_row = rows < end
            inner = tl.zeros([BLOCK_S, BLOCK_O], dtype=tl.float32)
            for k in range(0, num_in, BLOCK_I):
                features = (k + tl.arange(0, BLOCK_I)).to(tl.int64)
                is_feature = features < num_in
                a = tl.load(
                    x + rows[:, None] * stride_x + features[None, :] * stride_xi,
                    mask=is_row[:, None] & is_feature[None, :],
                    other=0.0,
                )
                w = tl.load(
                    W0 + matrix * stride_we + columns[None, :] * stride_w + features[:, None] * stride_wi,
                    mask=is_feature[:, None] & is_column[None, :],
                    other=0.0,
                )
                inner = tl.dot(a, w.to(a.dtype), inner, input_precision="ieee")
            if HAS_BRANCH:
                inner = add_low_rank(
                    inner, h, B + matrix * stride_be, scaling, rows, columns, end, num_out, rank, num_h, stride_h,
                    stride_b, stride_br, BLOCK_R,
                )  # fmt: skip
            mask = is_row[:, None] & is_column[None, :]
            d = tl.load(dY + rows[:, None] * stride_d + columns[None, :] * stride_do, mask=mask, other=0.0)
            again += d.to(tl.float32) * inner
        total = tl.where(is_safe, total, tl.div_rn(tl.sum(again, 0), tl.where(n == 0.0, 1.0, n)))
    tl.store(dm + matrix * num_out + columns, tl.where(n == 0.0, 0.0, total), mask=is_column)


def grouped_dots(
    dY: Tensor,
    y: Tensor | None,
    x: Tensor,
    W0: Tensor,
    h: Tensor | None,
    B: Tensor | None,
    magnitude: Tensor,
    norm: Tensor,
    gain: Tensor,
    scaling: float,
    ends: Tensor,
) -> Tensor:
    """Computes dm.

    Args:
        dY: dY (S, O), in any layout.
        y: y (S, O), in any layout, or None where it was not kept.
        x: x (S, I), of the dtype of dY, in any layout.
        W0: W0 (E, O, I), in any layout and floating dtype; rounded to the dtype of x in the kernel.
        h: h (S, R or more), of the dtype of x, its rows contiguous and zeros from R on, or None.
        B: B (E, O, R) in fp32, or None.
        magnitude: m (E, O) in fp32.
        norm: n (E, O) in fp32, contiguous.
        gain: g (E, O) in fp32, contiguous.
        scaling: s.
        ends: The end of the rows of each matrix (E,), integers that ascend to S.

    Returns:
        dm (E, O) in fp32; 0 where n is 0, and for a matrix without rows.
    """
    num_matrices, num_out, num_in = W0.shape
    dm, rank = torch.empty_like(norm), 0 if B is None else B.shape[2]
    with torch.cuda.device_of(dY):
        _grouped_dots[(num_matrices * num_blocks(num_out, BLOCK_O),)](
            dY, y, x, W0, h, B, magnitude.contiguous(), norm, gain, dm, ends,
            num_out, num_in, rank, 0 if h is None else h.shape[1], scaling, SMALL_GAIN,
            *dY.stride(), *((0, 0) if y is None else y.stride()), *x.stride(), *W0.stride(),
            0 if h is None else h.stride(0), *((0, 0, 0) if B is None else B.stride()),
            HAS_BRANCH=rank > 0, HAS_OUTPUT=y is not None,
            BLOCK_S=BLOCK_S, BLOCK_O=BLOCK_O, BLOCK_I=BLOCK_I[dY.dtype.itemsize],
            BLOCK_R=rank_block(max(rank, 1), dY), num_warps=4,
        )  # fmt: skip
    return dm
