"""The base class of the adapted layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dora_mm.core.adaptation import ADAPTER_NAMES, Adaptation, StackedAdapter
from dora_mm.core.functional import Adapter, adapter_dtype, merged_weight, product_dtype, row_norm
from dora_mm.core.ops import Op
from dora_mm.core.passes import Options, PassCache
from dora_mm.core.rounding import round_stochastically, seeded_generator, shares
from dora_mm.core.spec import DoRASpec, finite_number
from dora_mm.core.wrappers.sharded import is_sharded, whole, write


class AdaptedLayer(nn.Module):
    """What all adapted layers share: the parameters of the adapter, and what keeps them valid.

    `adapt_layer` makes a base layer an adapted one in place, as torch's parametrizations do: the module object stays
    the same, and so do its hooks, the names `weight` and `bias`, and every reference to it. A, B and m stay in fp32
    whatever the layer is cast to (float64 with a float64 weight).
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_A: nn.Parameter | None  # (R, I), in a convolution (R, I / groups, *K)
    lora_B: nn.Parameter | None  # (O, R)
    magnitude: nn.Parameter | None  # (O,)
    adaptation: Adaptation
    parameter_names = (*ADAPTER_NAMES, "weight")
    base_class: type[nn.Module] | None = None  # the class of the layers that it adapts, where it is one

    def __init__(self, *_: Any, **__: Any):
        raise TypeError(f"a {type(self).__name__} is made from a base layer: use inject or adapt_layer")

    @classmethod
    def class_for(cls, layer: nn.Module) -> type[AdaptedLayer] | None:
        """The class that adapts a layer: this one, or one made from it; None where it does not adapt such a layer."""
        return cls if type(layer) is cls.base_class and has_plain_weight(layer) else None

    @classmethod
    def why_not(cls, layer: nn.Module, path: str, spec: DoRASpec) -> str | None:
        """Why a layer for which `class_for` returns this class cannot be adapted, as an error message, or None."""
        if "weight" in cls.parameter_names and "weight" not in layer._parameters:
            return (
                f"the weight of {path} is computed from other parameters (weight_norm, spectral_norm, prune or another "
                "parametrization): remove that first"
            )
        if taken := next((name for name in (*ADAPTER_NAMES, "adaptation") if hasattr(layer, name)), None):
            return f"{path} has an attribute {taken} of its own, which its adapter needs"
        if layer.get_parameter("weight").numel() == 0:
            return f"the weight of {path} is empty, so there is nothing to adapt"
        if "forward" in vars(layer):
            return f"the forward function of {path} was replaced (a hook of accelerate?): inject before that"
        if spec.method == "full" and layer.get_parameter("weight").dtype.itemsize < 4:
            return f"method full trains {path} itself, and half precision loses small steps: load it in float32"
        return None

    @property
    def matrix(self) -> Tensor:
        """The weight with output rows first, (O, I) or (O, I / groups, *K): a view where it is stored otherwise."""
        return self.weight

    def as_stored(self, matrix: Tensor) -> Tensor:
        """Converts a weight with output rows first to how the layer stores it, or back: it is its own inverse."""
        return matrix

    # --- the adapter ---

    def reset_adapter(self) -> None:
        """Draws A from (seed, path), and sets B to 0 and m to the row norms: the layer computes what its base does."""
        W0, state = whole(self.matrix), self.adaptation
        dtype, fan_in = adapter_dtype(W0.dtype), W0[0].numel()
        if state.spec.method in ("dora", "lora"):
            # the same numbers for every dtype and device; kaiming_uniform_(a=sqrt(5)) is U(-1, 1) / sqrt(fan_in)
            A = torch.empty(state.spec.rank, *W0.shape[1:], dtype=torch.float32, device="cpu")
            A.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=seeded_generator(state.seed, state.path))
            self._set("lora_A", A.to(W0.device, dtype))
            self._set("lora_B", torch.zeros(W0.shape[0], state.spec.rank, dtype=dtype, device=W0.device))
        self.reset_magnitude()

    def reset_magnitude(self) -> None:
        """Sets m to the row norms of the weight as it is now."""
        state = self.adaptation
        state.made_for = self.weight.device, self.weight.dtype
        if state.spec.method in ("dora", "magnitude"):
            state.first_magnitude = row_norm(whole(self.matrix))
            self._set("magnitude", state.first_magnitude.clone())

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
        if self.lora_B is not None and bool(whole(self.lora_B).any()):
            return False
        if self.magnitude is None or first is None:
            return True
        m = whole(self.magnitude)
        first = first.to(m)
        return bool(((m == first) | (m.isnan() & first.isnan())).all())

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name: `lora_A`, `lora_B`, `magnitude`, those that exist; `weight` for `full`."""
        if self.adaptation.spec.method == "full":
            return {"weight": self.weight}
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
        return whole(self.matrix if base is None else self.as_stored(base))

    def adapters(self) -> tuple[Adapter, ...]:
        """What the forward function needs of every adapter whose strength is not 0."""
        state, dtype = self.adaptation, adapter_dtype(self.weight.dtype)
        # getattr, since DataParallel's copies have tensors instead of parameters. FSDP may have cast them.
        own = {name: None if (t := getattr(self, name, None)) is None else t.to(dtype) for name in ADAPTER_NAMES}
        others = [(s.spec, s.tensors, s.strength) for s in state.stacked.values()]
        return tuple(
            Adapter(*map(tensors.get, ADAPTER_NAMES), scaling=spec.scaling, strength=strength, norm_grad=spec.norm_grad)
            for spec, tensors, strength in ((state.spec, own, state.strength), *others)
            if strength != 0
        )

    def check_can_stack(self, name: str, spec: DoRASpec) -> None:
        """Raises ValueError where the layer is merged, a method is `full`, or the name is taken."""
        self.check_not_merged()
        if "full" in (spec.method, self.adaptation.spec.method):
            raise ValueError(
                f"{self.adaptation.path} cannot hold several adapters: method full replaces the weight itself"
            )
        if name == self.adaptation.name or name in self.adaptation.stacked:
            raise ValueError(f"{self.adaptation.path} has an adapter named {name!r} already: choose another name")

    def stack(self, name: str, spec: DoRASpec, tensors: Mapping[str, Tensor], strength: float) -> None:
        """Adds an adapter for inference: the weight is then W0 + sum of strength_k (W'_k - W0).

        Args:
            name: A name that the layer does not have yet.
            spec: The settings of the adapter.
            tensors: Its tensors by the names of ADAPTER_NAMES; they are copied to the weight's device.
            strength: Its strength.

        Raises:
            ValueError: See `check_can_stack`.
        """
        self.check_can_stack(name, spec)
        device, dtype = self.weight.device, adapter_dtype(self.weight.dtype)
        copies = {n: t.detach().to(device, dtype, copy=True) for n, t in tensors.items()}
        self.adaptation.stacked[name] = StackedAdapter(spec, copies, finite_number("strength", strength))
        self.adaptation.forget()

    def check_has_strength(self) -> None:
        """Raises ValueError for method `full`."""
        if self.adaptation.spec.method == "full":
            raise ValueError(
                f"{self.adaptation.path} was trained with method full, which keeps no base: it has no strength"
            )

    def set_strength(self, strength: float, name: str | None = None) -> None:
        """Sets the strength of the adapter `name`, or of all adapters of the layer if it is None.

        Raises:
            ValueError: The strength is not a finite number, the layer is merged, or was trained with method `full`.
        """
        strength, state = finite_number("strength", strength), self.adaptation
        self.check_has_strength()
        self.check_not_merged()
        if name in (None, state.name):
            state.strength = strength
        for other, stacked in state.stacked.items():
            if name in (None, other):
                stacked.strength = strength
        self.adaptation.forget()

    # --- the forward pass ---

    def is_base(self) -> bool:
        """Whether the forward pass is that of the base layer: merged, method `full`, or strength 0."""
        state = self.adaptation
        if state.merged or state.spec.method == "full":
            return True
        return state.strength == 0 and not any(s.strength for s in state.stacked.values())

    def pass_cache(self) -> PassCache | None:
        """What `fixed_parameters` keeps for a pass; None outside of it, where every pass reads the parameters."""
        state = self.adaptation
        if state.caches is None:
            return None
        # Tensors that were made in inference mode cannot be saved for a backward pass. (A compiler cannot ask for it.)
        inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
        key = product_dtype(self.weight), self.weight.device, inference
        if key not in state.caches:
            state.caches[key] = PassCache(row_norm(self.matrix.detach()))
        return PassCache(state.caches[key].n0) if state.num_passes is None else state.caches[key]

    def adapted_product(
        self,
        x: Tensor,
        op: Op,
        *,
        use_bias: bool = True,
        dtype: torch.dtype | None = None,
        restore: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Runs the forward function on x: see `forms.adapted_product`."""
        spec = self.adaptation.spec
        options = Options(
            op,
            spec.dropout if self.training else 0.0,
            keep_weight=restore is None and spec.cache == "weights",
            save_output=spec.save_output,
            cache=self.pass_cache(),
            num_passes=1.0 if self.adaptation.num_passes is None else self.adaptation.num_passes,
            dtype=dtype,
            restore=restore,
        )
        bias = self.bias if use_bias else None
        return self.adaptation.forward(x, self.matrix, bias, self.adapters(), options)

    # --- merging ---

    def check_not_merged(self) -> None:
        """Raises ValueError where the layer is merged already."""
        if self.adaptation.merged:
            raise ValueError(f"the adapter of {self.adaptation.path} is merged: call unmerge first")

    def check_can_merge(self) -> None:
        """Raises ValueError where the layer is merged already, or its weight cannot be replaced."""
        self.check_not_merged()
        self.check_plain()

    def check_plain(self) -> None:
        """Raises ValueError where A, B, m or the weight are no longer parameters of the layer."""
        for name in self.parameter_names:
            if name not in self._parameters:
                raise ValueError(f"{name} of {self.adaptation.path} is parametrized: remove the parametrization first")

    def merge(self, *, keep_base: bool) -> tuple[float, float]:
        """Replaces the weight by W(t), stochastically rounded in half precision.

        Args:
            keep_base: Whether the weight is kept for `unmerge`.

        Returns:
            The inner products <stored update, update> and <update, update>, whose ratio is the fraction of the update
            that the stored weight contains; zeros where nothing was rounded.

        Raises:
            ValueError: See `check_can_merge`.
        """
        self.check_can_merge()
        W0, state = whole(self.matrix), self.adaptation
        adapters = [a.with_tensors(*(None if t is None else whole(t) for t in a[:3])) for a in self.adapters()]
        W = merged_weight(W0, adapters)
        merged, sums = W, (0.0, 0.0)
        if W.dtype != W0.dtype:
            merged = round_stochastically(W, W0.dtype, seeded_generator(state.seed, f"merge:{state.path}"))
            sums = shares(merged, W, W0)
        elif W.data_ptr() == W0.data_ptr():  # nothing was added: strength 0, or method full
            merged = W.clone()
        base = self.weight.detach().clone() if is_sharded(self.weight) else self.weight
        state.base_weight = base if keep_base else None
        self.store(merged)
        state.merged = True
        self.adaptation.forget(base=True)
        return sums

    def store(self, matrix: Tensor) -> None:
        """Makes a weight with output rows first the weight.

        It becomes a new Parameter: passes that were made before, and modules that share the old one, keep that.
        """
        stored = self.as_stored(matrix)
        if is_sharded(self.weight):
            write(self.weight, stored)
        else:
            self.weight = nn.Parameter(stored, requires_grad=self.weight.requires_grad)

    def put_back(self, base: Tensor) -> None:
        """Makes the base weight the weight again, on the device and in the dtype of the merged one."""
        if isinstance(base, nn.Parameter):
            base.data = base.data.to(self.weight.device, self.weight.dtype)
            self.weight = base
        else:
            write(self.weight, whole(base))

    def check_can_unmerge(self) -> None:
        """Raises ValueError where the base weight was not kept."""
        if self.adaptation.merged and self.adaptation.base_weight is None:
            raise ValueError(
                f"{self.adaptation.path} was merged with keep_base=False, so the base weight is gone: load the model "
                "again"
            )

    def unmerge(self) -> None:
        """Restores the base weight bit for bit; does nothing where the layer is not merged.

        Raises:
            ValueError: The base weight was not kept.
        """
        self.check_can_unmerge()
        state = self.adaptation
        if state.base_weight is not None:
            self.put_back(state.base_weight)
            state.base_weight, state.merged = None, False
            self.follow_weight()

    # --- moving, casting, loading, copying ---

    def _apply(self, fn, recurse=True):
        """What `.to`, `.half` and `.cuda` call: A, B and m keep their precision, and a fresh adapter stays a no-op."""
        own = [t for p in self.adapter_tensors().values() if p is not self.weight for t in (p, p.grad)]
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
            redraw: Whether A, B or m were on `meta`: they are drawn, if the weight has memory now.
        """
        state, made_for = self.adaptation, (self.weight.device, self.weight.dtype)
        self.adaptation.forget(base=True)
        if state.made_for == made_for or state.merged or state.spec.method == "full":
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
        bare = not given and prefix + "weight" in state_dict and self.adaptation.spec.method != "full"
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
        if self.weight.is_meta or self.adaptation.spec.method == "full":
            return
        if bare and any(t.is_meta for t in self.adapter_tensors().values()):
            self.reset_adapter()
        elif bare or self.is_fresh():  # or A, B and m came from this model, and the weight of another: torch's DCP
            self.reset_magnitude()
        else:
            self.remember_norms()

    def remember_norms(self) -> None:
        """Makes the norms of the weight as it is now those of a fresh adapter."""
        state = self.adaptation
        state.made_for = self.weight.device, self.weight.dtype
        if self.magnitude is not None:
            state.first_magnitude = row_norm(whole(self.matrix))

    def why_not_load(self, *, bare: bool) -> str | None:
        """Why a state dict cannot be loaded, or None.

        Args:
            bare: Whether the state dict has the weight but no adapter.
        """
        if self.adaptation.merged:
            return f"{self.adaptation.path} is merged: call unmerge before loading a state dict"
        if bare and not self.weight.is_meta and (self.adaptation.stacked or not self.is_fresh()):
            return f"{self.adaptation.path} has a trained adapter but the state dict has none: call remove first"
        return None

    def extra_repr(self) -> str:
        spec = self.adaptation.spec
        rank = f", rank={spec.rank}, alpha={spec.alpha:g}" if self.lora_A is not None else ""
        return f"{super().extra_repr()}, method={spec.method}{rank}"


def has_plain_weight(layer: nn.Module) -> bool:
    """False where the weight is of a subclass of Tensor, whose products compute something else."""
    weight = getattr(layer, "weight", None)
    return not isinstance(weight, Tensor) or type(weight) in (Tensor, nn.Parameter)
