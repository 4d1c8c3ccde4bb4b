"""What every kernel shares: which precision a product of two tiles runs in, and the grids."""

import torch
import triton
import triton.language as tl

# (rows, columns, inner) of a tile. 128 x 128 x 32 with 8 warps keeps an fp32 accumulator of 64 registers a thread. fp32
# products run on the ordinary units, which hold operands in registers too: 64 x 64 x 32 with 4 warps spills on sm_80.
TILES_HALF = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}
TILES_SINGLE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2}
MIN_DOT = 16  # the smallest inner size of a product of tiles


def tiles(dtype: torch.dtype) -> dict[str, int]:
    return TILES_HALF if dtype.itemsize < 4 else TILES_SINGLE


def rank_block(rank: int, dtype: torch.dtype) -> int:
    """How many columns of A and B one step takes: a power of two, at least 16 and at most 64."""
    return max(MIN_DOT, min(64 if dtype.itemsize < 4 else MIN_DOT, triton.next_power_of_2(rank)))


@triton.jit
def tile_order(pid, num_m, num_n, GROUP: tl.constexpr):
    """The tile of a program: GROUP rows of tiles at a time, so that their operands stay in the second-level cache."""
    per_group = GROUP * num_n
    first = (pid // per_group) * GROUP
    rows = min(num_m - first, GROUP)
    return first + (pid % per_group) % rows, (pid % per_group) // rows
