"""The layer on a GPU: the passes of core/steps.py for a Linear, with everything but the large products in Triton.

A step of DoRA takes 14 launches, 11 where the norm is kept from an earlier pass: see tests/kernels/test_launches.py.
"""

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
from dora_mm.kernels.common import float_product
from dora_mm.kernels.dora_experts import EXPERT_STEPS, takes
from dora_mm.kernels.gpus import has_float_output, vendor_is_faster
from dora_mm.kernels.low_rank_matmul import low_rank_grad_input, low_rank_linear
from dora_mm.kernels.operands import operands
from dora_mm.kernels.output_grad import output_grad


class TritonSteps(Steps):
    """The passes of a Linear in Triton. The branch is added in fp32, and the sum is rounded once.

    The usual case is one adapter at strength 1 without dropout, as in training. Others take the products alone.
    """

    only_unmerged = True

    def keeps_output(self, x):
        return True  # `output_grad` branches on the GPU

    def find_unsafe(self, options, y, bias, adapters):
        return None

    def prepare(self, weight, adapters, cache, dtype):
        """Computes n and g, and A in the dtype of the product from the same parts."""
        rows, first, is_half = cache.rows, adapters[0], dtype.itemsize < 4
        operand = None
        if rows is None:
            rows = []
            for adapter in adapters:
                found, operand = self.row_gains(weight, adapter, cache)
                rows.append(found)
        if first.A is None or not is_usual(adapters):
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

    def product(self, options, dtype, x, source, weight, bias, adapters, operand):
        rows, W0, gain = as_rows(x), cast(weight, dtype), base_gain(adapters)
        first, usual = adapters[0], is_usual(adapters)
        A, B, scaling = (operand, first.B, first.scaling) if usual else (*branch(adapters), 1.0)
        h = None
        if A is not None:
            h = as_rows(source) @ cast(A, dtype).t()
        vendor = vendor_is_faster(rows, W0.shape[1])
        y = low_rank_linear(rows, W0, bias, gain, h, B, scaling, not usual, vendor)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], W0.shape[0]), h

    def keep(self, options, dtype, bias, adapters, operand):
        return adapters, operand

    def infer(self, options, dtype, x, weight, bias, kept):
        return self.product(options, dtype, x, x, weight, bias, *kept)[0]

    def unmerged_grad_input(self, op, dY, x, weight, base_gain, u, A):
        d = as_rows(dY)
        vendor = vendor_is_faster(d, weight.shape[0], back=True)  # in fp32 no tile of our kernel fits into a GPU
        if vendor and base_gain is not None:
            d, base_gain = (d * base_gain).to(d.dtype), None
        dX = low_rank_grad_input(d, weight, base_gain, u, A, vendor)
        return dX.view(*dY.shape[:-1], weight.shape[1])

    def gradients(self, saved, dY):
        adapter, h = saved.adapters[0], saved.kept
        if not is_usual(saved.adapters):
            return super().gradients(saved, dY)
        n, gain = (None, None) if adapter.rows is None else (adapter.rows.norm, adapter.rows.gain)
        d, x, y = as_rows(dY), as_rows(saved.x), None if saved.y is None else as_rows(saved.y)
        W0 = cast(saved.weight, saved.dtype)
        (needs_A, needs_B, needs_m, *_), needs_x = saved.needs, saved.needs_x
        trains = h is not None and (needs_A or needs_B)
        is_exact = adapter.norm_grad == "exact" and gain is not None and trains
        wants_dots = needs_m or is_exact
        vendor = needs_x and vendor_is_faster(d, W0.shape[0], back=True)
        wants_scaled = vendor and gain is not None
        options = adapter.scaling, wants_scaled, wants_dots
        per_row = saved.bias, adapter.magnitude, n, gain
        scaled, dots, operand = output_grad(d, y, x, W0, h, adapter.B, *per_row, *options)
        u = d @ operand if h is not None and (trains or needs_x or saved.needs_dropped) else None
        dA, dB, dm = own_gradients(adapter, d, x, h if trains else None, u, dots if wants_dots else None)
        if is_exact and dm is not None and dA is not None and dB is not None:
            more_A, more_B = exact_norm_correction(as_matrix(saved.weight), adapter, dm)
            dA, dB = dA.add_(more_A), dB.add_(more_B)
        dX = d_dropped = None
        if saved.needs_dropped and u is not None and adapter.A is not None:
            d_dropped = (without_padding(u, adapter.A) @ adapter.A.to(u.dtype)).view(saved.x.shape)
            u = None
        if needs_x:
            if wants_scaled:
                d, gain = scaled, None
            dX = low_rank_grad_input(d, W0, gain, u, None if u is None else adapter.A, vendor)
            dX = dX if dY.dim() == 2 else dX.view(*dY.shape[:-1], W0.shape[1])
        db = bias_grad(saved, dY) if saved.needs_bias else None
        return dX, d_dropped, db, [dA, dB, dm if needs_m else None]


def is_usual(adapters: Sequence[Adapter]) -> bool:
    """Whether this is one adapter at strength 1, as in training."""
    return len(adapters) == 1 and adapters[0].strength == 1


def own_gradients(
    adapter: Adapter, d: Tensor, x: Tensor, h: Tensor | None, u: Tensor | None, dots: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Computes dA, dB and dm.

    Args:
        adapter: The adapter, with n and g.
        d: dY (T, O).
        x: The input of the update (T, I).
        h: h (T, R or more), or None where A and B are not trained.
        u: u (T, R or more), or None.
        dots: The parts of dm, from `output_grad`, or None where m is not trained.
    """
    A, s, gain = adapter.A, adapter.scaling, None if adapter.rows is None else adapter.rows.gain
    if h is None or u is None or A is None:
        return None, None, None if dots is None else adapter_grads(None, 0, dots, gain, s)[1]
    dA, product = float_product(without_padding(u, A).t(), x), float_product(d.t(), h)
    if dots is None and gain is None and s == 1 and product.shape[1] == len(A):
        return dA, product, None
    dB, dm = adapter_grads(product, len(A), dots, gain, s)
    return dA, dB, None if dots is None else dm


def without_padding(u: Tensor, A: Tensor) -> Tensor:
    """Returns u without the columns of zeros beyond the rank."""
    return u if u.shape[1] == len(A) else u[:, : len(A)]


TRITON_STEPS = TritonSteps()
INTERPRETED = not isinstance(norms._row_norm, triton.JITFunction)  # then the kernels run on a CPU


def runs_in_triton(weight: Tensor, adapters: Sequence[Adapter], options: Options) -> bool:
    """Whether a layer runs in Triton; otherwise it runs in plain torch.

    Linear layers below float64 on a GPU do, with dropout only those without a magnitude; for those of experts see
    `dora_experts.takes`. Embeddings and convolutions do not.
    """
    if weight.dtype.itemsize > 4 or not (weight.is_cuda or INTERPRETED):
        return False
    if options.op.stacked:
        return takes(adapters, options)
    is_thin = not options.dropout or not has_magnitude(adapters)
    return options.op is LINEAR and weight.dim() == 2 and is_thin


def product(x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[Adapter], options: Options) -> Tensor:
    """`core.forms.adapted_product` in Triton, where `runs_in_triton`."""
    if runs_in_triton(weight, adapters, options):
        if options.op.stacked:
            return adapted_product(x, weight, bias, adapters, options, EXPERT_STEPS)
        bias = None if bias is None else bias.contiguous()  # the kernels take no stride of it
        return adapted_product(x, weight, bias, adapters, options, TRITON_STEPS)
    return adapted_product(x, weight, bias, adapters, options)


TRITON: Forward = product
