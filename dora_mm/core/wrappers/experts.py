"""Mixtures of experts of transformers, which keep the weights of all experts of a layer in one parameter.

Each such parameter is a layer of its own below its module: `experts.gate_up` is `experts.gate_up_proj`, and
`experts.down` is `experts.down_proj`. It is adapted with one A (R, I), B (O, R) and m (O,) for each of E experts. Where
a gate and another projection are halves of one parameter, or every second of its rows, each row has its own norm.

The class of the experts computes: routing, gates, biases, and which product it takes (`experts_implementation`). While
its forward function runs, a stand-in is in the place of an adapted parameter. Of a stand-in the function can only take
the product with its tokens, which is the adapted one: x W0^T + (s x A^T) B^T, times g, in one sum per token. What is
set by `set_experts_implementation` later is followed, too. (A function of our own in ALL_EXPERTS_FUNCTIONS would not
be called then, and classes with a forward function of their own never call one.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dora_mm.core.adapted import AdaptedLayer
from dora_mm.core.functional import Adapter, can_read, row_norm, without_autocast
from dora_mm.core.ops import LINEAR, BatchedOp, GroupedOp, Op
from dora_mm.core.wrappers.projections import AdaptedProjection, Projection, ProjectionHolder

ENDING = "_proj"  # of the parameters; without it, it is the name of the layer
# Whether the weights of an expert are (I, O), of classes with a forward function of their own (transformers 5.24).
# Others say it themselves, by `use_experts_implementation`.
TRANSPOSED = {"Llama4TextExperts": True, "Step3p7Experts": False, "InklingSharedExperts": False}


def is_transposed(module: nn.Module) -> bool | None:
    """Whether experts that can be adapted store their weights as (E, I, O); None where they cannot be."""
    kind: type[nn.Module] = type(module)
    if isinstance(module, AdaptedExperts):
        kind = module.base_class
    if kind.__module__.partition(".")[0] == "transformers" and kind.__name__ in TRANSPOSED:
        return TRANSPOSED[kind.__name__]
    found: Any = getattr(module, "is_transposed", None)
    says_so = hasattr(module, "has_gate") and hasattr(module, "_is_expert_parallel")
    return bool(found) if says_so and found is not None else None


def projections_of(module: nn.Module) -> dict[str, ExpertProjection]:
    """The layers of experts by name; empty where a module is none, or already calls them."""
    if isinstance(module, AdaptedExperts) or (transposed := is_transposed(module)) is None:
        return {}
    return {
        name.removesuffix(ENDING): ExpertProjection(module, name, transposed)
        for name, parameter in module.named_parameters(recurse=False)
        if name.endswith(ENDING) and parameter.dim() == 3 and parameter.is_floating_point()
    }


class ExpertProjection(Projection):
    """The weights of all experts of one projection.

    Args:
        experts: The module that has the parameter.
        parameter: Its name; the parameter is (E, O, I), or (E, I, O).
        transposed: Whether it is (E, I, O).
    """

    def __init__(self, experts: nn.Module, parameter: str, transposed: bool):
        super().__init__(experts)
        self.parameter, self.transposed = parameter, transposed

    @property
    def weight(self) -> Any:
        """The parameter, as it is stored."""
        return getattr(self.holder[0], self.parameter)

    @property
    def matrix(self) -> Tensor:
        """The weights with output rows first, a view (E, O, I)."""
        return self.weight.mT if self.transposed else self.weight


class DoRAExperts(AdaptedProjection, ExpertProjection):
    """The adapted weights of all experts of one projection: A (E, R, I), B (E, O, R), magnitude (E, O)."""

    matrix = ExpertProjection.matrix
    base_class = ExpertProjection
    bias = None
    not_full = "holds the weights of experts: name their parameter in extra_trainable to train it itself"

    @classmethod
    def why_not(cls, layer, path, spec):
        if why := super().why_not(layer, path, spec):
            return why
        assert isinstance(layer, ExpertProjection)
        experts = layer.holder[0]
        if spec.dropout:
            return f"{path} has an input for each expert, which cannot be dropped: set dropout to 0"
        if getattr(experts, "_is_expert_parallel", False) or hasattr(layer.weight, "placements"):
            return f"the experts of {path} are divided among processes: load the model without a plan for parallelism"
        if "forward" in vars(experts):
            return f"the forward function around {path} was replaced (a hook of accelerate?): inject before that"
        return None

    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.mT.contiguous() if self.transposed else matrix

    @staticmethod
    def adapter_shapes(W0, rank):
        num_experts, num_out, num_in = W0.shape
        return (num_experts, rank, num_in), (num_experts, num_out, rank), num_in

    @staticmethod
    def row_norms(W0):
        return torch.stack([row_norm(each) for each in W0])

    @staticmethod
    def merged_matrix(W0, adapters, generator):
        merged, sums = torch.empty_like(W0), (0.0, 0.0)
        of_each = zip(*(adapter.of_matrices(len(W0)) for adapter in adapters), strict=True)
        for own, each in zip(of_each if adapters else [()] * len(W0), zip(W0, merged, strict=True), strict=True):
            W, (stored, update) = AdaptedLayer.merged_matrix(each[0], own, generator)
            each[1].copy_(W)
            sums = sums[0] + stored, sums[1] + update
        return merged, sums

    def store(self, matrix: Tensor) -> None:
        if self.keeps_parameter():
            super().store(matrix)
        else:
            stored = nn.Parameter(self.as_stored(matrix), requires_grad=self.weight.requires_grad)
            setattr(self.holder[0], self.parameter, stored)

    def put_back(self, base: Tensor) -> None:
        if isinstance(base, nn.Parameter):
            base.data = base.data.to(self.weight.device, self.weight.dtype)
            setattr(self.holder[0], self.parameter, base)
        else:
            super().put_back(base)

    def stand_in(self) -> StandIn:
        """What stands in for the parameter in one pass."""
        weight = self.tensor("weight")
        adapters, options = self.settings_of_pass(LINEAR, reads=can_read(weight))

        @functools.cache
        def of_expert(index: int) -> list[Adapter]:
            return [each[index] for each in of_all]

        of_all = [adapter.of_matrices(len(weight)) for adapter in adapters]
        matrix, forward = self.matrix, self.adaptation.forward

        def product(x: Tensor, op: Op, expert: int | None = None) -> Tensor:
            if expert is None:
                return forward(x, matrix, None, adapters, options._replace(op=op, keep_weight=False))
            cache = None if options.cache is None else options.cache.of_matrix(expert)
            own = options._replace(op=op, cache=cache, keep_weight=False)
            return forward(x, matrix[expert], None, of_expert(expert), own)

        name = f"{type(self.holder[0]).__name__}.{self.parameter}"
        return StandIn(name, weight, product, self.transposed, not self.transposed)


class AdaptedExperts(ProjectionHolder):
    """Mixin for the class of experts with adapted weights, see `adapted_experts_class`."""

    base_class: type[nn.Module]

    def parameters_of_projections(self) -> dict[str, str]:
        found = ((name, getattr(child, "parameter", None)) for name, child in self.named_children())
        return {name: parameter for name, parameter in found if parameter is not None}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the forward function of the base class, with stand-ins for the parameters that are adapted."""
        if torch.compiler.is_compiling():  # the decorator, at import, would load the compiler
            return torch.compiler.disable(self._run)(*args, **kwargs)
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        layers = [p for p in self.adapted_projections().values() if isinstance(p, DoRAExperts) and not p.is_base()]
        if not layers:
            return super().forward(*args, **kwargs)
        for layer in layers:
            if layer.holder[0] is not self:  # in a copy of DataParallel, it still has the original's weight
                layer.holder = (self,)
        twin = object.__new__(type(self))
        twin.__dict__.update(vars(self), **{layer.parameter: layer.stand_in() for layer in layers})
        return super(AdaptedExperts, twin).forward(*args, **kwargs)


@functools.cache
def adapted_experts_class(base: type[nn.Module]) -> type[AdaptedExperts]:
    """The class of experts with adapted weights, from their own class."""

    def reduce(self, protocol):  # such a class cannot be found by its name
        return _new_experts, (base,), self.__dict__

    return type(f"Adapted{base.__name__}", (AdaptedExperts, base), {"base_class": base, "__reduce_ex__": reduce})


def _new_experts(base: type[nn.Module]) -> AdaptedExperts:
    kind = adapted_experts_class(base)
    return kind.__new__(kind)


def separate_experts(experts: nn.Module, projections: Mapping[str, nn.Module]) -> None:
    """Makes experts call their projections, in place; `projections` are from `projections_of`."""
    object.__setattr__(experts, "__class__", adapted_experts_class(type(experts)))
    for name, projection in projections.items():
        experts.add_module(name, projection)


def restore_experts(experts: AdaptedExperts) -> None:
    """Gives experts their own class back, in place, where nothing in them is adapted any longer."""
    if not experts.adapted_projections():
        for name in experts.parameters_of_projections():
            delattr(experts, name)
        object.__setattr__(experts, "__class__", experts.base_class)


# --- the stand-in of a parameter --------------------------------------------------------------------------------------

READABLE = {"device", "dtype", "shape", "ndim", "is_cuda", "requires_grad", "size", "dim", "data_ptr"}
MATMUL = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}


@dataclass(frozen=True, eq=False)
class StandIn:
    """What a class takes for the weights of its experts: experts are chosen by indexing, and multiply tokens.

    Attributes:
        name: Of the parameter, for errors.
        weight: The parameter.
        product: Takes x (S, I), an operation, and the index of the expert where all rows of x are for one.
        transposed: Whether the parameter is (E, I, O).
        out_first: Whether the last two dimensions of the stand-in are (O, I).
        chosen: The index of an expert; those of the experts of each row (S,); or None for all experts.
    """

    name: str
    weight: Tensor
    product: Callable[..., Tensor]
    transposed: bool
    out_first: bool
    chosen: Tensor | int | None = None

    def __getattr__(self, name: str) -> Any:
        if name not in READABLE:
            raise AttributeError(f"the adapted {self.name} has no {name}: only its products with tokens are known")
        return getattr(self.weight, name)

    def __getitem__(self, index: Any) -> StandIn:
        if self.chosen is not None or not isinstance(index, int | Tensor):
            raise self._unknown(f"an index of type {type(index).__name__}")
        single = isinstance(index, int) or index.dim() == 0
        return replace(self, chosen=int(index) if single else index)

    def transpose(self, first: int, second: int) -> StandIn:
        """Swaps the last two dimensions."""
        if {first % 3, second % 3} != {1, 2} or self.chosen is not None:
            raise self._unknown(f"transpose({first}, {second})")
        return replace(self, out_first=not self.out_first)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Computes a product of tokens with a stand-in.

        Raises:
            TypeError: The function is another one.
        """
        kwargs = dict(kwargs or {})
        own = next(value for value in (*args, *kwargs.values()) if isinstance(value, StandIn))
        name = getattr(function, "__name__", str(function))
        if function is F.linear:
            return own._linear(*args, **kwargs)
        if function in MATMUL and args[1] is own and not kwargs:
            return own._matmul(args[0])
        if function is torch.bmm and not kwargs:
            return own._bmm(*args)
        if "grouped_mm" in name:
            return own._grouped(*args, **kwargs)
        raise own._unknown(name)

    def _unknown(self, what: str) -> TypeError:
        return TypeError(
            f"{self.name} is adapted, and its class uses it in a way that is not known ({what}): adapt other parts"
        )

    def _linear(self, x: Tensor, own: Any, bias: Tensor | None = None) -> Tensor:
        if own is not self or not isinstance(self.chosen, int) or not self.out_first:
            raise self._unknown("linear")
        y = self.product(x, LINEAR, self.chosen)
        return y if bias is None else y + bias

    def _matmul(self, x: Tensor) -> Tensor:
        if not isinstance(self.chosen, int) or self.out_first:
            raise self._unknown("matmul")
        return self.product(x, LINEAR, self.chosen)

    def _grouped(self, x: Tensor, own: Any, *others: Any, offs: Tensor | None = None, **kwargs: Any) -> Tensor:
        """A grouped product, which is not autocast."""
        ends = others[0] if others else offs
        if own is not self or self.out_first or ends is None or any(v is not None for v in kwargs.values()):
            raise self._unknown("grouped_mm")
        with without_autocast(x.device):
            return self.product(x.to(self.weight.dtype), GroupedOp(ends))

    def _bmm(self, first: Any, second: Any) -> Tensor:
        if self.chosen is None:
            return self._dense(first, second)
        if first is self and self.out_first:
            return self._of_rows(second.squeeze(2)).unsqueeze(2)
        if second is self and not self.out_first:
            return self._of_rows(first.squeeze(1)).unsqueeze(1)
        raise self._unknown("bmm")

    def _dense(self, x: Any, own: Any) -> Tensor:
        """Every expert has as many tokens, x (E, T, I)."""
        if own is not self or self.out_first:
            raise self._unknown("bmm")
        num_experts, num_tokens, _ = x.shape
        ends = torch.arange(1, num_experts + 1, device=x.device) * num_tokens
        return self.product(x.flatten(0, 1), GroupedOp(ends)).unflatten(0, (num_experts, num_tokens))

    def _of_rows(self, x: Tensor) -> Tensor:
        """Every row of x (S, I) has its expert."""
        chosen = self.chosen
        assert isinstance(chosen, Tensor)
        order = chosen.argsort(stable=True)
        ends = chosen.new_zeros(self.weight.shape[0]).scatter_add_(0, chosen, torch.ones_like(chosen)).cumsum(0)
        each = BatchedOp(self.transposed, least=min(len(x), 2))
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return self.product(x[order], GroupedOp(ends, each))[back]
