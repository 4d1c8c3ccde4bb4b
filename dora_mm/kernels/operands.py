"""A in the dtype of a product, filled up with zeros to a multiple of 16 ranks, and what rounding left of it."""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a kernel is launched with arguments that its signature does not have)

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_mm.kernels.common import num_blocks, operator, padded_rank

BLOCK = 1024
# What is left lies 2^-11 below A in fp16, whose numbers end at 2^-24: it is stored with this factor. bf16 has the range
# of fp32.
REST_FACTOR = {torch.float16: 2.0**11, torch.bfloat16: 1.0}


@triton.jit
def _operands(
    A, parts,  # (R, I), (padded_rank or 2 padded_rank, I)
    num_in, rank, padded_rank, rest_factor, stride_a, stride_ai,
    HAS_REST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(num_in, BLOCK)
    r = (tl.program_id(0) // across).to(tl.int64)
    columns = (tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < num_in
    given = columns < tl.where(r < rank, num_in, 0)
    a = tl.load(A + r * stride_a + columns.to(tl.int64) * stride_ai, mask=given, other=0.0)
    rounded = a.to(parts.dtype.element_ty)
    tl.store(parts + r * num_in + columns, rounded, mask=is_column)
    if HAS_REST:
        rest = (a - rounded.to(tl.float32)) * rest_factor
        tl.store(parts + (padded_rank + r) * num_in + columns, rest.to(parts.dtype.element_ty), mask=is_column)


@operator("dora_mm::operands")
def operands(A: Tensor, dtype: torch.dtype, has_rest: bool) -> Tensor:
    """Rounds A (R, I) in fp32 to half precision.

    Args:
        A: A, in any layout.
        dtype: The dtype of the product.
        has_rest: Whether what rounding left of A is wanted, times REST_FACTOR. The two together have 16 bits of an
            entry of A in bf16, 22 in fp16.

    Returns:
        A, with zeros in the rows from R to the next multiple of 16 (P), and below it the rest, likewise: (P, I), or
        (2 P, I).
    """
    rank, num_in = A.shape
    rows = padded_rank(rank)
    parts = torch.empty((1 + has_rest) * rows, num_in, dtype=dtype, device=A.device)
    with torch.cuda.device_of(A):
        _operands[(rows * num_blocks(num_in, BLOCK),)](
            A, parts,
            num_in, rank, rows, REST_FACTOR[dtype], *A.stride(),
            HAS_REST=has_rest, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return parts


@operands.register_fake
def _(A, dtype, has_rest):
    return A.new_empty((1 + has_rest) * padded_rank(A.shape[0]), A.shape[1], dtype=dtype)
