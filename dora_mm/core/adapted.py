"""The base class of the adapted layers: a layer with an adapter registered on it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dora_mm.core.functional import Adapter, adapter_dtype, merged_weight, product_dtype, rescaled, row_norm
from dora_mm.core.fused import Forward, Prepared
from dora_mm.core.products import Product

METHODS = ("dora", "lora", "magnitude", "full")
NORM_GRADS = ("detached", "exact")
CACHES = ("weights", "norms")
ADAPTER_NAMES = ("lora_A", "lora_B", "magnitude")


@dataclass(frozen=True)
class DoRASpec:
    """How layers are adapted.

    Attributes:
        rank: The rank R of A (R, I) and B (O, R); at least 1.
        alpha: The update B A is scaled by alpha / rank. None sets alpha to rank.
        dropout: Probability of dropping entries of the input in the update only; at least 0 and below 1.
        method: `dora`; `lora` (no magnitude); `magnitude` (no A and B); `full` (trains `weight`, adds nothing).
        norm_grad: `detached` (the paper's default) treats the norm as a constant in the backward pass; `exact` does
            not.
        cache: `weights` keeps the W' that the forward pass of a layer builds until its backward pass, and inside
            `fixed_parameters` until its end. `norms` builds it again, which takes time and saves the memory of one more
            weight per layer.
        save_output: Whether the output of a layer may be kept for the backward pass. Set it to False where the model
            overwrites that output in place; it costs one more product in the backward pass.

    Raises:
        ValueError: A setting is out of its range.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    method: str = "dora"
    norm_grad: str = "detached"
    cache: str = "weights"
    save_output: bool = True

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, not {self.method!r}")
        if self.norm_grad not in NORM_GRADS:
            raise ValueError(f"norm_grad must be one of {', '.join(NORM_GRADS)}, not {self.norm_grad!r}")
        if self.cache not in CACHES:
            raise ValueError(f"cache must be one of {', '.join(CACHES)}, not {self.cache!r}")
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(self.rank))
        if not math.isfinite(self.alpha or 0.0):
            raise ValueError(f"alpha must be a finite number, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")

    @property
    def scaling(self) -> float:
        """The factor s = alpha / rank of the update."""
        assert self.alpha is not None
        return self.alpha / self.rank


@dataclass
class StackedAdapter:
    """One more adapter on a layer, for inference: its tensors are not parameters, and not part of a state dict."""

    spec: DoRASpec
    tensors: dict[str, Tensor]  # by the names of ADAPTER_NAMES
    strength: float


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
    base_class: type[nn.Module]
    spec: DoRASpec
    path: str
    seed: int
    name: str  # of the adapter that A, B and m belong to
    strength: float
    stacked: dict[str, StackedAdapter]
    function: Forward
    trainable_before: bool
    merged: bool
    base_weight: tuple[nn.Parameter | None]  # while merged; the tuple hides it from the module's parameters
    kept: dict[torch.dtype, Prepared] | None  # inside `fixed_parameters`, by the dtype of the product
    num_passes: float  # the number of passes inside `fixed_parameters`
    base_fixed: bool  # inside `fixed_parameters`, also with `base_only`
    base_norm: Tensor | None  # n0, while base_fixed

    def __init__(self, *_: Any, **__: Any):
        raise TypeError(f"a {type(self).__name__} is made from a base layer: use inject or adapt_layer")

    @property
    def matrix(self) -> Tensor:
        """The weight with output rows first, (O, I) or (O, I / groups, *K): a view where it is stored otherwise."""
        return self.weight

    def as_stored(self, matrix: Tensor) -> Tensor:
        """Returns a weight with output rows first, shaped like `matrix`, as the layer stores it."""
        return matrix

    # --- the adapter ---

    def reset_adapter(self) -> None:
        """Draws A from (seed, path), and sets B to 0 and m to the row norms: the layer computes what its base does."""
        W0 = self.matrix.detach()
        dtype, device, fan_in = adapter_dtype(W0.dtype), W0.device, W0[0].numel()
        if self.spec.method in ("dora", "lora"):
            A = torch.empty(self.spec.rank, *W0.shape[1:], device="cpu")  # the same numbers for every dtype and device
            A.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=seeded_generator(self.seed, self.path))
            self.lora_A = nn.Parameter(A.to(device, dtype))  # kaiming_uniform_(a=sqrt(5)) is U(-1, 1) / sqrt(fan_in)
            self.lora_B = nn.Parameter(torch.zeros(W0.shape[0], self.spec.rank, dtype=dtype, device=device))
        if self.spec.method in ("dora", "magnitude"):
            self.magnitude = nn.Parameter(row_norm(W0))

    def reset_magnitude(self) -> None:
        """Sets m to the row norms again, after the weight of a fresh adapter has changed."""
        if self.magnitude is not None:
            self.magnitude.data = row_norm(self.matrix.detach())

    def is_fresh(self) -> bool:
        """Whether the adapter is still a no-op: B = 0 and m = n0 bit for bit."""
        if self.stacked or (self.lora_B is not None and bool(self.lora_B.any())):
            return False
        if self.magnitude is None:
            return True
        n0 = row_norm(self.matrix.detach())
        return bool(((self.magnitude == n0) | (self.magnitude.isnan() & n0.isnan())).all())

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name: `lora_A`, `lora_B`, `magnitude`, those that exist; `weight` for `full`."""
        if self.spec.method == "full":
            return {"weight": self.weight}
        found = {name: self._parameters[name] for name in ADAPTER_NAMES}
        return {name: parameter for name, parameter in found.items() if parameter is not None}

    def tensors_at(self, strength: float) -> dict[str, Tensor]:
        """Returns `adapter_tensors` of the adapter whose strength 1 is the given strength of this one.

        Args:
            strength: The strength; what `set_strength` was called with has no effect.

        Raises:
            ValueError: Method `full` has no strength, or there is no such adapter (see `functional.rescaled`).
        """
        tensors: dict[str, Tensor] = dict(self.adapter_tensors())
        if strength == 1:
            return tensors
        self.check_has_strength()
        own = Adapter(tensors.get("lora_A"), tensors.get("lora_B"), tensors.get("magnitude"), self.spec.scaling)
        scaled = rescaled(self.matrix, own, strength)
        return {name: tensor for name, tensor in zip(ADAPTER_NAMES, scaled[:3], strict=True) if tensor is not None}

    def adapters(self) -> tuple[Adapter, ...]:
        """What the forward function needs of every adapter whose strength is not 0."""
        own = self.spec, self._parameters, self.strength
        others = [(s.spec, s.tensors, s.strength) for s in self.stacked.values()]
        return tuple(
            Adapter(*map(tensors.get, ADAPTER_NAMES), scaling=spec.scaling, strength=strength, norm_grad=spec.norm_grad)
            for spec, tensors, strength in (own, *others)
            if strength != 0
        )

    def check_can_stack(self, name: str, spec: DoRASpec) -> None:
        """Checks that an adapter can be stacked on this layer.

        Raises:
            ValueError: The layer is merged, one of the methods is `full`, or the name is taken.
        """
        self.check_can_merge()
        if "full" in (spec.method, self.spec.method):
            raise ValueError(f"{self.path} cannot hold several adapters: method full replaces the weight itself")
        if name == self.name or name in self.stacked:
            raise ValueError(f"{self.path} has an adapter named {name!r} already: choose another name")

    def stack(self, name: str, spec: DoRASpec, tensors: Mapping[str, Tensor], strength: float) -> None:
        """Adds an adapter for inference: the weight is then W0 + sum of strength_k (W'_k - W0).

        Args:
            name: A name that the layer does not have yet.
            spec: The settings of the adapter.
            tensors: Its tensors by the names of ADAPTER_NAMES; they are detached and moved to the weight's device.
            strength: Its strength.

        Raises:
            ValueError: See `check_can_stack`.
        """
        self.check_can_stack(name, spec)
        device, dtype = self.weight.device, adapter_dtype(self.weight.dtype)
        self.stacked[name] = StackedAdapter(
            spec, {n: t.detach().to(device, dtype) for n, t in tensors.items()}, strength
        )
        self.end_fixed()

    def check_has_strength(self) -> None:
        """Raises ValueError for method `full`."""
        if self.spec.method == "full":
            raise ValueError(f"{self.path} was trained with method full, which keeps no base: it has no strength")

    def set_strength(self, strength: float, name: str | None = None) -> None:
        """Sets the strength of the adapter `name`, or of all adapters of the layer if it is None.

        Raises:
            ValueError: The layer is merged, or was trained with method `full`.
        """
        self.check_has_strength()
        self.check_can_merge()
        if name in (None, self.name):
            self.strength = float(strength)
        for other, stacked in self.stacked.items():
            if name in (None, other):
                stacked.strength = float(strength)
        self.end_fixed()

    # --- the forward pass ---

    def is_base(self) -> bool:
        """Whether the forward pass is that of the base layer: merged, method `full`, or strength 0."""
        if self.merged or self.spec.method == "full":
            return True
        return self.strength == 0 and not any(s.strength for s in self.stacked.values())

    def active_dropout(self) -> float:
        """The probability of dropout: 0 in eval mode."""
        return self.spec.dropout if self.training else 0.0

    def prepared(self) -> Prepared | None:
        """What `fixed_parameters` keeps; None outside of it, where every pass reads the parameters."""
        if not self.base_fixed:
            return None
        if self.base_norm is None:
            self.base_norm = row_norm(self.matrix.detach())
        if self.kept is None:
            return Prepared(self.base_norm)
        return self.kept.setdefault(product_dtype(self.weight), Prepared(self.base_norm, self.num_passes))

    def adapted_product(
        self,
        x: Tensor,
        product: Product,
        *,
        dtype: torch.dtype | None = None,
        restore: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Runs the forward function on x: see `fused.adapted_product`."""
        return self.function(
            x,
            self.matrix,
            self.bias,
            self.adapters(),
            product=product,
            dropout=self.active_dropout(),
            prepared=self.prepared(),
            keep_weight=restore is None and self.spec.cache == "weights",
            save_output=self.spec.save_output,
            dtype=dtype,
            restore=restore,
        )

    def end_fixed(self, *, base: bool = False) -> None:
        """Discards what `fixed_parameters` keeps of the adapters and, with `base`, of the base weight."""
        self.kept = None
        if base:
            self.base_fixed, self.base_norm = False, None

    # --- merging ---

    def check_can_merge(self) -> None:
        """Raises ValueError where the layer is merged already."""
        if self.merged:
            raise ValueError(f"the adapter of {self.path} is merged: call unmerge first")

    def merge(self, *, keep_base: bool, shared: bool) -> tuple[float, float]:
        """Replaces the weight by W(t), stochastically rounded in half precision.

        Args:
            keep_base: Whether the weight is kept for `unmerge`.
            shared: Whether another module uses the same Parameter, which is then not overwritten.

        Returns:
            The inner products <stored update, update> and <update, update>: their ratio is the fraction of the update
            that the stored weight contains.

        Raises:
            ValueError: The layer is merged already.
        """
        self.check_can_merge()
        W0 = self.matrix.detach()
        W = merged_weight(W0, self.adapters())
        merged = round_stochastically(W, W0.dtype, seeded_generator(self.seed, f"merge:{self.path}"))
        update = W.double() - W0.double()
        stored = ((merged.double() - W0.double()) * update).sum().item()
        self.replace_weight(merged, keep_base=keep_base, shared=shared)
        self.merged = True
        self.end_fixed(base=True)
        return stored, update.square().sum().item()

    def check_can_replace_weight(self, *, shared: bool) -> None:
        """Raises ValueError where the weight cannot be replaced by W(t). `shared` as in `merge`."""

    def replace_weight(self, merged: Tensor, *, keep_base: bool, shared: bool) -> None:
        """Stores W(t), shaped like `matrix`, as the weight. The other arguments as in `merge`."""
        self.base_weight = (self.weight if keep_base else None,)
        merged = self.as_stored(merged)
        if keep_base or shared:
            self.weight = nn.Parameter(merged, requires_grad=self.weight.requires_grad)
        else:
            self.weight.data = merged

    def put_back(self, base: nn.Parameter) -> None:
        """Makes the stashed weight the weight again, on the device and in the dtype of the merged one."""
        base.data = base.data.to(self.weight.device, self.weight.dtype)
        self.weight = base

    def check_can_unmerge(self) -> None:
        """Raises ValueError where the base weight was not kept."""
        if self.merged and self.base_weight[0] is None:
            raise ValueError(
                f"{self.path} was merged with keep_base=False, so the base weight is gone: load the model again"
            )

    def unmerge(self) -> None:
        """Restores the base weight bit for bit; does nothing where the layer is not merged.

        Raises:
            ValueError: The base weight was not kept.
        """
        self.check_can_unmerge()
        (base,) = self.base_weight
        if base is not None:
            self.put_back(base)
            self.base_weight, self.merged = (None,), False
            self.end_fixed(base=True)

    # --- moving, casting, loading, copying ---

    def _apply(self, fn, recurse=True):
        """What `.to`, `.half` and `.cuda` call: A, B and m keep their precision, and a fresh adapter stays a no-op."""
        before = self.before_move()
        own = [t for p in self.adapter_tensors().values() if p is not self.weight for t in (p, p.grad)]

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            wanted = adapter_dtype(moved.dtype)
            return moved if moved.dtype == wanted else tensor.to(moved.device, wanted)

        super()._apply(lambda t: keep_precision(t) if any(t is o for o in own) else fn(t), recurse)
        for stacked in self.stacked.values():
            stacked.tensors = {name: keep_precision(tensor) for name, tensor in stacked.tensors.items()}
        self.after_move(*before)
        return self

    def before_move(self) -> tuple[torch.device, torch.dtype, bool]:
        """Device and dtype of the weight, and whether the adapter is fresh: the arguments of `after_move`."""
        fresh = not self.merged and self.spec.method != "full" and not self.weight.is_meta and self.is_fresh()
        return self.weight.device, self.weight.dtype, fresh

    def after_move(self, device: torch.device, dtype: torch.dtype, fresh: bool) -> None:
        """Keeps a fresh adapter a no-op after the weight was moved or cast. Arguments: what `before_move` returned."""
        if device.type == "meta" and not self.weight.is_meta:
            self.reset_adapter()
        elif fresh and (device, dtype) != (self.weight.device, self.weight.dtype):
            self.reset_magnitude()  # the norms of a rounded weight, or of another device, differ in the last bits
        self.end_fixed(base=True)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        """Loads a state dict of the base model strictly: m of a fresh adapter is then computed from the new weight."""
        self.end_fixed(base=True)
        given = {name: state_dict[prefix + name] for name in ADAPTER_NAMES if prefix + name in state_dict}
        bare = not given and prefix + "weight" in state_dict and self.spec.method != "full"
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
        if bare:
            self.reset_magnitude()

    def why_not_load(self, *, bare: bool) -> str | None:
        """Why a state dict cannot be loaded, or None.

        Args:
            bare: Whether the state dict has the weight but no adapter.
        """
        if self.merged:
            return f"{self.path} is merged: call unmerge before loading a state dict"
        if bare and not self.is_fresh():
            return f"{self.path} has a trained adapter but the state dict has none: call remove first"
        return None

    def __getstate__(self):
        return {**self.__dict__, "kept": None, "base_fixed": False, "base_norm": None}

    def extra_repr(self) -> str:
        s = self.spec
        rank = f", rank={s.rank}, alpha={s.alpha:g}" if self.lora_A is not None else ""
        return f"{super().extra_repr()}, method={s.method}{rank}"


def seeded_generator(seed: int, path: str) -> torch.Generator:
    """A CPU generator that depends only on the seed and the path of the module, not on the order of the layers."""
    digest = hashlib.blake2b(f"{seed}:{path}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def round_stochastically(W: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rounds each entry of W to `dtype`, up or down, with the probabilities that preserve its expectation.

    Entries that `dtype` represents exactly stay. Rounding to nearest would drop every update below half a unit in the
    last place.

    Args:
        W: Any shape, in fp32 or float64.
        dtype: The dtype of the result.
        generator: A CPU generator.
    """
    if W.dtype == dtype:
        return W.clone()
    info = torch.finfo(dtype)
    W = W.double()
    power = (W / torch.frexp(W).mantissa).nan_to_num(0.0) / 2  # the power of two at or below |W|
    unit = info.eps * power.clamp_min(info.smallest_normal)
    noise = torch.rand(W.shape, generator=generator).to(W.device, torch.float64)  # below 1, also after the addition
    return ((W / unit + noise).floor() * unit).clamp(info.min, info.max).to(dtype)
