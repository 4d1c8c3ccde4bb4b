"""The backward kernel that reads dY once: it computes g dY, the sums over tokens for dm, and B' = g s B.

dm is the sum of dY (x V^T) / n, and x V^T / n is (y - b) / m. Where that is not safe, x V^T is computed again, for the
tokens and rows of a program: where the gain is small, where b is much larger than y - b, and where y was not kept.
Which rows those are is known only on the GPU: so the CPU does not wait for an answer, and the kernel can be part of
CUDA graphs and compiled graphs. Where all rows are safe, a program reads neither x nor W0. Without x and W0, y is the
output that n belongs to (of a base layer, say), and dm the sum of dY (y - b) / n.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a kernel is launched with arguments that its signature does not have)

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_mm.core.functional import SMALL_GAIN
from dora_mm.core.magnitude import large_bias
from dora_mm.kernels.common import MIN_DOT, add_low_rank, num_blocks, operator, rank_block

# A program has 64 columns of a slab of tokens, 32 tokens at a time: 1,024 tokens of 1,280 columns are 80 programs. The
# slabs are added up afterwards, in a fixed order. x V^T is computed for 32 tokens at a time: 64 would take so many
# registers that fewer programs run at once, in those that never compute it, too.
BLOCK_T, BLOCK_O, SLAB, BLOCK_X = 32, 64, 256, 32
BLOCK_I = {2: 32, 4: 16}  # by bytes of an entry: products in fp32 keep their operands in registers


@triton.jit
def _output_grad(
    dY, y, x, W0, h, B, bias, magnitude, norm, gain,  # (T, O), (T, O), (T, I), (O, I), (T, P), (O, R), (O,) four times
    scaled, dots, operand,  # (T, O), (slabs, O), (O, P)
    num_tokens, num_out, num_in, rank, padded_rank, scaling, small_gain, large_bias,
    stride_d, stride_do, stride_y, stride_yo, stride_x, stride_xi, stride_w, stride_wi, stride_h, stride_b, stride_br,
    HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_OUTPUT: tl.constexpr,
    WANTS_SCALED: tl.constexpr, WANTS_DOTS: tl.constexpr, RECOMPUTES: tl.constexpr,
    SLAB: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr, MIN_R: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(num_out, BLOCK_O)
    slab = (tl.program_id(0) // across).to(tl.int64)
    first = slab * SLAB
    columns = ((tl.program_id(0) % across) * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    is_column = columns < num_out
    g = tl.full([BLOCK_O], 1.0, dtype=tl.float32)
    if HAS_GAIN:
        g = tl.load(gain + columns, mask=is_column, other=0.0)
    if HAS_BRANCH:  # the first slab's programs write B'
        for start in range(0, tl.where(first == 0, padded_rank, 0), MIN_R):
            r = start + tl.arange(0, MIN_R)
            where = columns[:, None] * stride_b + r[None, :] * stride_br
            b = tl.load(B + where, mask=is_column[:, None] & (r < rank)[None, :], other=0.0)
            b = (b * (scaling * g)[:, None]).to(operand.dtype.element_ty)
            mask = is_column[:, None] & (r < padded_rank)[None, :]
            tl.store(operand + columns[:, None] * padded_rank + r[None, :], b, mask=mask)
    dot = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)  # added up once, after the loop
    square = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    offset = tl.zeros([BLOCK_O], dtype=tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)
    if WANTS_SCALED or (WANTS_DOTS and HAS_OUTPUT):
        for start in range(0, SLAB, BLOCK_T):
            rows = first + start + tl.arange(0, BLOCK_T)
            mask = (rows < num_tokens)[:, None] & is_column[None, :]
            d = tl.load(dY + rows[:, None] * stride_d + columns[None, :] * stride_do, mask=mask, other=0.0)
            if WANTS_SCALED:
                value = (d.to(tl.float32) * g[None, :]).to(scaled.dtype.element_ty)
                tl.store(scaled + rows[:, None] * num_out + columns[None, :], value, mask=mask)
            if WANTS_DOTS and HAS_OUTPUT:
                z = tl.load(y + rows[:, None] * stride_y + columns[None, :] * stride_yo, mask=mask, other=0.0)
                inner = tl.where(mask, z.to(tl.float32) - offset[None, :], 0.0)
                dot += d.to(tl.float32) * inner
                if HAS_BIAS and RECOMPUTES:
                    square += inner * inner
    if WANTS_DOTS:
        n = tl.load(norm + columns, mask=is_column, other=0.0)
        is_safe = n == 0.0
        total = tl.zeros([BLOCK_O], dtype=tl.float32)
        if HAS_OUTPUT:
            is_regular = tl.abs(g) > small_gain if RECOMPUTES else n != 0.0
            if HAS_BIAS and RECOMPUTES:
                rms = tl.sqrt(tl.sum(square, 0) / tl.minimum(num_tokens - first, SLAB).to(tl.float32))
                is_regular = is_regular & (tl.abs(offset) <= large_bias * rms)
            m = tl.load(magnitude + columns, mask=is_column, other=1.0) if RECOMPUTES else n
            total = tl.where(is_regular, tl.div_rn(tl.sum(dot, 0), tl.where(is_regular, m, 1.0)), 0.0)
            is_safe = is_safe | is_regular
        if RECOMPUTES:  # noqa: SIM102 -- the compiler leaves the inner one out only where it stands alone
            if tl.min(is_safe.to(tl.int32), 0) == 0:
                again = tl.zeros([BLOCK_X, BLOCK_O], dtype=tl.float32)
                for start in range(0, SLAB, BLOCK_X):
                    rows = first + start + tl.arange(0, BLOCK_X)
                    is_row = rows < num_tokens
                    inner = tl.zeros([BLOCK_X, BLOCK_O], dtype=tl.float32)
                    for k in range(0, num_in, BLOCK_I):
                        features = (k + tl.arange(0, BLOCK_I)).to(tl.int64)
                        is_feature = features < num_in
                        a = tl.load(
                            x + rows[:, None] * stride_x + features[None, :] * stride_xi,
                            mask=is_row[:, None] & is_feature[None, :],
                            other=0.0,
                        )
                        w = tl.load(
                            W0 + columns[None, :] * stride_w + features[:, None] * stride_wi,
                            mask=is_feature[:, None] & is_column[None, :],
                            other=0.0,
                        )
                        inner = tl.dot(a, w, inner, input_precision="ieee")
                    if HAS_BRANCH:
                        inner = add_low_rank(
                            inner, h, B, scaling, rows, columns, num_tokens, num_out, rank, padded_rank, stride_h,
                            stride_b, stride_br, BLOCK_R,
                        )  # fmt: skip
                    where = rows[:, None] * stride_d + columns[None, :] * stride_do
                    d = tl.load(dY + where, mask=is_row[:, None] & is_column[None, :], other=0.0)
                    again += d.to(tl.float32) * inner
                total = tl.where(is_safe, total, tl.div_rn(tl.sum(again, 0), tl.where(n == 0.0, 1.0, n)))
        tl.store(dots + slab * num_out + columns, tl.where(n == 0.0, 0.0, total), mask=is_column)


@operator("dora_mm::output_grad")
def output_grad(
    dY: Tensor,
    y: Tensor | None,
    x: Tensor | None,
    W0: Tensor | None,
    h: Tensor | None,
    B: Tensor | None,
    bias: Tensor | None,
    magnitude: Tensor | None,
    norm: Tensor | None,
    gain: Tensor | None,
    scaling: float,
    wants_scaled: bool,
    wants_dots: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reads dY once.

    Args:
        dY: dY (T, O), in any layout.
        y: y (T, O), in any layout, or None where it was not kept.
        x: x (T, I), of the dtype of dY, in any layout, or None (then without W0).
        W0: W0 (O, I), likewise.
        h: h (T, R or more), its rows contiguous and zeros from R on, or None; where x is given, of the dtype of dY.
        B: B (O, R) in fp32, or None.
        bias: b (O,), or None.
        magnitude: m (O,) in fp32, or None.
        norm: n (O,) in fp32, or None.
        gain: g (O,) in fp32, or None for 1.
        scaling: s.
        wants_scaled: Whether g dY is wanted.
        wants_dots: Whether the sums for dm are wanted; it takes m, n and g.

    Returns:
        g dY (T, O) in the dtype of dY; the parts of dm (slabs of tokens, O) in fp32, 0 where n is 0; B' (O, R) in the
        dtype of h, with as many columns as h. Each is empty where it is not wanted.
    """
    (num_tokens, num_out), num_in = dY.shape, 0 if W0 is None else W0.shape[1]
    rank, columns = (0, 0) if B is None or h is None else (B.shape[1], h.shape[1])
    reads = wants_scaled or wants_dots
    slabs = num_blocks(num_tokens, SLAB) if reads else 1
    scaled = torch.empty(dY.shape if wants_scaled else (0, 0), dtype=dY.dtype, device=dY.device)
    dots = torch.empty(slabs if wants_dots else 0, num_out, dtype=torch.float32, device=dY.device)
    dtype = dY.dtype if h is None else h.dtype
    operand = (torch.empty if num_tokens else torch.zeros)(num_out, columns, dtype=dtype, device=dY.device)
    magnitude = None if magnitude is None else magnitude.contiguous()
    if num_tokens:
        with torch.cuda.device_of(dY):
            _output_grad[(num_blocks(num_out, BLOCK_O) * slabs,)](
                dY, y, x, W0, h, B, bias, magnitude, norm, gain, scaled, dots, operand,
                num_tokens, num_out, num_in, rank, columns, scaling, SMALL_GAIN, large_bias(dY.dtype),
                *dY.stride(), *strides(y), *strides(x), *strides(W0),
                0 if h is None else h.stride(0), *strides(B),
                HAS_GAIN=gain is not None, HAS_BIAS=bias is not None, HAS_BRANCH=rank > 0, HAS_OUTPUT=y is not None,
                WANTS_SCALED=wants_scaled, WANTS_DOTS=wants_dots, RECOMPUTES=W0 is not None,
                SLAB=SLAB, BLOCK_T=BLOCK_T, BLOCK_O=BLOCK_O, BLOCK_X=BLOCK_X, BLOCK_I=BLOCK_I[dY.dtype.itemsize],
                BLOCK_R=rank_block(max(rank, 1), dY), MIN_R=MIN_DOT, num_warps=4,
            )  # fmt: skip
    return scaled, dots, operand


@output_grad.register_fake
def _(dY, y, x, W0, h, B, bias, magnitude, norm, gain, scaling, wants_scaled, wants_dots):
    slabs = num_blocks(dY.shape[0], SLAB) if wants_scaled or wants_dots else 1
    columns = 0 if B is None or h is None else h.shape[1]
    dots = dY.new_empty(slabs if wants_dots else 0, dY.shape[1], dtype=torch.float32)
    scaled = dY.new_empty(dY.shape if wants_scaled else (0, 0))
    return scaled, dots, dY.new_empty(dY.shape[1], columns, dtype=dY.dtype if h is None else h.dtype)


def strides(t: Tensor | None) -> tuple[int, ...]:
    """The strides of a matrix; zeros without one."""
    return (0, 0) if t is None else t.stride()
