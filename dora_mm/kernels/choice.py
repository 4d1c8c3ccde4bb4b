"""Which product runs in the split form: one kernel of ours (low_rank_matmul), or the vendor's and a pass beside it.

The vendor's library multiplies faster than Triton does, but what it returns has to stay in fp32 until gain, branch and
bias are in it, and low_rank_add then reads it once more: 10 bytes of traffic an entry of y where one kernel of ours
writes 2. Backward, dY with the gain on it is written and read besides. That costs the same whatever the inner size, and
what it saves grows with it.
"""

import functools

import torch
from torch import Tensor

# The smallest inner size for which the vendor's product is taken, by bytes of an operand. Counted for an H100 and not
# measured yet (tests/benchmarks/bench_products.py does): 8 bytes more at 3 TB/s are 2.7 ps an entry, 12 bytes 4 ps; at
# 650 TFLOP/s for the vendor's bf16 and 400 for ours, each multiplication saves 1.9 fs of that. In fp32 both run on the
# ordinary units, and the vendor's follows torch's TF32 setting as the base layer does.
VENDOR_FROM = {2: 1408, 4: 0}
VENDOR_FROM_BACK = {2: 2048, 4: 0}


def vendor_is_faster(inner_size: int, dtype: torch.dtype, *, back: bool = False) -> bool:
    table = VENDOR_FROM_BACK if back else VENDOR_FROM
    if inner_size < table[dtype.itemsize]:
        return False
    return dtype == torch.float32 or (not torch.compiler.is_compiling() and has_float_output(dtype))


@functools.cache
def has_float_output(dtype: torch.dtype) -> bool:
    """Whether torch.mm(..., out_dtype=torch.float32) works: from torch 2.8, and not on every device."""
    if not torch.cuda.is_available():
        return False
    one = torch.full((16, 256), 1 + 2.0**-7, dtype=dtype, device="cuda")
    try:
        found = torch.mm(one, one.T, out_dtype=torch.float32)
    except (TypeError, RuntimeError):  # there is no such argument, or no such product
        return False
    return bool((found == 256 * (1 + 2.0**-7) ** 2).all())


def vendor_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32, for matrices of one dtype."""
    if a.dtype == torch.float32:
        return a @ b
    if not a.is_cuda:  # the kernels' interpreter: a processor's library has no such product
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)
