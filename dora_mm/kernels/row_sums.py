"""Sums over tokens of dY (y - b) and (y - b)^2: dm without a tensor of the output's size."""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a kernel is launched with arguments that its signature does not have)

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_mm.kernels.common import num_blocks, operator

# A program sums 64 columns of a slab of tokens, 32 tokens at a time: 1,024 tokens of 1,280 columns are 80 programs. The
# slabs are added up afterwards, in a fixed order.
BLOCK_T, BLOCK_O, SLAB = 32, 64, 256


@triton.jit
def _row_sums(
    dY, y, bias, dots, squares,  # (T, O), (T, O), (O,), (slabs, O) twice
    num_tokens, num_out, stride_d, stride_do, stride_y, stride_yo,
    HAS_BIAS: tl.constexpr, SLAB: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    is_column = columns < num_out
    slab = tl.program_id(1).to(tl.int64)
    b = tl.zeros([BLOCK_O], dtype=tl.float32)
    if HAS_BIAS:
        b = tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)
    dot = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)  # added up once, after the loop
    square = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    for start in range(0, SLAB, BLOCK_T):
        rows = slab * SLAB + start + tl.arange(0, BLOCK_T)
        mask = (rows < num_tokens)[:, None] & is_column[None, :]
        d = tl.load(dY + rows[:, None] * stride_d + columns[None, :].to(tl.int64) * stride_do, mask=mask, other=0.0)
        z = tl.load(y + rows[:, None] * stride_y + columns[None, :].to(tl.int64) * stride_yo, mask=mask, other=0.0)
        inner = tl.where(mask, z.to(tl.float32) - b[None, :], 0.0)
        dot += d.to(tl.float32) * inner
        square += inner * inner
    tl.store(dots + slab * num_out + columns, tl.sum(dot, 0), mask=is_column)
    tl.store(squares + slab * num_out + columns, tl.sum(square, 0), mask=is_column)


@operator("dora_mm::row_sums")
def row_sums(dY: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """Sums dY (y - b) and (y - b)^2 over tokens.

    Args:
        dY: dY (T, O), in any layout.
        y: y (T, O), in any layout.
        bias: b (O,), or None for 0.

    Returns:
        The two sums, (2, O) in fp32.
    """
    num_tokens, num_out = y.shape
    slabs = num_blocks(num_tokens, SLAB)
    sums = torch.empty(2, slabs, num_out, dtype=torch.float32, device=y.device)
    if slabs:
        dots, squares = sums.unbind()
        with torch.cuda.device_of(y):
            _row_sums[(num_blocks(num_out, BLOCK_O), slabs)](
                dY, y, bias, dots, squares,
                num_tokens, num_out, *dY.stride(), *y.stride(),
                HAS_BIAS=bias is not None, SLAB=SLAB, BLOCK_T=BLOCK_T, BLOCK_O=BLOCK_O, num_warps=4,
            )  # fmt: skip
    return sums.sum(1)


@row_sums.register_fake
def _(dY, y, bias):
    return y.new_empty(2, y.shape[1], dtype=torch.float32)
