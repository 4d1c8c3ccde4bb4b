"""Linear layers in bf16 on a processor: a correction that joins the product before it is rounded.

    y = round(x W^T + b + c)

oneDNN adds c to its fp32 sums, so that an update far below a unit in the last place of y survives; c itself is rounded,
which takes 2^-9 of it. What c is, by the form of the product:

    merged   W = high, c = x low^T with W(t) = high + low
    split    W = W0, c = (e - 1) x W0^T + sum of h B^T, which LoRA, where e is 1, has without a further product

Of one product with [x, x], the other way to round once, the copy alone takes half of a product.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from dora_mm.core.functional import Rows, any_nonzero
from dora_mm.core.products import LinearProduct, Product, as_rows, like_tokens

MOST_CHANGE = 0.25  # of |g - 1|: beyond it, the rounding of c would show beside that of y


class CorrectedProduct(LinearProduct):
    splits_half = True

    def twofold(self, x, weight, other, other_weight, bias):
        if x.numel() == 0:
            return self(x, weight, bias)
        rows = as_rows(x)
        return like_tokens(_product_with(rows, self(as_rows(other), other_weight, None), weight, bias), x)

    def split(self, x, weight, bias, gain, low):
        change = None if gain is None else gain - 1
        low = [(h, B) for h, B in low if any_nonzero(B)]
        if x.numel() == 0 or not (low or (change is not None and any_nonzero(change))):
            return self(x, weight, bias)
        rows = as_rows(x)
        if change is None:
            (h, B), *low = low
            correction = h @ B.to(h.dtype).T
        else:
            correction = self(rows, weight, None).mul_(change.to(x.dtype))
        for h, B in low:
            correction = self.expand(h, B.to(h.dtype), correction)
        return like_tokens(_product_with(rows, correction, weight, bias), x)

    def split_grad_input(self, dY, x, weight, gain, low):
        scaled = dY if gain is None else torch.addcmul(dY, dY, (gain - 1).to(dY.dtype))  # in one pass, rounded once
        dX = self.grad_input(scaled, x, weight)
        for u, A in low:
            dX = self.add_reduced_grad(dX, u, x, A.to(u.dtype))
        return dX


CORRECTED = CorrectedProduct()


def can_correct(x: Tensor, dtype: torch.dtype, product: Product) -> bool:
    if type(product) is not LinearProduct or dtype != torch.bfloat16 or x.device.type != "cpu":
        return False
    return not torch.compiler.is_compiling() and is_added_before_rounding()


def changes_little(rows: Sequence[Rows]) -> bool:
    """Whether no adapter's g is far from 1."""
    return all(r.gain is None or bool(((r.gain - 1).abs() <= MOST_CHANGE).all()) for r in rows)


@functools.cache
def is_added_before_rounding() -> bool:
    """Tries it: 1 + 2^-8 is half way between two bf16 numbers, so that 2^-12 more decides."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    x, weight = torch.ones(1, 2, dtype=torch.bfloat16), torch.tensor([[1.0, 2.0**-8]], dtype=torch.bfloat16)
    return _product_with(x, torch.full((1, 1), 2.0**-12, dtype=torch.bfloat16), weight, None).item() == 1 + 2.0**-7


def _product_with(x: Tensor, correction: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """round(x W^T + b + c) for matrices."""
    weight = weight.contiguous()  # a view of wider rows is misread
    return torch.ops.mkldnn._linear_pointwise.binary(x, correction, weight, bias, "add")
