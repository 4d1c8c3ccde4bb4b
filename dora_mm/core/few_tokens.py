"""Linear layers with few tokens on a processor: the products with W0, turned around.

MKL takes less time for W0 X^T, with X padded to a multiple of 16 rows, than for X W0^T, and likewise for the gradient
of x, where X has few rows. With W0 of 1280 x 1280, not in the cache, on two cores of an AMD EPYC, at two times of day:

    rows of X    X W0^T          (W0 X^T)^T      dY W0           (W0^T dY^T)^T
    64           1.50, 1.87 ms   1.38, 1.56      1.73, 1.95      1.45, 1.58
    77           1.78, 2.19      1.67, 1.81      2.01, 2.28      1.75, 1.86
    154          2.94            2.94            3.16            3.96

(The copy that turns the result is part of the sum with the low-rank branch.) It sums in another order, so that a fresh
adapter, which may change no bit, goes without it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_mm.core.functional import Adapter, any_nonzero
from dora_mm.core.products import LinearProduct, Product, as_rows

MOST_TOKENS = 128


class FewTokens(LinearProduct):
    def split(self, x, weight, bias, gain, low):
        return self.complete(self.base(x, weight)[0], bias, gain, low).view(*x.shape[:-1], len(weight))

    def base(self, x: Tensor, weight: Tensor, A: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x W0^T, (T, O) with the tokens last in memory, and W0 A^T from the same product, which reads W0 once."""
        rows = as_rows(x)
        both = weight @ padded(rows if A is None else torch.cat([rows, A])).T
        y, W0A, _ = both.tensor_split([len(rows), len(rows) + (0 if A is None else len(A))], 1)
        return y.T, None if A is None else W0A

    def complete(self, y, bias, gain, low):
        """With y as `base` returns it, which is overwritten; the sum with a branch turns it back."""
        y = torch.addmm(y if gain is None else y.mul_(gain), low[0][0], low[0][1].T)
        return super().complete(y, bias, None, low[1:])

    def split_grad_input(self, dY, x, weight, gain, low):
        if x.shape[-1] > dY.shape[-1]:  # 1280 x 2048: 3.05 ms as it is, 3.30 turned
            return super().split_grad_input(dY, x, weight, gain, low)
        rows = as_rows(dY)
        turned = weight.T @ padded(rows if gain is None else rows * gain).T
        dX = torch.addmm(turned[:, : len(rows)].T, *low[0]).view(x.shape)
        for u, A in low[1:]:
            dX = self.add_reduced_grad(dX, u, x, A)
        return dX


FEW_TOKENS = FewTokens()


def padded(rows: Tensor, multiple: int = 16) -> Tensor:
    """With rows of zeros, up to a multiple."""
    missing = -len(rows) % multiple
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def few_tokens_pay(x: Tensor, weight: Tensor, adapters: Sequence[Adapter], product: Product) -> bool:
    """Whether FEW_TOKENS takes the place of `product`, for adapters of which one is not fresh."""
    if type(product) is not LinearProduct or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return 0 < product.num_tokens(x, weight) <= MOST_TOKENS and any(
        a.B is not None and any_nonzero(a.B) for a in adapters
    )
