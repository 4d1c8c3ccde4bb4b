"""The layer on a GPU: the passes of core/steps.py for a Linear, with everything but the large products in Triton."""

from collections.abc import Sequence

import triton
from torch import Tensor

from dora_mm.core.forms import Forward, adapted_product
from dora_mm.core.functional import Adapter, RowGains, as_matrix, cast, exact_norm_correction, row_gains, row_norm
from dora_mm.core.ops import LINEAR, as_rows
from dora_mm.core.passes import Options
from dora_mm.core.steps import Steps, base_gain, bias_grad, branch, has_magnitude
from dora_mm.kernels import row_norm as norms
from dora_mm.kernels.adapter_grads import adapter_grads
from dora_mm.kernels.cards import has_float_output, vendor_is_faster
from dora_mm.kernels.common import float_product
from dora_mm.kernels.low_rank_matmul import low_rank_grad_input, low_rank_linear
from dora_mm.kernels.operands import operands
from dora_mm.kernels.output_grad import output_grad


class TritonSteps(Steps):
    """The passes of a Linear in Triton. The branch is added in fp32, and the sum is rounded once.

    The usual case is one adapter at strength 1 without dropout, as in training. Others take the products alone.
    """

    only_unmerged = True

    def keeps_output(self):
        return True  # `output_grad` branches on the GPU

    def prepare(self, weight, adapters, cache, dtype):
        """Computes n and g, and A in the dtype of the product from the same parts."""
        rows, first, is_half = cache.rows, adapters[0], dtype.itemsize < 4
        operand = None
        if rows is None:
            rows = []
            for adapter in adapters:
                found, operand = self.row_gains(weight, adapter, cache)
                rows.append(found)
        if len(adapters) > 1 or first.A is None:
            return rows, None
        if not is_half:
            return rows, first.A.detach()
        if operand is not None and operand.dtype == dtype:
            return rows, operand[: len(operand) // 2]
        return rows, operands(first.A, dtype, False)

    def row_gains(self, weight, adapter, cache) -> tuple[RowGains | None, Tensor | None]:
        """Computes n and g of an adapter, and returns the parts of A that this took in half precision."""
        A, B, m = adapter.A, adapter.B, adapter.magnitude
        if m is None:
            return None, None
        if cache.keeps_base and cache.n0 is None:
            cache.n0 = row_norm(weight.detach())
        if A is None or B is None or not has_float_output(weight):
            return row_gains(weight, adapter, cache.n0), None
        W0, A = weight.detach(), A.detach()
        parts = A if W0.dtype.itemsize >= 4 else operands(A, W0.dtype, True)
        transposed = parts.t()
        Q, G = float_product(W0, transposed), float_product(parts, transposed)
        n, g = norms.row_norm(W0, Q, G, A, B, adapter.scaling, cache.n0, m)
        return RowGains(n, g), None if parts is A else parts

    def product(self, call, x, source, weight, bias, adapters, operand):
        rows, W0, gain = as_rows(x), cast(weight, call.dtype), base_gain(adapters)
        first = adapters[0]
        is_usual = len(adapters) == 1 and first.strength == 1
        A, B, scaling = (operand, first.B, first.scaling) if is_usual else (*branch(adapters), 1.0)
        h = None
        if A is not None:
            h = as_rows(source) @ cast(A, call.dtype).t()
        vendor = vendor_is_faster(rows, W0.shape[1])
        y = low_rank_linear(rows, W0, bias, gain, h, B, scaling, not is_usual, vendor)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], W0.shape[0]), h

    def unmerged_grad_input(self, op, dY, x, weight, base_gain, u, A):
        dX = low_rank_grad_input(as_rows(dY), weight, base_gain, u, A, False)
        return dX.view(*dY.shape[:-1], weight.shape[1])

    def gradients(self, call, saved, dY, needs):
        adapter = saved.adapters[0]
        if len(saved.adapters) > 1 or adapter.strength != 1:
            return super().gradients(call, saved, dY, needs)
        A, B, rows, h, s = adapter.A, adapter.B, adapter.rows, saved.kept, adapter.scaling
        n, gain = (None, None) if rows is None else (rows.norm, rows.gain)
        d, x, y = as_rows(dY), as_rows(saved.x), None if saved.y is None else as_rows(saved.y)
        W0 = cast(saved.weight, call.dtype)
        trains = h is not None and (needs.own[0] or needs.own[1])
        is_exact = adapter.norm_grad == "exact" and rows is not None and trains
        wants_dots = needs.own[2] or is_exact
        vendor = needs.x and vendor_is_faster(d, W0.shape[0], back=True)
        scaled, dots, operand = output_grad(
            d, y, x, W0, h, B, saved.bias, adapter.magnitude, n, gain, s, vendor and gain is not None, wants_dots
        )
        dX = d_dropped = dA = dB = dm = u = product = None
        rank = 0 if h is None else len(A)
        if h is not None and (trains or needs.x or needs.dropped):
            u = d @ operand
            own_u = u if u.shape[1] == rank else u[:, :rank]
            if trains:
                dA, product = float_product(own_u.t(), x), float_product(d.t(), h)
            if needs.dropped:
                d_dropped, u = (own_u @ A.to(u.dtype)).view(saved.x.shape), None
        if trains and not wants_dots and gain is None and s == 1 and product.shape[1] == rank:
            dB = product
        elif trains or wants_dots:
            dB, dm = adapter_grads(product, rank, dots if wants_dots else None, gain, s)
        if is_exact:
            more_A, more_B = exact_norm_correction(as_matrix(saved.weight), adapter, dm)
            dA, dB = dA.add_(more_A), dB.add_(more_B)
        if needs.x:
            if vendor and gain is not None:
                d, gain = scaled, None
            dX = low_rank_grad_input(d, W0, gain, u, None if u is None else A, vendor)
            dX = dX if dY.dim() == 2 else dX.view(*dY.shape[:-1], W0.shape[1])
        own = [dA, dB if trains else None, dm if needs.own[2] else None]
        return dX, d_dropped, bias_grad(call.options.op, saved, dY) if needs.bias else None, own


TRITON_STEPS = TritonSteps()
INTERPRETED = not isinstance(norms._row_norm, triton.JITFunction)  # then the kernels run on a CPU


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
