"""Products of rows with a stack of matrices, and their low-rank branches: the experts of a mixture, in one launch.

    y = g (x W^T + h (s B)^T)      dX = (g dY) W0 + u A      h = x A^T      u = s (g dY) B

Rows are sorted by matrix. Sums are in fp32, and rounded once. A matrix without rows is not read.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a kernel is launched with arguments that its signature does not have)

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_mm.kernels.common import MIN_DOT, add_low_rank, num_blocks, rank_block, tile_order
from dora_mm.kernels.gpus import ODD, tile
from dora_mm.kernels.groups import tile_of_rows

GROUP = 8  # rows of tiles that share the columns of W in the L2 cache
# With fewer rows per matrix than FEW, reading W takes the time, and a larger tile would multiply by zeros. None of the
# tiles was measured: they are the largest that spill nothing and fit into every GPU of `gpus`.
FEW = 48
TILE_FEW, TILE_MANY, TILE_FLOAT = tile(32, 128, 64, 4, 3), tile(128, 128, 32, 8, 3), tile(64, 64, 16, 4, 2)


@triton.jit
def _grouped_matmul(
    x, W, h, B, gain, y, ends,  # (S, K), (E, N, K), (S, P), (E, N, R), (E, N) or (E, K), (S, Z), (E,)
    num_tiles, num_matrices, Z, N, K, R, num_h, factor, scaling,
    stride_x, stride_xk, stride_we, stride_wn, stride_wk, stride_h, stride_be, stride_bn, stride_br,
    GAIN_OUT: tl.constexpr, GAIN_IN: tl.constexpr, HAS_BRANCH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    index, pid_n = tile_order(tl.program_id(0), num_tiles, tl.cdiv(Z, BLOCK_N), GROUP)
    matrix, first, last = tile_of_rows(index, ends, num_matrices, BLOCK_M, BLOCK_E)
    if matrix >= num_matrices:
        return
    matrix = matrix.to(tl.int64)
    rows = first + tl.arange(0, BLOCK_M)
    columns = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row, is_column = rows < last, columns < N
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if HAS_BRANCH:  # while the accumulator is empty: its operands need registers
        acc = add_low_rank(
            acc, h, B + matrix * stride_be, scaling, rows, columns, last, N, R, num_h, stride_h, stride_bn, stride_br,
            BLOCK_R,
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
            g = tl.load(gain + matrix * K + k, mask=is_k, other=0.0)
            a = (a.to(tl.float32) * g[None, :]).to(a.dtype)
        w = tl.load(
            W + matrix * stride_we + columns[None, :] * stride_wn + k[:, None].to(tl.int64) * stride_wk,
            mask=is_k[:, None] & is_column[None, :],
            other=0.0,
        )
        acc = tl.dot(a, w.to(a.dtype), acc, input_precision="ieee")
    acc *= factor
    if GAIN_OUT:
        acc *= tl.load(gain + matrix * N + columns, mask=is_column, other=0.0)[None, :]
    where = rows[:, None] * Z + columns[None, :]
    tl.store(y + where, acc.to(y.dtype.element_ty), mask=is_row[:, None] & (columns < Z)[None, :])


def grouped_matmul(
    x: Tensor,
    W: Tensor,
    ends: Tensor,
    *,
    gain: Tensor | None = None,
    gain_in: bool = False,
    h: Tensor | None = None,
    B: Tensor | None = None,
    scaling: float = 1.0,
    factor: float = 1.0,
    num_columns: int | None = None,
) -> Tensor:
    """Computes y = f g (x W^T + h (s B)^T), or with `gain_in` y = f ((g x) W^T + h (s B)^T), rounded once.

    Args:
        x: x (S, K), in any layout.
        W: W (E, N, K), in any layout and floating dtype; rounded to the dtype of x in the kernel.
        ends: The end of the rows of each matrix (E,), integers that ascend to S.
        gain: g (E, N), or (E, K) with `gain_in`, in fp32 and contiguous; or None for 1.
        gain_in: Whether g multiplies x, which is then rounded to its dtype once more.
        h: h (S, R or more), of the dtype of x, its rows contiguous and zeros from R on, or None.
        B: B (E, N, R); s B is rounded to the dtype of x in the kernel. Or None.
        scaling: s.
        factor: f.
        num_columns: The columns of y, N or more; those from N on are zeros.

    Returns:
        y (S, N or `num_columns`), contiguous, in the dtype of x.
    """
    (num_rows, K), (num_matrices, N, _) = x.shape, W.shape
    columns = num_columns or N
    y = torch.empty(num_rows, columns, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    chosen = tile_for(x, num_matrices, columns)
    num_tiles = min(num_rows, num_blocks(num_rows, chosen["BLOCK_M"]) + num_matrices)  # at most
    rank = 0 if B is None else B.shape[2]
    with torch.cuda.device_of(x):
        _grouped_matmul[(num_tiles * num_blocks(columns, chosen["BLOCK_N"]),)](
            x, W, h, B, gain, y, ends,
            num_tiles, num_matrices, columns, N, K, rank, 0 if h is None else h.shape[1], factor, scaling,
            *x.stride(), *W.stride(), 0 if h is None else h.stride(0), *((0, 0, 0) if B is None else B.stride()),
            GAIN_OUT=gain is not None and not gain_in, GAIN_IN=gain is not None and gain_in, HAS_BRANCH=rank > 0,
            BLOCK_R=rank_block(max(rank, 1), x), BLOCK_E=1 << (num_matrices - 1).bit_length(), GROUP=GROUP, **chosen,
        )  # fmt: skip
    return y


def tile_for(x: Tensor, num_matrices: int, num_columns: int) -> dict[str, int]:
    """The tile of a launch, see `TILE_FEW`; it is no wider than y."""
    chosen = TILE_FEW if len(x) < FEW * num_matrices else TILE_MANY
    if x.dtype.itemsize >= 4:
        chosen = TILE_FLOAT
    elif x.shape[1] % 16 or num_columns % 16:
        chosen = ODD
    widest = max(MIN_DOT, 1 << (num_columns - 1).bit_length())
    return {**chosen, "BLOCK_N": min(chosen["BLOCK_N"], widest)}
