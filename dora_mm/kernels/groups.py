"""The rows of a stack of matrices: which matrix a program computes with, found on the device without a wait."""

import triton
import triton.language as tl


@triton.jit
def rows_of(matrix, ends):
    """The first row of a matrix, and the row after its last."""
    return tl.load(ends + matrix - 1, mask=matrix > 0, other=0).to(tl.int64), tl.load(ends + matrix).to(tl.int64)


@triton.jit
def tile_of_rows(index, ends, number, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """The matrix (`number`: none), the first row and the row after the last of the tile with this index.

    Tiles begin at the first row of each matrix, so that none has rows of two.
    """
    each = tl.arange(0, BLOCK_E)
    last = tl.load(ends + each, mask=each < number, other=0)
    first = tl.load(ends + each - 1, mask=(each > 0) & (each < number), other=0)
    tiles = (last - first + BLOCK_M - 1) // BLOCK_M
    until = tl.cumsum(tiles, 0)
    matrix = tl.sum(((until <= index) & (each < number)).to(tl.int32), 0)
    is_own = each == matrix
    row = tl.sum(tl.where(is_own, first + (index - (until - tiles)) * BLOCK_M, 0), 0)
    return matrix, row.to(tl.int64), tl.sum(tl.where(is_own, last, 0), 0).to(tl.int64)
