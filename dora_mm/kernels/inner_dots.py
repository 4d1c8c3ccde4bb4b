# pyright: reportArgumentType=false, reportCallIssue=false
# (a kernel is launched with arguments that its signature does not have)

"""sum over tokens of dY * (x V^T) for a few chosen output rows, V = W0 + s B A: dm where y cannot give it.

Which rows those are is known on the GPU alone. A program per row returns at once where its row is not chosen, so that
nobody waits for the answer, and CUDA graphs and compiled graphs can hold it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_mm.kernels.common import operator

BLOCK_T, BLOCK_I = 32, 128


@triton.jit
def _inner_dots(
    dY, x, W0, A, B, chosen, dots,  # (T, O), (T, I), (O, I), (R, I), (O, R), (O,) twice
    num_tokens, num_in, rank, scaling,
    stride_d, stride_do, stride_x, stride_xi, stride_w, stride_wi, stride_a, stride_b,
    HAS_LOW: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if tl.load(chosen + row) == 0:
        tl.store(dots + row, 0.0)
        return
    total = tl.zeros([BLOCK_I], dtype=tl.float32)
    for start in range(0, num_in, BLOCK_I):
        columns = (start + tl.arange(0, BLOCK_I)).to(tl.int64)
        is_column = columns < num_in
        seen = tl.zeros([BLOCK_I], dtype=tl.float32)  # sum over tokens of dY x
        for first in range(0, num_tokens, BLOCK_T):
            tokens = (first + tl.arange(0, BLOCK_T)).to(tl.int64)
            is_token = tokens < num_tokens
            d = tl.load(dY + tokens * stride_d + row * stride_do, mask=is_token, other=0.0).to(tl.float32)
            where = tokens[:, None] * stride_x + columns[None, :] * stride_xi
            values = tl.load(x + where, mask=is_token[:, None] & is_column[None, :], other=0.0).to(tl.float32)
            seen += tl.sum(d[:, None] * values, 0)
        v = tl.load(W0 + row * stride_w + columns * stride_wi, mask=is_column, other=0.0).to(tl.float32)
        if HAS_LOW:
            for k in range(0, rank):
                b = tl.load(B + row * stride_b + k) * scaling
                v += b * tl.load(A + k * stride_a + columns, mask=is_column, other=0.0)
        total += seen * v
    tl.store(dots + row, tl.sum(total, 0))


@operator("dora_mm::inner_dots")
def inner_dots(
    dY: Tensor, x: Tensor, W0: Tensor, A: Tensor | None, B: Tensor | None, scaling: float, chosen: Tensor
) -> Tensor:
    """(O,) in fp32, 0 where `chosen` (O,) is False. dY (T, O), x (T, I), fp32 A (R, I) and B (O, R), contiguous."""
    num_out, num_in = W0.shape
    dots = torch.empty(num_out, dtype=torch.float32, device=W0.device)
    rank = 0 if A is None else A.shape[0]
    with torch.cuda.device_of(W0):
        _inner_dots[(num_out,)](
            dY, x, W0, A, B, chosen.to(torch.int8), dots,
            x.shape[0], num_in, rank, scaling,
            dY.stride(0), dY.stride(1), x.stride(0), x.stride(1), W0.stride(0), W0.stride(1),
            num_in, rank,
            HAS_LOW=rank > 0, BLOCK_T=BLOCK_T, BLOCK_I=BLOCK_I, num_warps=4,
        )  # fmt: skip
    return dots


@inner_dots.register_fake
def _(dY, x, W0, A, B, scaling, chosen):
    return W0.new_empty(W0.shape[0], dtype=torch.float32)
