"""Shared code of the kernels: registration as operators, the vendor's product, tile order, the low-rank branch."""

# pyright: reportGeneralTypeIssues=false
# (tl.range is not iterable outside of a kernel)

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_mm.kernels.gpus import gpu, has_float_output

MIN_DOT = 16  # the smallest inner size of a product of tiles


def padded_rank(rank: int) -> int:
    """The rank that operands in half precision are filled up to with zeros: a multiple of 16.

    Rows of h and u then begin at multiples of 32 bytes. A rank of 4 or 8 alone leads to loads of 8 or 16 bytes, which
    take so many more registers that only one block fits on a multiprocessor.
    """
    return num_blocks(rank, MIN_DOT) * MIN_DOT


def rank_block(rank: int, t: Tensor) -> int:
    """How many of the R ranks one step processes: 16 or 32 (16 in fp32, and on GPUs of AMD)."""
    most = gpu(t).max_rank_block if t.dtype.itemsize < 4 else MIN_DOT
    return max(MIN_DOT, min(most, 1 << (rank - 1).bit_length()))


def num_blocks(size: int, block: int) -> int:
    """Divides, and rounds up. `triton.cdiv` takes a microsecond or more outside of a kernel, 12 times a step."""
    return -(-size // block)


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Returns a decorator that makes a function a single operator to torch.compile.

    Outside torch.compile the function is called directly: an operator defined in Python costs ten microseconds more per
    call. The decorated function has `register_fake`, as torch.library.custom_op gives it. Gradients do not flow.

    Args:
        name: The name of the operator, "dora_mm::...".
    """

    def decorate(function: Callable[..., Any]) -> Any:
        defined = torch.library.custom_op(name, function, mutates_args=())

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            if not torch.compiler.is_compiling():
                return function(*args)
            return defined(*[a.detach() if isinstance(a, Tensor) else a for a in args])

        call.register_fake = defined.register_fake  # type: ignore[attr-defined]
        return call

    return decorate


@operator("dora_mm::float_product")
def float_product(a: Tensor, b: Tensor) -> Tensor:
    """Returns the product of two matrices of one dtype by the vendor's library, in fp32.

    Where the library has no such product, its result in half precision is cast.
    """
    if a.dtype == torch.float32:
        return a @ b
    if not a.is_cuda:  # the kernels run in the interpreter, and CPU libraries have no such product
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32) if has_float_output(a) else (a @ b).float()


@float_product.register_fake
def _(a, b):
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)


@triton.jit
def tile_order(pid, num_m, num_n, GROUP: tl.constexpr):
    """The (row, column) of a program's tile: GROUP rows of tiles at a time, whose operands stay in the L2 cache."""
    per_group = GROUP * num_n
    first = (pid // per_group) * GROUP
    rows = min(num_m - first, GROUP)
    return first + (pid % per_group) % rows, (pid % per_group) // rows


@triton.jit
def add_low_rank(
    acc, h, B, scaling, rows, columns, M, N, R, num_h, stride_h, stride_bn, stride_br, BLOCK_R: tl.constexpr
):
    """Returns acc + h (s B)^T for the tile of h (M, num_h) and B (N, R) at `rows` and `columns`.

    s B is rounded to h's dtype. Of the columns of h those from R on are zeros.
    """
    is_row, is_column = rows < M, columns < N
    for first in tl.range(0, R, BLOCK_R, num_stages=1):  # short: to prefetch it would take shared memory and registers
        r = first + tl.arange(0, BLOCK_R)
        a = tl.load(h + rows[:, None] * stride_h + r[None, :], mask=is_row[:, None] & (r < num_h)[None, :], other=0.0)
        b = tl.load(
            B + columns[None, :] * stride_bn + r[:, None].to(tl.int64) * stride_br,
            mask=(r < R)[:, None] & is_column[None, :],
            other=0.0,
        )
        acc = tl.dot(a, (b * scaling).to(a.dtype), acc, input_precision="ieee")
    return acc
