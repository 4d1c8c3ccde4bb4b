"""What the kernels share: sizes and order of the tiles, registration as operators, the low-rank branch of a tile."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

# (rows, columns, inner) of a tile. 128 x 128 x 32 with 8 warps keeps an fp32 accumulator of 64 registers per thread,
# and takes 96 of the 99 KiB of shared memory that a block has on an RTX 40, at rank 64. fp32 products run on the
# ordinary units, and keep operands in registers too: with two stages 64 x 64 x 16 spills on sm_90.
TILES_HALF = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}
TILES_SINGLE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 3}
MIN_DOT = 16  # the smallest inner size of a product of tiles


def tiles(dtype: torch.dtype) -> dict[str, int]:
    """The tile sizes and launch options of a product with operands of this dtype."""
    return TILES_HALF if dtype.itemsize < 4 else TILES_SINGLE


def rank_block(rank: int, dtype: torch.dtype) -> int:
    """How many of the R ranks one step processes: a power of two from 16 to 64 (16 in fp32)."""
    return max(MIN_DOT, min(64 if dtype.itemsize < 4 else MIN_DOT, 1 << (rank - 1).bit_length()))


def num_blocks(size: int, block: int) -> int:
    """Divides, and rounds up. `triton.cdiv` takes a microsecond or more outside of a kernel, 12 times a step."""
    return -(-size // block)


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Returns a decorator that makes a function a single operator to torch.compile.

    Outside torch.compile the function is called directly: an operator defined in Python costs ten microseconds more per
    call. The decorated function has `register_fake`, as torch.library.custom_op gives it.

    Args:
        name: The name of the operator, "dora_mm::...".
    """

    def decorate(function: Callable[..., Any]) -> Any:
        defined = torch.library.custom_op(name, function, mutates_args=())

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            return defined(*args) if torch.compiler.is_compiling() else function(*args)

        call.register_fake = defined.register_fake  # type: ignore[attr-defined]
        return call

    return decorate


@triton.jit
def tile_order(pid, num_m, num_n, GROUP: tl.constexpr):
    """The (row, column) of a program's tile: GROUP rows of tiles at a time, whose operands stay in the L2 cache."""
    per_group = GROUP * num_n
    first = (pid // per_group) * GROUP
    rows = min(num_m - first, GROUP)
    return first + (pid % per_group) % rows, (pid % per_group) // rows


@triton.jit
def add_low_rank(acc, h, B, rows, columns, M, N, R, stride_h, stride_bn, stride_br, BLOCK_R: tl.constexpr):
    """Returns acc + h B^T for the tile of h (M, R) and B (N, R) at `rows` and `columns`; B is rounded to h's dtype."""
    is_row, is_column = rows < M, columns < N
    for first in range(0, R, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        is_r = r < R
        a = tl.load(h + rows[:, None] * stride_h + r[None, :], mask=is_row[:, None] & is_r[None, :], other=0.0)
        b = tl.load(
            B + columns[None, :] * stride_bn + r[:, None].to(tl.int64) * stride_br,
            mask=is_r[:, None] & is_column[None, :],
            other=0.0,
        ).to(a.dtype)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc
