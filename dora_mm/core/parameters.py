"""The parameters of an adapted layer, and what keeps them valid: drawn, moved, cast, loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dora_mm.core.adaptation import ADAPTER_NAMES, Adaptation
from dora_mm.core.functional import adapter_dtype, row_norm, seeded_generator
from dora_mm.core.wrappers.sharded import gathered, is_sharded, write
from dora_mm.core.wrappers.streaming import bring


class AdapterParameters(nn.Module):
    """The weight of the base layer, and A, B and m.

    A, B and m stay in fp32 whatever the layer is cast to (float64 with a float64 weight), and a fresh adapter computes
    what the base does, whatever happens to the weight.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_A: nn.Parameter | None  # (R, I), in a convolution (R, I / groups, *K)
    lora_B: nn.Parameter | None  # (O, R)
    magnitude: nn.Parameter | None  # (O,)
    adaptation: Adaptation

    @property
    def matrix(self) -> Tensor:
        """The weight with output rows first, (O, I) or (O, I / groups, *K): a view where it is stored otherwise."""
        return self.tensor("weight")

    def full_matrix(self) -> Tensor:
        """The matrix outside of a pass: gathered where it is sharded, brought where it is streamed; detached."""
        bring(self)
        return gathered(self.matrix)

    def tensor(self, name: str) -> Any:
        """A parameter, or the tensor that replaces it in DataParallel's copies and parametrized layers; None if absent.

        Every pass reads some, and nn.Module's attributes take four times as long.
        """
        own = self._parameters
        return own[name] if name in own else getattr(self, name, None)

    def as_stored(self, matrix: Tensor) -> Tensor:
        """Converts a weight with output rows first to how the layer stores it, or back: it is its own inverse."""
        return matrix

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name: `lora_A`, `lora_B`, `magnitude`, those that exist."""
        found = {name: getattr(self, name) for name in ADAPTER_NAMES}
        return {name: parameter for name, parameter in found.items() if parameter is not None}

    def base_matrix(self) -> Tensor:
        """Returns all of W0 with output rows first, also where the layer is merged.

        Raises:
            ValueError: It was merged with `keep_base=False`.
        """
        base = self.adaptation.base_weight
        if self.adaptation.merged and base is None:
            raise ValueError(
                f"{self.adaptation.path} was merged with keep_base=False: only strength 1 does not need the base"
            )
        return self.full_matrix() if base is None else gathered(self.as_stored(base))

    # --- a fresh adapter ---

    def reset_adapter(self) -> None:
        """Draws A from (seed, path), and sets B to 0 and m to the row norms: the layer computes what its base does."""
        W0, state = self.full_matrix(), self.adaptation
        state.forget()
        dtype = adapter_dtype(W0.dtype)
        if state.spec.method in ("dora", "lora"):
            shape_A, shape_B, fan_in = self.adapter_shapes(W0, state.spec.rank)
            # the same numbers for every dtype and device; kaiming_uniform_(a=sqrt(5)) is U(-1, 1) / sqrt(fan_in)
            A = torch.empty(shape_A, dtype=torch.float32, device="cpu")
            A.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=seeded_generator(state.seed, state.path))
            self._set("lora_A", A.to(W0.device, dtype))
            self._set("lora_B", torch.zeros(shape_B, dtype=dtype, device=W0.device))
        self.reset_magnitude()

    @staticmethod
    def adapter_shapes(W0: Tensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """The shapes of A and B for a weight with output rows first, and the number of inputs of a row."""
        return (rank, *W0.shape[1:]), (W0.shape[0], rank), W0[0].numel()

    @staticmethod
    def row_norms(W0: Tensor) -> Tensor:
        """The row norms of a weight with output rows first, in the shape of m."""
        return row_norm(W0)

    def reset_magnitude(self) -> None:
        """Sets m to the row norms of the weight as it is now."""
        self.remember_norms()
        first = self.adaptation.first_magnitude
        if first is not None:
            self._set("magnitude", first.clone())

    def remember_norms(self) -> None:
        """Makes the norms of the weight as it is now those of a fresh adapter."""
        state = self.adaptation
        state.made_for = self.weight.device, self.weight.dtype
        if state.spec.method in ("dora", "magnitude"):
            state.first_magnitude = self.row_norms(self.full_matrix())

    def _set(self, name: str, value: Tensor) -> None:
        parameter = getattr(self, name)
        if parameter is None or parameter.is_meta:
            setattr(self, name, nn.Parameter(value, requires_grad=parameter is None or parameter.requires_grad))
        elif is_sharded(parameter):
            write(parameter, value)
        else:
            parameter.data = value

    def is_fresh(self) -> bool:
        """Whether A, B and m were not trained: B is 0 and m is what it was set to."""
        first = self.adaptation.first_magnitude
        if self.lora_B is not None and bool(gathered(self.lora_B).any()):
            return False
        if self.magnitude is None or first is None:
            return True
        m = gathered(self.magnitude)
        first = first.to(m)
        return bool(((m == first) | (m.isnan() & first.isnan())).all())

    # --- moving, casting, loading, copying ---

    def _apply(self, fn, recurse=True):
        """Implements `.to`, `.half` and `.cuda`: A, B and m keep their precision, and a fresh adapter stays a no-op."""
        own = [t for p in AdapterParameters.adapter_tensors(self).values() for t in (p, p.grad)]
        redraw = any(t is not None and t.is_meta for t in own)

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            wanted = adapter_dtype(moved.dtype)
            return moved if moved.dtype == wanted else tensor.to(moved.device, wanted)

        super()._apply(lambda t: keep_precision(t) if any(t is o for o in own) else fn(t), recurse)
        for stacked in self.adaptation.stacked.values():
            stacked.tensors = {name: keep_precision(tensor) for name, tensor in stacked.tensors.items()}
        self.follow_weight(redraw=redraw)
        return self

    def follow_weight(self, *, redraw: bool = False) -> None:
        """Keeps a fresh adapter a no-op where the weight was moved or cast, by this layer or by one that shares it.

        The norms of a rounded weight, or of another device, differ in the last bits.

        Args:
            redraw: Whether A, B or m were on `meta`: they are initialized, if the weight has memory now.
        """
        state, made_for = self.adaptation, (self.weight.device, self.weight.dtype)
        self.adaptation.forget(base=True)
        if state.made_for == made_for or state.merged:
            return
        if self.weight.is_meta:
            state.made_for = made_for
        elif redraw:
            self.reset_adapter()
        elif state.made_for[0].type == "meta":
            self.remember_norms()
        elif self.is_fresh():
            self.reset_magnitude()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """A merged layer is saved as the base layer that it is: with its adapter, the update would be applied twice."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.adaptation.merged:
            for name in ADAPTER_NAMES:
                destination.pop(prefix + name, None)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        """Loads a state dict of the base model strictly: m of a fresh adapter is then computed from the new weight."""
        self.adaptation.forget(base=True)
        given = {name: state_dict[prefix + name] for name in ADAPTER_NAMES if prefix + name in state_dict}
        bare = not given and prefix + "weight" in state_dict
        if problem := self.why_not_load(bare=bare):
            errors.append(problem)
            return
        local = {k: v for k, v in state_dict.items() if k.startswith(prefix)}
        wanted = adapter_dtype(self.weight.dtype)
        local.update({prefix + name: t.to(wanted) for name, t in given.items()})  # `assign=True` would keep their dtype
        found: list[str] = []
        super()._load_from_state_dict(local, prefix, local_metadata, strict, found, unexpected, errors)
        adapter_keys = {prefix + name for name in ADAPTER_NAMES} if bare else set()
        missing.extend(key for key in found if key not in adapter_keys)
        self.after_load(bare=bare)

    def after_load(self, *, bare: bool) -> None:
        """Makes the adapter one of the loaded weight; `bare` as in `why_not_load`."""
        if self.weight.is_meta:
            return
        if bare and any(t.is_meta for t in self.adapter_tensors().values()):
            self.reset_adapter()
        elif bare or self.is_fresh():  # or A, B and m came from this model, and the weight of another: torch's DCP
            self.reset_magnitude()
        else:
            self.remember_norms()

    def why_not_load(self, *, bare: bool) -> str | None:
        """The reason why a state dict cannot be loaded, as an error message, or None.

        Args:
            bare: Whether the state dict has the weight but no adapter.
        """
        if self.adaptation.merged:
            return f"{self.adaptation.path} is merged: call unmerge before loading a state dict"
        if bare and not self.weight.is_meta and (self.adaptation.stacked or not self.is_fresh()):
            return f"{self.adaptation.path} has a trained adapter but the state dict has none: call remove first"
        return None
