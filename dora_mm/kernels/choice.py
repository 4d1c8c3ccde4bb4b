"""Which product runs in the unmerged form: our kernel (low_rank_matmul), or the vendor's product and a second pass.

The vendor's library (cuBLAS) multiplies faster than Triton does, but its result has to stay in fp32 until gain, branch
and bias are applied, and low_rank_add then reads it again: 10 bytes of traffic per entry of y, where our kernel writes
2. In the backward pass the scaled dY is written and read in addition. That costs the same for every inner size, while
the saving grows with it.
"""

import functools

import torch
from torch import Tensor

# The smallest inner size for which the vendor's product is used, by bytes per entry of an operand. Calculated for an
# H100 and not measured yet (tests/benchmarks/bench_products.py does): 8 more bytes at 3 TB/s are 2.7 ps per entry, 12
# bytes 4 ps; at 650 TFLOP/s for the vendor's bf16 and 400 for ours, each multiplication saves 1.9 fs of that. In fp32
# both run on the ordinary units, unless torch's TF32 setting lets the vendor's use tensor cores, as in the base layer.
VENDOR_FROM = {2: 1408, 4: 0}
VENDOR_FROM_BACK = {2: 2048, 4: 0}


def vendor_is_faster(inner_size: int, dtype: torch.dtype, *, back: bool = False) -> bool:
    """Whether the vendor's product and a second pass take less time than our kernel.

    Args:
        inner_size: The size over which the product sums: I in the forward pass, O in the backward pass.
        dtype: The dtype of the operands.
        back: Whether the product is that of the backward pass.
    """
    table = VENDOR_FROM_BACK if back else VENDOR_FROM
    if inner_size < table[dtype.itemsize]:
        return False
    return dtype == torch.float32 or (not torch.compiler.is_compiling() and has_float_output(dtype))


@functools.cache
def has_float_output(dtype: torch.dtype) -> bool:
    """Whether torch.mm(..., out_dtype=torch.float32) works, which needs torch 2.8 and not every device supports."""
    if not torch.cuda.is_available():
        return False
    one = torch.full((16, 256), 1 + 2.0**-7, dtype=dtype, device="cuda")
    try:
        found = torch.mm(one, one.T, out_dtype=torch.float32)
    except (TypeError, RuntimeError):  # the argument or the product does not exist
        return False
    return bool((found == 256 * (1 + 2.0**-7) ** 2).all())


def vendor_product(a: Tensor, b: Tensor) -> Tensor:
    """Returns the product of two matrices of one dtype, in fp32."""
    if a.dtype == torch.float32:
        return a @ b
    if not a.is_cuda:  # the kernels run in the interpreter, and CPU libraries have no such product
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)
