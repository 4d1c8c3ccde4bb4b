"""Linear layers with few tokens on a CPU: the products with W0, transposed.

MKL takes less time for W0 X^T, with X padded to a multiple of 16 rows, than for X W0^T where X has few rows, and
likewise for the gradient of x. Milliseconds for W0 of 1280 x 1280, not in the cache, on two cores of an AMD EPYC:

    rows of X    X W0^T and W0 A^T    (W0 [X; A]^T)^T    (e dY) W0 + u A    transposed
    64           1.98                 1.62               1.73               1.45
    77           2.2                  1.8                2.01               1.75
    154          4.50                 3.98               3.16               3.96
    256          6.30                 5.84
    320          7.40                 7.08

(The copy that transposes the result is part of the sum with the low-rank branch.) The order of summation differs, so it
is not used for a fresh adapter, which must not change any bit. On an Intel Xeon, where MKL has special kernels for few
rows, transposing changes 1.31 ms to 1.27 forward with 64 rows and 1.99 to 2.15 with 154, backward 0.98 to 1.44 and 1.77
to 2.40: there the products are not transposed.
"""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path

import torch
from torch import Tensor

from dora_mm.core.products import LinearProduct, as_rows


def made_by_intel() -> bool:
    with contextlib.suppress(OSError):
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    return "GenuineIntel" in platform.processor()


TRANSPOSING_PAYS = not made_by_intel()
MOST_TOKENS = 256
MOST_TOKENS_BACK = 100


class FewTokens(LinearProduct):
    def base(self, x, weight, A):
        """As in LinearProduct, but x W0^T is the transposed view of a contiguous (O, T)."""
        rows = as_rows(x)
        both = weight @ (padded(rows) if A is None else padded(rows, A)).T
        num = len(rows)
        return both[:, :num].T, None if A is None else both[:, num : num + len(A)]

    def complete(self, y, bias, gain, branches):
        """For y as `base` returns it; the sum with the first branch is contiguous as (T, O)."""
        y = torch.addmm(y if gain is None else y.mul_(gain), branches[0][0], branches[0][1].T)
        return super().complete(y, bias, None, branches[1:])

    def split_grad_input(self, dY, x, weight, gain, branches):
        rows = as_rows(dY)
        if len(rows) > MOST_TOKENS_BACK or x.shape[-1] > dY.shape[-1]:  # 1280 x 2048: 3.05 ms as it is, 3.30 transposed
            return super().split_grad_input(dY, x, weight, gain, branches)
        transposed = weight.T @ padded(rows if gain is None else rows * gain).T
        dX = torch.addmm(transposed[:, : len(rows)].T, *branches[0]).view(x.shape)
        for u, A in branches[1:]:
            dX = self.add_reduced_grad(dX, u, x, A)
        return dX


FEW_TOKENS = FewTokens()


def padded(rows: Tensor, *more: Tensor) -> Tensor:
    """Concatenates matrices of equal width, with rows of zeros up to a multiple of 16 rows."""
    parts = [rows, *more]
    if missing := -sum(map(len, parts)) % 16:
        parts.append(rows.new_zeros(missing, rows.shape[1]))
    return torch.cat(parts) if len(parts) > 1 else rows
