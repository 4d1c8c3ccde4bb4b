"""The base class of the adapted layers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dora_mm.core.adaptation import ADAPTER_NAMES, StackedAdapter
from dora_mm.core.functional import (
    Adapter,
    adapter_dtype,
    can_read,
    merged_weight,
    product_dtype,
    round_stochastically,
    seeded_generator,
    shares,
)
from dora_mm.core.inference import KeptPasses, is_inference, storages_of, versions_of
from dora_mm.core.ops import Op
from dora_mm.core.parameters import AdapterParameters
from dora_mm.core.passes import Options, PassCache
from dora_mm.core.spec import DoRASpec, finite_number
from dora_mm.core.wrappers.sharded import gathered, is_sharded, write
from dora_mm.core.wrappers.streaming import bring, is_streamed, keep

NOT_STACKED = "cannot hold several adapters: method full replaces the weight itself"


class AdaptedLayer(AdapterParameters):
    """Base class of all adapted layers: which layers they adapt, strength, the forward pass, merging.

    `adapt_layer` makes a base layer an adapted one in place, as torch's parametrizations do: the module object stays
    the same, and so do its hooks, the names `weight` and `bias`, and every reference to it.
    """

    parameter_names = (*ADAPTER_NAMES, "weight")
    base_class: type[nn.Module] = nn.Module  # the class of the layers that it adapts, see `class_for`
    not_full: str | None = None  # why the weight itself cannot be trained, after the path of the layer

    def __init__(self, *_: Any, **__: Any):
        raise TypeError(f"a {type(self).__name__} is made from a base layer: use inject or adapt_layer")

    @classmethod
    def class_for(cls, layer: nn.Module) -> type[AdaptedLayer] | None:
        """The class that adapts a layer: this one, or one made from it; None where it does not adapt such a layer."""
        return cls if type(layer) is cls.base_class and has_dense_weight(layer) else None

    @classmethod
    def why_not(cls, layer: nn.Module, path: str, spec: DoRASpec) -> str | None:
        """The reason why a layer that `class_for` accepts cannot be adapted, as an error message, or None."""
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
        return None

    # --- its adapters ---

    def adapters(self) -> tuple[Adapter, ...]:
        """The adapters whose strength is not 0, as the forward function takes them."""
        state, dtype = self.adaptation, adapter_dtype(self.tensor("weight").dtype)
        spec, found = state.spec, []
        if state.strength != 0:
            own = map(self.tensor, ADAPTER_NAMES)  # FSDP may have cast them
            A, B, m = (t if t is None or t.dtype == dtype else t.to(dtype) for t in own)
            found = [Adapter(A, B, m, spec.scaling, state.strength, spec.norm_grad)]
        for other in state.stacked.values():
            if other.strength != 0:
                (A, B, m), spec = map(other.tensors.get, ADAPTER_NAMES), other.spec
                found.append(Adapter(A, B, m, spec.scaling, other.strength, spec.norm_grad))
        return tuple(found)

    def check_can_stack(self, name: str, spec: DoRASpec) -> None:
        """Raises ValueError where the layer is merged, the method is `full`, or the name is taken."""
        self.check_not_merged()
        if spec.method == "full":
            raise ValueError(f"{self.adaptation.path} {NOT_STACKED}")
        if name == self.adaptation.name or name in self.adaptation.stacked:
            raise ValueError(f"{self.adaptation.path} has an adapter named {name!r} already: choose another name")

    def stack(
        self, name: str, spec: DoRASpec, tensors: Mapping[str, Tensor], strength: float, *, assists: bool = False
    ) -> None:
        """Adds a frozen adapter: the weight is then W0 + sum of strength_k (W'_k - W0).

        Args:
            name: A name that the layer does not have yet.
            spec: The settings of the adapter.
            tensors: Its tensors by the names of ADAPTER_NAMES; they are copied to the weight's device.
            strength: Its strength.
            assists: See `Adaptation`.

        Raises:
            ValueError: See `check_can_stack`.
        """
        self.check_can_stack(name, spec)
        device, dtype = self.weight.device, adapter_dtype(self.weight.dtype)
        copies = {n: t.detach().to(device, dtype, copy=True) for n, t in tensors.items()}
        self.adaptation.stacked[name] = StackedAdapter(spec, copies, finite_number("strength", strength), assists)
        self.adaptation.forget()

    def check_has_strength(self) -> None:
        """Raises ValueError where the layer has none: see `TrainedWeight`."""

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
        """Whether the forward pass is that of the base layer: merged, or strength 0."""
        state = self.adaptation
        if state.merged:
            return True
        return state.strength == 0 and not any(s.strength for s in state.stacked.values())

    def pass_cache(self, caches: dict[Hashable, PassCache], *, keeps: bool, dtype: Any = None) -> PassCache:
        """The cache for a pass, one of `caches`; `keeps` as in `PassCache`, `dtype` where the pass has its own."""
        # Tensors that were made in inference mode cannot be saved for a backward pass. (A compiler cannot ask for it.)
        inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
        weight = self.tensor("weight")
        key = (product_dtype(weight), weight.device, inference, dtype)
        cache = caches.get(key)
        if cache is None:
            cache = caches[key] = PassCache(keeps_base=True)
        cache.keeps = keeps
        return cache

    def kept_passes(self) -> KeptPasses | None:
        """The values that inference passes share, as long as no parameter changes; None for another pass.

        A pass of training discards it, since trainers may write to `.data`, which no version counts.
        """
        state = self.adaptation
        if not is_inference(self):
            state.kept = None
            return None
        own = [self.tensor(name) for name in ("weight", "bias", *ADAPTER_NAMES)]
        own += [t for other in state.stacked.values() for t in other.tensors.values()]
        versions = versions_of(own)
        if versions is None:
            return None
        made_of = versions, state.spec, state.strength, *((s.spec, s.strength) for s in state.stacked.values())
        kept = state.kept  # replicas of DataParallel share the state
        if kept is None or kept.made_of != made_of:
            state.kept = kept = KeptPasses(made_of, self.adapters(), {}, storages_of(own))
        return kept

    def keep_norm(self) -> None:
        """Computes n0 ahead of a compiled pass, where `fixed_parameters` keeps it.

        Else the first pass, which computes it, would be a graph of its own.
        """
        caches = self.adaptation.caches
        if caches is not None and not self.is_base():
            cache = self.pass_cache(caches, keeps=self.adaptation.num_passes is not None)
            if cache.n0 is None and self.magnitude is not None:
                cache.n0 = self.row_norms(self.full_matrix())

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
        state, bias = self.adaptation, self.tensor("bias") if use_bias else None
        adapters, options = self.settings_of_pass(op, dtype, restore, reads=can_read(x))
        cache = options.cache
        if options.is_inference or torch.compiler.is_compiling() or cache is None:
            return state.forward(x, self.matrix, bias, adapters, options)
        cache.checks_update = state.checks_update
        y = state.forward(x, self.matrix, bias, adapters, options)
        if cache.checks_update != state.checks_update:
            state.checks_update = cache.checks_update
        return y

    def settings_of_pass(
        self, op: Op, dtype: torch.dtype | None = None, restore: Callable[[], Tensor] | None = None, *, reads: bool
    ) -> tuple[Sequence[Adapter], Options]:
        """The adapters and the options of a pass; `reads` says whether it may read values, see `can_read`."""
        kept = self.kept_passes() if self.adaptation.caches is None and reads else None
        if kept is None:
            return self.adapters(), self.options(op, dtype, restore, is_compiling=torch.compiler.is_compiling())
        cache = self.pass_cache(kept.caches, keeps=True, dtype=dtype)
        return kept.adapters, Options(op, cache=cache, keep_weight=False, dtype=dtype, is_inference=True)

    def options(
        self,
        op: Op,
        dtype: torch.dtype | None = None,
        restore: Callable[[], Tensor] | None = None,
        *,
        is_compiling: bool = False,
    ) -> Options:
        """The options of a pass."""
        state, spec = self.adaptation, self.adaptation.spec
        dropout, keep_weight = spec.dropout if self.training else 0.0, restore is None and spec.cache == "weights"
        num_passes, cache = 1.0 if state.num_passes is None else state.num_passes, PassCache(keeps=False)
        if state.caches is not None:
            cache = self.pass_cache(state.caches, keeps=state.num_passes is not None)
        if is_compiling:  # a pass that reads what another one left would be another graph: only n0 is read
            cache, num_passes = PassCache(cache.n0, keeps=False), 1.0
        # by position, which takes half as long as by name
        return Options(op, dropout, keep_weight, spec.save_output, cache, num_passes, dtype, restore)

    # --- merging ---

    def check_not_merged(self) -> None:
        """Raises ValueError where the layer is merged already."""
        if self.adaptation.merged:
            raise ValueError(f"the adapter of {self.adaptation.path} is merged: call unmerge first")

    def check_can_merge(self) -> None:
        """Raises ValueError where the layer is merged already, or its weight cannot be replaced."""
        self.check_not_merged()
        self.check_unpacked()

    def check_unpacked(self) -> None:
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
        W0, state = self.full_matrix(), self.adaptation
        adapters = [a.with_tensors(*(None if t is None else gathered(t) for t in a[:3])) for a in self.adapters()]
        merged, sums = self.merged_matrix(W0, adapters, seeded_generator(state.seed, f"merge:{state.path}"))
        if keep_base:
            state.base_weight = self.base_to_keep()
        self.store(merged)
        state.merged = True
        self.adaptation.forget(base=True)
        return sums

    @staticmethod
    def merged_matrix(
        W0: Tensor, adapters: Sequence[Adapter], generator: torch.Generator
    ) -> tuple[Tensor, tuple[float, float]]:
        """W(t) in the dtype of W0 and new memory, and the sums that `merge` returns."""
        W = merged_weight(W0, adapters)
        if W.dtype != W0.dtype:
            merged = round_stochastically(W, W0.dtype, generator)
            return merged, shares(merged, W, W0)
        is_base = W.data_ptr() == W0.data_ptr()  # nothing was added: strength 0, or method full
        return W.clone() if is_base else W, (0.0, 0.0)

    def store(self, matrix: Tensor) -> None:
        """Makes a weight with output rows first the weight.

        It becomes a new Parameter: passes that were made before, and modules that share the old one, keep that.
        """
        stored = self.as_stored(matrix)
        if self.keeps_parameter():
            write(self.weight, stored)
            keep(self.owner)
        else:
            self.weight = nn.Parameter(stored, requires_grad=self.weight.requires_grad)

    @property
    def owner(self) -> nn.Module:
        """The module whose parameter the weight is."""
        return self

    def keeps_parameter(self) -> bool:
        """Whether the weight stays the same parameter: FSDP, or the block that is streamed, keeps its memory."""
        return is_sharded(self.weight) or is_streamed(self)

    def base_to_keep(self) -> Tensor:
        """The base weight for `put_back`; that of a streamed layer in main memory."""
        if not self.keeps_parameter():
            return self.weight
        base = self.weight.detach()
        return base.to("cpu", copy=True) if is_streamed(self) else base.clone()

    def put_back(self, base: Tensor) -> None:
        """Makes the base weight the weight again, on the device and in the dtype of the merged one."""
        if isinstance(base, nn.Parameter):
            base.data = base.data.to(self.weight.device, self.weight.dtype)
            self.weight = base
        else:
            bring(self)
            write(self.weight, gathered(base))
            keep(self.owner)

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

    def extra_repr(self) -> str:
        spec = self.adaptation.spec
        rank = f", rank={spec.rank}, alpha={spec.alpha:g}" if self.lora_A is not None else ""
        return f"{super().extra_repr()}, method={spec.method}{rank}"


def has_dense_weight(layer: nn.Module) -> bool:
    """False where the weight is of a subclass of Tensor, whose products compute something else."""
    weight = getattr(layer, "weight", None)
    return not isinstance(weight, Tensor) or type(weight) in (Tensor, nn.Parameter)


@contextmanager
def base_model(networks: Iterable[nn.Module], *, with_assistant: bool = False) -> Iterator[None]:
    """A context in which networks compute what they would without adapters, bit for bit: every strength is 0.

    Unlike `set_strength` it ends no `fixed_parameters`: base layers use nothing of what that keeps, and layers with an
    assistant keep what they need apart. Method `full` has no strength, and its layers stay as they are.

    Args:
        networks: Networks, adapted or not.
        with_assistant: Whether assistants stay at work: the model that a training over one starts from.
    """
    states = [m.adaptation for network in networks for m in network.modules() if isinstance(m, AdaptedLayer)]
    holders = [holder for state in states for holder in (state, *state.stacked.values())]
    holders = [holder for holder in holders if not (with_assistant and holder.assists)]
    assisted = [state for state in states if with_assistant and any(s.assists for s in state.stacked.values())]
    before, kept = [holder.strength for holder in holders], [(state.caches, state.num_passes) for state in assisted]
    try:
        for holder in holders:
            holder.strength = 0.0
        for state in assisted:
            state.caches = state.num_passes = None
        yield
    finally:
        for holder, strength in zip(holders, before, strict=True):
            holder.strength = strength
        for state, (caches, num_passes) in zip(assisted, kept, strict=True):
            state.caches, state.num_passes = caches, num_passes
