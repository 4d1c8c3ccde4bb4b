"""The layer on a GPU: the steps of core/steps.py, with norms, products and the sums for dm in Triton."""

from collections.abc import Sequence

import triton
from torch import Tensor

from dora_mm.core.forms import Forward, adapted_product, has_magnitude
from dora_mm.core.functional import SMALL_GAIN, Adapter, RowGains, row_gains
from dora_mm.core.ops import LINEAR, as_rows
from dora_mm.core.passes import Options
from dora_mm.core.steps import Steps, large_bias
from dora_mm.kernels.choice import vendor_is_faster, vendor_product
from dora_mm.kernels.low_rank_add import low_rank_add
from dora_mm.kernels.low_rank_matmul import low_rank_grad_input, low_rank_linear
from dora_mm.kernels.magnitude_grad import magnitude_grad
from dora_mm.kernels.row_norm import _row_norm, row_norm
from dora_mm.kernels.row_sums import row_sums


class TritonSteps(Steps):
    """The steps of a Linear in Triton. The branch is added in fp32, and the sum is rounded once."""

    rounds_once = True

    def reads_output(self):
        return True  # the kernel of `magnitude_grad` branches per row

    def row_gains(self, weight, adapter, n0):
        """Computes n and g in one pass over W0."""
        A, B, m = adapter.A, adapter.B, adapter.magnitude
        if A is None or B is None or m is None or n0 is None:
            return row_gains(weight, adapter, n0)
        A, B, m = A.detach().contiguous(), B.detach().contiguous(), m.detach()
        return RowGains(*row_norm(weight.detach(), A, B, adapter.scaling, n0, m))

    def unmerged(self, op, x, weight, bias, base_gain, h, B):
        if vendor_is_faster(weight.shape[1], x.dtype):
            y = low_rank_add(vendor_product(as_rows(x), weight.T), bias, base_gain, h, B, x.dtype)
        else:
            y = low_rank_linear(as_rows(x), weight, bias, base_gain, h, B)
        return y.view(*x.shape[:-1], weight.shape[0])

    def unmerged_grad_input(self, op, dY, x, weight, base_gain, u, A):
        rows = as_rows(dY)
        if vendor_is_faster(weight.shape[0], dY.dtype, back=True):
            scaled = rows if base_gain is None else low_rank_add(rows, None, base_gain, None, None, dY.dtype)
            dX = low_rank_add(vendor_product(scaled, weight), None, None, u, None if A is None else A.T, dY.dtype)
        else:
            dX = low_rank_grad_input(rows, weight, base_gain, u, A)
        return dX.view(*dY.shape[:-1], weight.shape[1])

    def magnitude_grad(self, op, dY, x, y, weight, bias, adapter):
        rows = adapter.rows
        assert rows is not None
        dY, x, y = as_rows(dY), as_rows(x), as_rows(y)
        A, B = (None if t is None else t.contiguous() for t in (adapter.A, adapter.B))
        options = adapter.scaling, SMALL_GAIN, large_bias(y.dtype)
        dots, squares = row_sums(dY, y, bias).unbind()
        per_row = dots, squares, adapter.magnitude, rows.norm, rows.gain, bias
        return magnitude_grad(*per_row, dY, x, weight, A, B, *options)


TRITON_STEPS = TritonSteps()
INTERPRETED = not isinstance(_row_norm, triton.JITFunction)  # then the kernels run on a CPU


def runs_in_triton(weight: Tensor, adapters: Sequence[Adapter], options: Options) -> bool:
    """Whether a layer runs in Triton; otherwise it runs in plain torch.

    Linear layers below float64 on a GPU do, with dropout only those without a magnitude. Embeddings and convolutions do
    not.
    """
    has_kernel = options.op is LINEAR and weight.dim() == 2 and weight.dtype.itemsize <= 4
    is_thin = not options.dropout or not has_magnitude(adapters)
    return has_kernel and is_thin and (weight.is_cuda or INTERPRETED)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[Adapter], options: Options) -> Tensor:
    """`core.forms.adapted_product` in Triton, where `runs_in_triton`."""
    if runs_in_triton(weight, adapters, options):
        return adapted_product(x, weight, bias, adapters, options, TRITON_STEPS)
    return adapted_product(x, weight, bias, adapters, options)


TRITON: Forward = product
