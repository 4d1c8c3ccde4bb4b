"""The layer on a GPU: the operator of core/fused.py, with norms, products and the sums for dm in Triton."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from dora_mm.core.functional import SMALL_GAIN, Adapter, RowGains, row_gains
from dora_mm.core.fused import Forward, adapted_product
from dora_mm.core.products import LinearProduct, Product, as_rows, large_bias
from dora_mm.kernels.choice import vendor_is_faster, vendor_product
from dora_mm.kernels.low_rank_add import low_rank_add
from dora_mm.kernels.low_rank_matmul import low_rank_grad_input, low_rank_linear
from dora_mm.kernels.magnitude_grad import magnitude_grad
from dora_mm.kernels.row_norm import _row_norm, row_norm
from dora_mm.kernels.row_sums import row_sums


class TritonLinear(LinearProduct):
    """Linear in Triton. In half precision the branches are added to x W0^T in fp32, and the sum is rounded once."""

    splits_half = True

    @torch.no_grad()
    def rows(self, weight, adapter, n0):
        """Computes n and g in one pass over W0."""
        if adapter.A is None or adapter.B is None or adapter.magnitude is None or n0 is None:
            return row_gains(weight, adapter, n0)
        A, B = adapter.A.contiguous(), adapter.B.contiguous()
        return RowGains(*row_norm(weight.detach(), A, B, adapter.scaling, n0, adapter.magnitude))

    def split(self, x, weight, bias, gain, branches):
        h, B = concatenated_branches(branches)
        if vendor_is_faster(weight.shape[1], x.dtype):
            y = low_rank_add(vendor_product(as_rows(x), weight.T), bias, gain, h, B, x.dtype)
        else:
            y = low_rank_linear(as_rows(x), weight, bias, gain, h, B)
        return y.view(*x.shape[:-1], weight.shape[0])

    def split_grad_input(self, dY, x, weight, gain, branches):
        u, A = concatenated_branches([(u, A.T) for u, A in branches])
        rows = as_rows(dY)
        if vendor_is_faster(weight.shape[0], dY.dtype, back=True):
            scaled = rows if gain is None else low_rank_add(rows, None, gain, None, None, dY.dtype)
            dX = low_rank_add(vendor_product(scaled, weight), None, None, u, A, dY.dtype)
        else:
            dX = low_rank_grad_input(rows, weight, gain, u, None if A is None else A.T)
        return dX.view(*dY.shape[:-1], weight.shape[1])

    def row_sums(self, dY, y, bias):
        dots, squares = row_sums(as_rows(dY), as_rows(y), bias)
        return dots, None if bias is None else squares

    def chooses_rows(self):
        return True  # the kernel of `magnitude_grad` branches per row

    def magnitude_grad(self, dY, x, y, weight, bias, adapter, rows):
        dY, x, y = as_rows(dY), as_rows(x), as_rows(y)
        A, B = (None if t is None else t.contiguous() for t in (adapter.A, adapter.B))
        options = adapter.scaling, SMALL_GAIN, large_bias(y.dtype)
        per_row = *row_sums(dY, y, bias), adapter.magnitude, rows.norm, rows.gain, bias
        return magnitude_grad(*per_row, dY, x, weight.detach(), A, B, *options)


TRITON_LINEAR = TritonLinear()
INTERPRETED = not isinstance(_row_norm, triton.JITFunction)  # then the kernels run on a CPU


def concatenated_branches(branches: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor | None, Tensor | None]:
    """Concatenates branches h_k (T, R_k), B_k (O, R_k) to a single h and B of the summed rank; None without any."""
    if not branches:
        return None, None
    if len(branches) == 1:
        return branches[0]
    first, second = zip(*branches, strict=True)
    return torch.cat(first, 1), torch.cat(second, 1)


def runs_in_triton(weight: Tensor, product: Product, adapters: Sequence[Adapter], dropout: float) -> bool:
    """Whether a layer runs in Triton; otherwise it runs in plain torch.

    Linear layers below float64 on a GPU do, with dropout only those without a magnitude. Embeddings and convolutions do
    not.
    """
    has_kernel = type(product) is LinearProduct and weight.dim() == 2 and weight.dtype.itemsize <= 4
    is_thin = not dropout or all(adapter.magnitude is None for adapter in adapters)
    return has_kernel and is_thin and (weight.is_cuda or INTERPRETED)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[Adapter], **options) -> Tensor:
    """`core.fused.adapted_product` in Triton, where `runs_in_triton`."""
    if runs_in_triton(weight, options["product"], adapters, options["dropout"]):
        options["product"] = TRITON_LINEAR
    return adapted_product(x, weight, bias, adapters, **options)


TRITON: Forward = product
