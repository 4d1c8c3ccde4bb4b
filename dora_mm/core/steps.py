"""The passes of the unmerged form, in plain torch. A backend replaces them: kernels/ has them in Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dora_mm.core.functional import (
    SMALL_GAIN,
    Adapter,
    RowGains,
    adapter_dtype,
    as_matrix,
    can_read,
    cast,
    exact_norm_correction,
    reads_wait,
    row_gains,
    row_norm,
)
from dora_mm.core.inference import InferenceFactors, unmerged_inference
from dora_mm.core.magnitude import magnitude_grad, magnitude_grad_of_output, unsafe_rows
from dora_mm.core.ops import Op, mean_square, per_row, sum_tokens
from dora_mm.core.passes import Options, PassCache, SavedPass
from dora_mm.core.reads import RowMask


class Steps:
    """The passes of the unmerged form in plain torch; a subclass has them in another implementation.

    Attributes:
        only_unmerged: Whether W(t) is never built here: the branch is added before the sum is rounded. Added to an
            already rounded product, small updates would be lost in half precision.
        takes_stacks: Whether a pass has all matrices of a stack, see `GroupedOp`; else it is made for each of them.
    """

    only_unmerged: bool = False
    takes_stacks: bool = False

    def keeps_output(self, x: Tensor) -> bool:
        """Whether dm can be computed from the output: it takes reading values.

        On a GPU it waits for them, once for all layers of a pass. Without waiting, dm takes a product of the layer's
        size, as in a graph: by estimate 0.3 ms for a kernel of 3 x 3 on 320 channels of four images of 128 x 128.
        """
        return can_read(x)

    def find_unsafe(
        self, options: Options, y: Tensor, bias: Tensor | None, adapters: Sequence[Adapter]
    ) -> RowMask | None:
        """Finds the rows whose dm must not be computed from the output, for a backward pass that would wait to know.

        Args:
            options: The options of the pass.
            y: The output.
            bias: b (O,), or None.
            adapters: The adapters, with n and g.

        Returns:
            The rows; None without a bias, where `RowGains.small` has them, where dm is not computed from y, and where
            reading values costs nothing.
        """
        if bias is None or len(adapters) > 1 or not options.save_output or not reads_wait(y):
            return None
        rows = adapters[0].rows
        return None if rows is None else RowMask(unsafe_rows(rows, bias, mean_square(options.op, y, bias), y.dtype))

    def prepare(
        self, weight: Tensor, adapters: Sequence[Adapter], cache: PassCache, dtype: torch.dtype
    ) -> tuple[Sequence[RowGains | None], Tensor | None]:
        """Prepares a pass.

        Args:
            weight: W0.
            adapters: The adapters.
            cache: What earlier passes left; n0 is left here.
            dtype: The dtype of the product.

        Returns:
            n and g of every adapter, and [A_1; A_2; ...] as the product reads it; None where `product` is to make it.
        """
        if cache.rows is not None:
            return cache.rows, None
        if cache.n0 is None and has_magnitude(adapters):
            cache.n0 = row_norm(weight.detach())
        return [row_gains(weight, adapter, cache.n0) for adapter in adapters], None

    def product(
        self,
        options: Options,
        dtype: torch.dtype,
        x: Tensor,
        source: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        adapters: Sequence[Adapter],
        operand: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Computes the output.

        Args:
            options: The options of the pass.
            dtype: The dtype of the product.
            x: Input of the layer.
            source: Input of the update: x, or what dropout leaves of it.
            weight: W0.
            bias: b (O,), or None.
            adapters: The adapters, with n and g.
            operand: From `prepare`.

        Returns:
            y = e x W0^T + h B'^T + b, in new memory, and h, the product of `source` and the A of all adapters, or None.
            In half precision the branch is part of the product, which can have no gain; embeddings have no product.
        """
        op, (A, B), h, W0 = options.op, branch(adapters), None, cast(weight, dtype)
        if A is not None:
            h = op.reduce(source, cast(A, dtype if op.merges else adapter_dtype(dtype)))
        if h is None or B is None or h.dtype.itemsize >= 4:
            return self.unmerged(op, x, W0, bias, base_gain(adapters), h, B), h
        assert not has_magnitude(adapters)  # a gain would scale what is rounded already: see `choose_form`
        if (options.cache or PassCache()).finds_update(B):
            x, W0 = op.join(x, W0, h, cast(B, dtype))
        return op(x, W0, bias), h

    def keep(
        self,
        options: Options,
        dtype: torch.dtype,
        bias: Tensor | None,
        adapters: Sequence[Adapter],
        operand: Tensor | None,
    ) -> Any:
        """Computes what `infer` needs besides x, W0 and b, from adapters with n and g; `operand` as in `product`."""
        (A, B), gain = branch(adapters), base_gain(adapters)
        shift = None if bias is None or gain is None else torch.addcmul(bias, gain, bias, value=-1)
        return InferenceFactors(A, B, gain, shift)

    def infer(
        self, options: Options, dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None, kept: Any
    ) -> Tensor:
        """Computes the output of a pass without gradients; `kept` is what `keep` has computed."""
        return unmerged_inference(options.op, x, cast(weight, dtype), bias, kept)

    def gradients(
        self, saved: SavedPass, dY: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:
        """Computes the gradients of x, of what dropout leaves of it, of the bias, and of A, B and m of each adapter.

        Args:
            saved: The pass, with h.
            dY: Gradient of the output.

        Returns:
            What the pass needs of them; the others are None.
        """
        op = saved.options.op
        needs_u = saved.needs_x or saved.needs_dropped
        gradients, u, A = adapter_gradients(saved, dY, saved.kept, needs_u=needs_u)
        dX = d_dropped = None
        if saved.needs_dropped and u is not None and A is not None:
            d_dropped = op.add_grad_reduced(dY.new_zeros(saved.x.shape), u, saved.x, cast(A, dY.dtype))
            u = A = None
        if saved.needs_x:
            W0 = cast(saved.weight, saved.dtype)
            dX = self.unmerged_grad_input(op, dY, saved.x, W0, base_gain(saved.adapters), u, A)
        return dX, d_dropped, bias_grad(saved, dY) if saved.needs_bias else None, gradients

    def unmerged(
        self,
        op: Op,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        base_gain: Tensor | None,
        h: Tensor | None,
        B: Tensor | None,
    ) -> Tensor:
        """Returns y = e x W0^T + h B^T + b, in new memory.

        Args:
            op: The operation of the layer.
            x: Input of the layer.
            weight: W0.
            bias: b (O,), or None.
            base_gain: e (O,), or None for 1.
            h: x A^T of all adapters, or None.
            B: What h is multiplied by (O, R), scaled by s, t and g, in the adapter's dtype.
        """
        # The bias is part of the product, as b / e, so that a fresh adapter (e = 1, B = 0) changes no bit. On a GPU,
        # where the sum is in fp32 until it is added, it is the same afterwards, and needs no waiting.
        outside = None
        if base_gain is not None and bias is not None:
            if base_gain.device.type == "cpu" and can_read(base_gain) and is_divisor(base_gain):
                bias = bias / base_gain
            else:
                bias, outside = None, bias
        y = op(x, weight, bias)
        dtype = y.dtype
        y = y.to(adapter_dtype(dtype))  # fp32 for an embedding in half precision, which is rounded once, at the end
        if base_gain is not None:
            y = y.mul_(per_row(op, base_gain, y))
        if h is not None and B is not None:
            y = op.add_expanded(y, h, B)
        if outside is not None:
            y = y.add_(per_row(op, outside, y))
        return y.to(dtype)

    def unmerged_grad_input(
        self,
        op: Op,
        dY: Tensor,
        x: Tensor,
        weight: Tensor,
        base_gain: Tensor | None,
        u: Tensor | None,
        A: Tensor | None,
    ) -> Tensor:
        """Returns dX = (e dY) W0 + u A. Of x only the shape is read."""
        dX = op.grad_input(dY if base_gain is None else dY * per_row(op, base_gain, dY), x, weight)
        return dX if u is None or A is None else op.add_grad_reduced(dX, u, x, cast(A, dX.dtype))


TORCH_STEPS = Steps()


# --- what they need of all adapters ----------------------------------------------------------------------------------


def has_magnitude(adapters: Sequence[Adapter]) -> bool:
    """Whether any adapter has a magnitude."""
    return any(a.magnitude is not None for a in adapters)


def base_gain(adapters: Sequence[Adapter]) -> Tensor | None:
    """Returns e = 1 + sum_k t_k (g_k - 1), (O,); None for 1."""
    total = None
    for adapter in adapters:
        if adapter.rows is not None:
            gain = adapter.rows.gain
            part = gain if adapter.strength == 1 else 1 + adapter.strength * (gain - 1)
            total = part if total is None else total + (part - 1)
    return total


def branch(adapters: Sequence[Adapter]) -> tuple[Tensor | None, Tensor | None]:
    """Returns A and B' of all adapters, concatenated along the rank; None where none has them."""
    A, B = [], []
    for adapter in adapters:
        if adapter.A is not None and adapter.B is not None:
            A.append(adapter.A)
            B.append(scaled(adapter.B, adapter))
    if len(A) > 1:
        return torch.cat(A), torch.cat(B, 1)
    return (A[0], B[0]) if A else (None, None)


def scaled(t: Tensor, adapter: Adapter) -> Tensor:
    """Multiplies B or dB (O, R) by strength, gain and scaling of the adapter."""
    factor = adapter.scaling * adapter.strength
    if adapter.rows is None:
        return t if factor == 1 else t * factor
    gain = adapter.rows.gain
    return t * (gain if factor == 1 else gain * factor).unsqueeze(1)


# --- their gradients -------------------------------------------------------------------------------------------------


def adapter_gradients(
    saved: SavedPass, dY: Tensor, h: Tensor | None = None, *, needs_u: bool = False
) -> tuple[list[Tensor | None], Tensor | None, Tensor | None]:
    """Computes the gradients of all adapters.

    Args:
        saved: The pass.
        dY: Gradient of the output.
        h: x A^T of all adapters, where it was kept.
        needs_u: Whether u is needed for the gradient of x.

    Returns:
        dA, dB and dm of each adapter, None where not needed; and u and A of all adapters, None where there are none.
    """
    op, adapters, needs = saved.options.op, saved.adapters, saved.needs
    A, B = branch(adapters)
    trains = any(needs[0::3]) or any(needs[1::3])
    u = dA = dB = None
    finish_dm = None if saved.y is None else magnitude_grad_of_output(op, dY, saved, adapters[0])
    if A is not None and B is not None and (trains or needs_u):
        u = op.grad_h(dY, cast(B, dY.dtype))
        if trains:
            h = cast(op.reduce(saved.x, cast(A, dY.dtype)) if h is None else h, dY.dtype)
            dA, dB = op.grad_A(u, saved.x, A), op.grad_B(dY, h, B)
    gradients: list[Tensor | None] = []
    first = 0
    for k, adapter in enumerate(adapters):
        is_exact = adapter.norm_grad == "exact" and adapter.rows is not None and dA is not None
        dm = None
        if needs[3 * k + 2] or is_exact:
            dm = magnitude_grad(op, dY, saved, adapter) if finish_dm is None else finish_dm()
        own_A = own_B = None
        if dA is not None and dB is not None and adapter.A is not None and adapter.B is not None:
            own_A, own_B, last = dA, dB, first + len(adapter.A)
            if len(adapters) > 1:
                own_A, own_B, first = dA[first:last], dB[:, first:last], last
            own_A = cast(own_A, adapter.A.dtype)
            if own_B.dtype != adapter.B.dtype:
                own_B = own_B.to(adapter.B.dtype, memory_format=torch.contiguous_format)
            own_B = scaled(own_B.contiguous(), adapter)
            if is_exact and dm is not None:
                more_A, more_B = exact_norm_correction(as_matrix(saved.weight), adapter, dm)
                own_A, own_B = own_A.add_(more_A), own_B.add_(more_B)
        gradients += [own_A, own_B, dm if needs[3 * k + 2] else None]
    return gradients, u, A


def is_divisor(gain: Tensor) -> bool:
    """Whether every |g| is above SMALL_GAIN; nearly always every g is, which takes one pass to see. Waits."""
    return gain.min().item() > SMALL_GAIN or not (gain.abs() <= SMALL_GAIN).any()


def bias_grad(saved: SavedPass, dY: Tensor) -> Tensor:
    """Returns db (O,)."""
    assert saved.bias is not None
    return sum_tokens(saved.options.op, dY).to(saved.bias.dtype)
