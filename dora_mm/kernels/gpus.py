"""Choices per GPU: the tiles of our kernel, and the inner size from which the vendor's product is faster.

The vendor's library (cuBLAS, hipBLAS) multiplies faster than Triton does, but its result has to stay in fp32 until
gain, branch and bias are applied, and low_rank_add then reads it again: 10 bytes of traffic per entry of y, where our
kernel writes 2. In the backward pass g dY is written and read in addition. That costs the same for every inner size,
while the saving grows with it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class GPU(NamedTuple):
    """The choices for one kind of card.

    Attributes:
        tile: Options of a launch of low_rank_matmul in the forward pass.
        tile_back: The same in the backward pass.
        vendor_from: The smallest inner size for which the vendor's product and a pass are faster, in half precision.
        vendor_from_back: The same in the backward pass.
        max_rank_block: How many ranks one step of a branch processes at most.
    """

    tile: dict[str, int]
    tile_back: dict[str, int]
    vendor_from: int
    vendor_from_back: int
    max_rank_block: int = 32


def tile(rows: int, columns: int, inner: int, num_warps: int, num_stages: int) -> dict[str, int]:
    """The options of a launch by name."""
    return {
        "BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": inner, "num_warps": num_warps, "num_stages": num_stages,
    }  # fmt: skip


# By compute capability; a GPU takes the entry at or below its own. None of them was measured here. Tiles of 8.0, 8.6
# and 9.0: those that LoRAFusion (arXiv 2510.00206) found best for the same product on A100, RTX 3090 and H100. The
# others are the largest with which the product spills nothing, and that fit into the card's shared memory
# (tests/kernels/compile_ahead.py).
#
# The inner sizes follow from the bytes a second and the operations a second of either product. H100: 8 more bytes per
# entry at 3 TB/s are 2.7 ps, 12 bytes 4 ps; at 650 TFLOP/s for the vendor's bf16 and 400 for ours, each multiplication
# saves 1.9 fs of that. A100 (2 TB/s; 270 and 240 TFLOP/s): 4 and 6 ps against 0.9 fs. RTX 3090 and 4090 (1 TB/s; 155
# and 135 TFLOP/s on the latter): 8 and 12 ps against 1.9 fs.
GPUS = {
    (8, 0): GPU(tile(128, 128, 32, 4, 4), tile(128, 128, 64, 8, 4), 4096, 6144),
    (8, 6): GPU(tile(64, 128, 32, 4, 4), tile(64, 128, 32, 4, 4), 4096, 6144),
    (9, 0): GPU(tile(128, 256, 64, 8, 4), tile(128, 256, 64, 8, 4), 1408, 2048),
    (10, 0): GPU(tile(128, 256, 64, 8, 3), tile(128, 256, 64, 8, 3), 1408, 2048),
    (12, 0): GPU(tile(64, 128, 32, 4, 4), tile(64, 128, 32, 4, 4), 4096, 6144),
}
# Where a side is no multiple of 16, operands are read in small pieces, whose addresses take registers: a tile of 128 x
# 256 would spill 840 bytes per thread.
ODD = tile(64, 64, 32, 4, 3)
# 64 KiB of local memory per workgroup: with 64 ranks at a time and three stages a tile of 128 x 128 needs 96.
AMD = GPU(tile(128, 128, 32, 8, 2), tile(128, 128, 32, 8, 2), 2048, 3072, max_rank_block=16)

_found: dict[int, GPU] = {-1: GPUS[9, 0]}  # by the index of the device; on a CPU kernels are interpreted


def gpu(t: Tensor) -> GPU:
    """The choices for the device of a tensor; on a CPU those of an H100."""
    index = t.get_device()
    if index not in _found:
        look_at(index)
    return _found[index]


def look_at(index: int) -> None:
    """Finds the choices for a device, which a compiler must not be the first to do."""
    _found[index] = gpu_of(torch.cuda.get_device_capability(index))


def gpu_of(capability: tuple[int, int]) -> GPU:
    """The choices for a compute capability; below 8.0 those of 8.0, since it may share a machine with a newer GPU."""
    if torch.version.hip:
        return AMD
    return GPUS[max((known for known in GPUS if known <= capability), default=(8, 0))]


def vendor_is_faster(t: Tensor, inner_size: int, *, back: bool = False) -> bool:
    """Whether the vendor's product and a second pass take less time than our kernel.

    Args:
        t: An operand, of which device and dtype are read.
        inner_size: The size over which the product sums: I in the forward pass, O in the backward pass.
        back: Whether the product is that of the backward pass.
    """
    if (
        t.dtype.itemsize >= 4
    ):  # both run on the ordinary units, unless torch's TF32 setting lets the vendor's use others
        return True
    chosen = gpu(t)
    return inner_size >= (chosen.vendor_from_back if back else chosen.vendor_from) and has_float_output(t)


# Whether torch.mm(..., out_dtype=torch.float32) works by dtype, which needs torch 2.8 and not every device supports.
_float_output: dict[torch.dtype, bool] = {torch.float32: True}


def has_float_output(t: Tensor) -> bool:
    """Whether products of tensors like this one can be had in fp32. A compiler must not be the first to call this."""
    if not t.is_cuda:
        return True  # see `float_product`
    if t.dtype not in _float_output:
        if torch.compiler.is_compiling():
            return False
        _float_output[t.dtype] = _gives_float(t.dtype, t.device)
    return _float_output[t.dtype]


def _gives_float(dtype: torch.dtype, device: Any) -> bool:
    one = torch.full((16, 256), 1 + 2.0**-7, dtype=dtype, device=device)
    try:
        found = torch.mm(one, one.T, out_dtype=torch.float32)
    except (TypeError, RuntimeError):  # the argument or the product does not exist
        return False
    return bool((found == 256 * (1 + 2.0**-7) ** 2).all())
