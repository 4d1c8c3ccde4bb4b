"""The layer of a stack of matrices on a GPU, the experts of a mixture: the passes of core/steps.py for a `GroupedOp`.

Which rows are whose is read by the kernels alone: no pass waits for the GPU, and the number of launches is that of a
single matrix, whatever the number of experts: see tests/kernels/test_launches.py. They are no operators to
torch.compile, which leaves experts out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dora_mm.core.functional import Adapter, RowGains, row_norm
from dora_mm.core.ops import GroupedOp
from dora_mm.core.passes import Options, PassCache
from dora_mm.core.steps import Steps
from dora_mm.kernels.common import padded_rank
from dora_mm.kernels.grouped_dots import grouped_dots
from dora_mm.kernels.grouped_matmul import grouped_matmul
from dora_mm.kernels.grouped_norm import grouped_norm
from dora_mm.kernels.grouped_outer import grouped_outer


class ExpertSteps(Steps):
    """The passes of a stack in Triton, of one adapter at strength 1. The branch is added in fp32."""

    only_unmerged = True
    takes_stacks = True

    def keeps_output(self, x):
        return True  # `grouped_dots` branches on the GPU

    def find_unsafe(self, options, y, bias, adapters):
        return None

    def prepare(self, weight, adapters, cache, dtype):
        """Computes n and g of all matrices."""
        if cache.rows is not None:
            return cache.rows, None
        return [self.row_gains(weight, adapter, cache) for adapter in adapters], None

    def row_gains(self, weight: Tensor, adapter: Adapter, cache: PassCache) -> RowGains | None:
        """Computes n and g of an adapter; None without a magnitude."""
        A, B, m = adapter.A, adapter.B, adapter.magnitude
        if m is None:
            return None
        W0, m = weight.detach(), m.detach()
        if cache.n0 is None and (cache.keeps_base or A is None):
            cache.n0 = torch.stack([row_norm(each) for each in W0])  # once: a copy in fp32 of one matrix at a time
        if A is None or B is None:
            assert cache.n0 is not None
            return RowGains(cache.n0, torch.where(cache.n0 == 0, 1.0, m / cache.n0))
        A = A.detach()
        return RowGains(*grouped_norm(W0, A @ A.mT, A, B.detach(), adapter.scaling, cache.n0, m))

    def product(self, options, dtype, x, source, weight, bias, adapters, operand):
        (A, B, *_), ends, h = adapters[0], ends_of(options), None
        gain = None if adapters[0].rows is None else adapters[0].rows.gain
        if A is not None:
            h = grouped_matmul(x, A, ends, num_columns=padded_rank(A.shape[1]))
        return grouped_matmul(x, weight, ends, gain=gain, h=h, B=B, scaling=adapters[0].scaling), h

    def keep(self, options, dtype, bias, adapters, operand):
        return adapters, operand

    def infer(self, options, dtype, x, weight, bias, kept):
        return self.product(options, dtype, x, x, weight, bias, *kept)[0]

    def gradients(self, saved, dY):
        adapter, h, x, W0 = saved.adapters[0], saved.kept, saved.x, saved.weight
        (A, B, m, s, *_), ends = adapter, ends_of(saved.options)
        (needs_A, needs_B, needs_m, *_), needs_x = saved.needs, saved.needs_x
        n, gain = (None, None) if adapter.rows is None else adapter.rows[:2]
        u = dA = dB = dm = dX = None
        if A is not None and B is not None and (needs_A or needs_x):
            columns = padded_rank(A.shape[1])
            u = grouped_matmul(dY, B.mT, ends, gain=gain, gain_in=True, factor=s, num_columns=columns)
        if u is not None and A is not None and needs_A:
            dA = grouped_outer(u, x, ends, torch.empty_like(A, memory_format=torch.contiguous_format))
        if h is not None and B is not None and needs_B:
            dB = torch.empty_like(B, memory_format=torch.contiguous_format)
            grouped_outer(h, dY, ends, dB.mT, gain=gain, factor=s)
        if needs_m and m is not None and n is not None and gain is not None:
            dm = grouped_dots(dY, saved.y, x, W0, h, B, m, n, gain, s, ends)
        if needs_x:
            dX = grouped_matmul(dY, W0.mT, ends, gain=gain, gain_in=True, h=u, B=None if A is None else A.mT)
        return dX, None, None, [dA, dB, dm]


def ends_of(options: Options) -> Tensor:
    """The ends of the rows of each matrix."""
    assert isinstance(options.op, GroupedOp)
    return options.op.ends


def takes(adapters: Sequence[Adapter], options: Options) -> bool:
    """Whether a pass of a stack runs in Triton: that of one adapter at strength 1 without dropout does.

    Not with an exact norm: it takes W0 A^T and W0^T B of all matrices in fp32, which plain torch computes for the
    experts that have rows.
    """
    first = adapters[0]
    is_usual = len(adapters) == 1 and first.strength == 1 and not options.dropout
    return is_usual and (first.norm_grad != "exact" or first.magnitude is None or first.A is None)


EXPERT_STEPS = ExpertSteps()
