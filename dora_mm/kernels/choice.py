"""Which product runs in the split form: one kernel of ours (low_rank_matmul), or the vendor's and one pass over it.

The vendor's library multiplies faster than Triton does, but what it returns has to stay in fp32 until gain, branch and
bias are in it, and low_rank_add then reads it once more: 10 bytes of traffic an entry of y where one kernel of ours
writes 2. That costs the same whatever the inner size, and what it saves grows with it.
"""

import torch
from torch import Tensor

# The smallest inner size for which the vendor's product is taken, by bytes of an operand. Counted for an H100 and not
# measured yet (tests/benchmarks/bench_products.py does): 8 bytes more at 3 TB/s are 2.7 ps an entry; at 650 TFLOP/s
# for the vendor's bf16 and 400 for ours, each multiplication saves 1.9 fs of that, so they meet at 1,400. In fp32 both
# run on the ordinary units, and the vendor's follows torch's TF32 setting as the base layer does.
VENDOR_FROM = {2: 1408, 4: 0}
HAS_FLOAT_OUTPUT = "dtype" in torch.ops.aten.mm.overloads()  # torch.mm(..., out_dtype=), from torch 2.8


def vendor_is_faster(inner_size: int, dtype: torch.dtype) -> bool:
    if torch.compiler.is_compiling() or (dtype.itemsize < 4 and not HAS_FLOAT_OUTPUT):
        return False
    return inner_size >= VENDOR_FROM[dtype.itemsize]


def vendor_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32, for matrices of one dtype."""
    if a.dtype == torch.float32:
        return a @ b
    if not a.is_cuda:  # the kernels' interpreter: a processor's library has no such product
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)
