"""Linear layers in bf16 on a CPU: a correction that is added to the product before it is rounded.

    y = round(x W^T + b + c)

oneDNN adds c to its fp32 sums, so that an update far below a unit in the last place of y survives; c itself is in bf16,
which costs the update some 2^-9 of itself. What c is, by the form of the product:

    merged   W = W(t) rounded, c = x residual^T with the residual W(t) - W
    split    W = W0, c = (e - 1) x W0^T + sum of h B^T, which for LoRA, where e is 1, needs no additional product

One product of the concatenated [x, x] and [W, residual] also rounds once, but the copy takes half as long as a product.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from dora_mm.core.functional import Adapter, RowGains, any_nonzero
from dora_mm.core.products import LinearProduct, Product, as_rows, like_tokens

MOST_CHANGE = 0.25  # of a row of W(t), relative to W0's: beyond it the rounding of c matters compared to that of y


class CorrectedProduct(LinearProduct):
    splits_half = True

    def concatenated(self, x, weight, other, other_weight, bias):
        if x.numel() == 0:
            return self(x, weight, bias)
        rows = as_rows(x)
        return like_tokens(_product_with(rows, self(as_rows(other), other_weight, None), weight, bias), x)

    def split(self, x, weight, bias, gain, branches):
        change = None if gain is None else gain - 1
        branches = [(h, B.to(h.dtype)) for h, B in branches if any_nonzero(B)]
        if x.numel() == 0 or not (branches or (change is not None and any_nonzero(change))):
            return self(x, weight, bias)
        rows = as_rows(x)
        correction = None if change is None else self(rows, weight, None).mul_(change.to(x.dtype))
        if branches:  # in one sum: of branches that cancel, rounding errors would remain
            h, B = (torch.cat(parts, 1) for parts in zip(*branches, strict=True))
            correction = h @ B.T if correction is None else self.expand(h, B, correction)
        assert correction is not None
        return like_tokens(_product_with(rows, correction, weight, bias), x)

    def split_grad_input(self, dY, x, weight, gain, branches):
        scaled = dY if gain is None else torch.addcmul(dY, dY, (gain - 1).to(dY.dtype))  # in one pass, rounded once
        dX = self.grad_input(scaled, x, weight)
        for u, A in branches:
            dX = self.add_reduced_grad(dX, u, x, A.to(u.dtype))
        return dX


CORRECTED = CorrectedProduct()


def can_correct(x: Tensor, dtype: torch.dtype, product: Product) -> bool:
    if type(product) is not LinearProduct or dtype != torch.bfloat16 or x.device.type != "cpu":
        return False
    return not torch.compiler.is_compiling() and is_added_before_rounding()


@torch.no_grad()
def changes_little(n0: Tensor, gain: Tensor | None, adapters: Sequence[Adapter], rows: Sequence[RowGains]) -> bool:
    """Whether |e - 1| n0 + sum of |t g s| ||B A||, a bound of ||W(t) - W0||, is a small part of n0 in every row.

    Args:
        n0: The row norms of W0 (O,).
        gain: e (O,); None for 1.
        adapters: The adapters.
        rows: Their n and g.
    """
    change = torch.zeros_like(n0) if gain is None else (gain - 1).abs() * n0
    for adapter, (_, g, _) in zip(adapters, rows, strict=True):
        if adapter.A is not None and adapter.B is not None:
            square = ((adapter.B @ (adapter.A @ adapter.A.T)) * adapter.B).sum(1)
            factor = adapter.strength * adapter.scaling * (1 if g is None else g)
            change += square.clamp_min_(0).sqrt_().mul_(factor).abs_()
    return bool((change <= MOST_CHANGE * n0).all())


@functools.cache
def is_added_before_rounding() -> bool:
    """Whether oneDNN adds before it rounds: 1 + 2^-8 is half way between two bf16 numbers, so 2^-12 more decides."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    x, weight = (torch.zeros(64, 256, dtype=torch.bfloat16, device="cpu") for _ in range(2))
    x[:, :2], weight[:, 0], weight[:, 1] = 1, 1, 2.0**-8
    correction = torch.full((64, 64), 2.0**-12, dtype=torch.bfloat16, device="cpu")
    return bool((_product_with(x, correction, weight, None) == 1 + 2.0**-7).all())


def _product_with(x: Tensor, correction: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns round(x W^T + b + c), for matrices."""
    weight = weight.contiguous()  # a view of wider rows is misread, and so are the gaps of a bias
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise.binary(x, correction, weight, bias, "add")
