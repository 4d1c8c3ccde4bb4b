"""What every adapted layer is: a base layer with an adapter registered on it."""

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

    method: `dora`; `lora` (no magnitude); `magnitude` (no A, B); `full` (trains `weight`, adds nothing).
    alpha: the update is scaled by alpha / rank; None means alpha = rank.
    norm_grad: `detached` (the paper's default) treats the norm as a constant in the backward pass, `exact` does not.
    cache: `weights` keeps the W' that a layer's forward pass built for its backward pass, and for as long as
        `fixed_parameters` holds; `norms` builds it again, which takes time and saves the memory of one more weight.
    save_output: whether a layer's output may be kept for the backward pass: False for layers whose output the model
        overwrites in place. It costs one more product in the backward pass.
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
        assert self.alpha is not None
        return self.alpha / self.rank


@dataclass
class StackedAdapter:
    """A further adapter on a layer, for inference: its tensors are no parameters, and no part of a state dict."""

    spec: DoRASpec
    tensors: dict[str, Tensor]  # by the names of ADAPTER_NAMES
    strength: float


class AdaptedLayer(nn.Module):
    """What DoRALinear and DoRAConv share: the adapter's parameters, and what keeps them right.

    `adapt_layer` turns a base layer into an adapted one in place, as torch's parametrizations do: the module object
    stays the same, and with it its hooks, the names `weight` and `bias`, and every other reference to it.
    A, B and m stay fp32 whatever the layer is cast to (float64 over a float64 weight).
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_A: nn.Parameter | None  # (R, I), of a convolution (R, I / groups, *K)
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
    base_weight: tuple[nn.Parameter | None]  # while merged; a tuple hides it from the module's parameters
    kept: dict[torch.dtype, Prepared] | None  # inside `fixed_parameters`, by the dtype of the product
    num_passes: float  # how many passes `fixed_parameters` was opened for
    base_fixed: bool  # inside `fixed_parameters`, also with `base_only`
    base_norm: Tensor | None  # n0, while base_fixed

    def __init__(self, *_: Any, **__: Any):
        raise TypeError(f"a {type(self).__name__} comes from a base layer: use inject or adapt_layer")

    @property
    def matrix(self) -> Tensor:
        """The weight with output rows first, (O, I) or (O, I / groups, *K): a view where it is stored otherwise."""
        return self.weight

    def as_stored(self, matrix: Tensor) -> Tensor:
        """`matrix` in the weight's own layout."""
        return matrix

    # --- the adapter ---

    def reset_adapter(self) -> None:
        """Draws A from (seed, path), sets B to 0 and m to the row norms of the weight: the layer is its base again."""
        W0 = self.matrix.detach()
        dtype, device, fan_in = adapter_dtype(W0.dtype), W0.device, W0[0].numel()
        if self.spec.method in ("dora", "lora"):
            A = torch.empty(self.spec.rank, *W0.shape[1:], device="cpu")  # the same numbers whatever dtype and device
            A.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=seeded_generator(self.seed, self.path))
            self.lora_A = nn.Parameter(A.to(device, dtype))  # kaiming_uniform_(a=sqrt(5)) is U(-1, 1) / sqrt(fan_in)
            self.lora_B = nn.Parameter(torch.zeros(W0.shape[0], self.spec.rank, dtype=dtype, device=device))
        if self.spec.method in ("dora", "magnitude"):
            self.magnitude = nn.Parameter(row_norm(W0))

    def reset_magnitude(self) -> None:
        """m = n0 after the weight has changed under a fresh adapter."""
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
        """The trainable tensors of the adapter by name; for `full` it is the weight."""
        if self.spec.method == "full":
            return {"weight": self.weight}
        found = {name: self._parameters[name] for name in ADAPTER_NAMES}
        return {name: parameter for name, parameter in found.items() if parameter is not None}

    def tensors_at(self, strength: float) -> dict[str, Tensor]:
        """`adapter_tensors` of the adapter whose strength 1 is this strength of the layer's own.

        Raises:
            ValueError: method `full` has no strength, or there is no such adapter (see `functional.rescaled`).
        """
        tensors: dict[str, Tensor] = dict(self.adapter_tensors())
        if strength == 1:
            return tensors
        self.check_has_strength()
        own = Adapter(tensors.get("lora_A"), tensors.get("lora_B"), tensors.get("magnitude"), self.spec.scaling)
        scaled = rescaled(self.matrix, own, strength)
        return {name: tensor for name, tensor in zip(ADAPTER_NAMES, scaled[:3], strict=True) if tensor is not None}

    def adapters(self) -> tuple[Adapter, ...]:
        """What the forward function needs of every adapter that is not switched off."""
        own = self.spec, self._parameters, self.strength
        others = [(s.spec, s.tensors, s.strength) for s in self.stacked.values()]
        return tuple(
            Adapter(*map(tensors.get, ADAPTER_NAMES), scaling=spec.scaling, strength=strength, norm_grad=spec.norm_grad)
            for spec, tensors, strength in (own, *others)
            if strength != 0
        )

    def check_can_stack(self, name: str, spec: DoRASpec) -> None:
        self.check_can_merge()
        if "full" in (spec.method, self.spec.method):
            raise ValueError(f"{self.path} cannot hold several adapters: method full replaces the weight")
        if name == self.name or name in self.stacked:
            raise ValueError(f"{self.path} holds an adapter of the name {name!r} already: choose another one")

    def stack(self, name: str, spec: DoRASpec, tensors: Mapping[str, Tensor], strength: float) -> None:
        """Adds a further adapter under a name of its own: W0 + sum of strength_k (W'_k - W0)."""
        self.check_can_stack(name, spec)
        device, dtype = self.weight.device, adapter_dtype(self.weight.dtype)
        self.stacked[name] = StackedAdapter(
            spec, {n: t.detach().to(device, dtype) for n, t in tensors.items()}, strength
        )
        self.end_fixed()

    def check_has_strength(self) -> None:
        if self.spec.method == "full":
            raise ValueError(f"{self.path} was trained by method full, which keeps no base: it has no strength")

    def set_strength(self, strength: float, name: str | None = None) -> None:
        """Sets the strength of one adapter, or of all that the layer holds."""
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
        """Whether the forward pass is the base layer's own."""
        if self.merged or self.spec.method == "full":
            return True
        return self.strength == 0 and not any(s.strength for s in self.stacked.values())

    def active_dropout(self) -> float:
        return self.spec.dropout if self.training else 0.0

    def prepared(self) -> Prepared | None:
        """What `fixed_parameters` keeps; None outside: then the parameters are read anew."""
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
        """Forgets what depends on the adapters, and on the base too if that has changed."""
        self.kept = None
        if base:
            self.base_fixed, self.base_norm = False, None

    # --- merging ---

    def check_can_merge(self) -> None:
        if self.merged:
            raise ValueError(f"the adapter of {self.path} is merged: call unmerge first")

    def merge(self, *, keep_base: bool, shared: bool) -> tuple[float, float]:
        """Puts W(t) in the place of the weight. `shared`: another module uses this Parameter, so it is left alone.

        Returns (<stored update, update>, <update, update>): their ratio is the share of the update that survives.
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
        """ValueError where `merge` has nothing to put W(t) into."""

    def replace_weight(self, merged: Tensor, *, keep_base: bool, shared: bool) -> None:
        self.base_weight = (self.weight if keep_base else None,)
        merged = self.as_stored(merged)
        if keep_base or shared:
            self.weight = nn.Parameter(merged, requires_grad=self.weight.requires_grad)
        else:
            self.weight.data = merged

    def put_back(self, base: nn.Parameter) -> None:
        base.data = base.data.to(self.weight.device, self.weight.dtype)
        self.weight = base

    def check_can_unmerge(self) -> None:
        if self.merged and self.base_weight[0] is None:
            raise ValueError(f"{self.path} was merged with keep_base=False, so its base is gone: load the model again")

    def unmerge(self) -> None:
        """Puts the base weight back, bit for bit."""
        self.check_can_unmerge()
        (base,) = self.base_weight
        if base is not None:
            self.put_back(base)
            self.base_weight, self.merged = (None,), False
            self.end_fixed(base=True)

    # --- moving, casting, loading, copying ---

    def _apply(self, fn, recurse=True):
        """`.to`, `.half`, `.cuda` and the like: A, B and m keep their precision, and a fresh adapter stays a no-op."""
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
        """Where the weight is, and whether the adapter is a no-op that `after_move` has to keep one."""
        fresh = not self.merged and self.spec.method != "full" and not self.weight.is_meta and self.is_fresh()
        return self.weight.device, self.weight.dtype, fresh

    def after_move(self, device: torch.device, dtype: torch.dtype, fresh: bool) -> None:
        if device.type == "meta" and not self.weight.is_meta:
            self.reset_adapter()
        elif fresh and (device, dtype) != (self.weight.device, self.weight.dtype):
            self.reset_magnitude()  # the norms of a rounded weight, or of another device, differ in the last bits
        self.end_fixed(base=True)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        """A state dict of the bare model loads strictly: a fresh adapter then takes m from the new weight."""
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
        """What is wrong with loading a state dict; `bare`: one with the weight but without an adapter."""
        if self.merged:
            return f"{self.path} is merged: call unmerge before loading a state dict"
        if bare and not self.is_fresh():
            return f"{self.path} holds a trained adapter and the state dict has none: call remove first"
        return None

    def __getstate__(self):
        return {**self.__dict__, "kept": None, "base_fixed": False, "base_norm": None}

    def extra_repr(self) -> str:
        s = self.spec
        rank = f", rank={s.rank}, alpha={s.alpha:g}" if self.lora_A is not None else ""
        return f"{super().extra_repr()}, method={s.method}{rank}"


def seeded_generator(seed: int, path: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the module's path alone, not on the order of the layers."""
    digest = hashlib.blake2b(f"{seed}:{path}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def round_stochastically(W: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """W in `dtype`, each entry rounded up or down with the probabilities that keep its expectation.

    Entries that `dtype` holds exactly stay. Rounding to nearest would drop every update below half a unit.
    """
    if W.dtype == dtype:
        return W.clone()
    info = torch.finfo(dtype)
    W = W.double()
    power = (W / torch.frexp(W).mantissa).nan_to_num(0.0) / 2  # the power of two at or below |W|
    unit = info.eps * power.clamp_min(info.smallest_normal)
    noise = torch.rand(W.shape, generator=generator).to(W.device, torch.float64)  # below 1, also after the addition
    return ((W / unit + noise).floor() * unit).clamp(info.min, info.max).to(dtype)
