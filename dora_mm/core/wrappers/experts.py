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

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dora_mm.core.adapted import AdaptedLayer
from dora_mm.core.functional import can_read, row_norm
from dora_mm.core.ops import LINEAR, Op
from dora_mm.core.wrappers.projections import AdaptedProjection, Projection, ProjectionHolder
from dora_mm.core.wrappers.quantized import FP8, dequantized_blocks
from dora_mm.core.wrappers.stand_in import StandIn

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
    def is_quantized(self) -> bool:
        """Whether the parameter is that of FP8Experts, float8 with a scale for each block."""
        return self.weight.dtype == FP8

    @property
    def matrix(self) -> Tensor:
        """The weights with output rows first (E, O, I): a view, or dequantised."""
        if self.is_quantized:
            return torch.stack([self.matrix_of(index) for index in range(len(self.weight))])
        return self.weight.mT if self.transposed else self.weight

    def matrix_of(self, index: int) -> Tensor:
        """The weight of one expert (O, I): a view, or dequantised."""
        if not self.is_quantized:
            return self.matrix[index]
        experts: Any = self.holder[0]
        scale = getattr(experts, f"{self.parameter}_scale_inv")
        return dequantized_blocks(self.weight[index], scale[index], experts.block_size)


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

    def check_can_merge(self) -> None:
        if self.is_quantized:
            raise ValueError(
                f"{self.adaptation.path} is quantised, and merging would lose the update: merge into a dense model"
            )
        super().check_can_merge()

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

    def has_update(self) -> bool:
        """Whether the adapters differ from fresh ones, as they do from the first optimizer step on."""
        state = self.adaptation
        if not can_read(self.tensor("weight")):
            return True
        if state.checks_update:
            state.checks_update = state.strength == 1 and not state.stacked and self.is_fresh()
        return not state.checks_update

    def stand_in(self) -> StandIn:
        """What stands in for the parameter in one pass."""
        weight, forward = self.tensor("weight"), self.adaptation.forward
        adapters, options = self.settings_of_pass(LINEAR, reads=can_read(weight))
        # W(t) of many experts is of the size of the parameter. A fresh adapter takes the product of the base.
        is_wide = torch.is_grad_enabled() and not self.is_quantized and self.has_update()
        options = options._replace(keep_weight=False, is_wide=is_wide)
        of_all = [adapter.of_matrices(len(weight)) for adapter in adapters]

        def product(x: Tensor, op: Op, expert: int | None = None) -> Tensor:
            if expert is None:
                return forward(x, self.matrix, None, adapters, options._replace(op=op))
            cache = None if options.cache is None else options.cache.of_matrix(expert)
            own = options._replace(op=op, cache=cache)
            if self.is_quantized:
                own = own._replace(dtype=x.dtype, restore=lambda: self.matrix_of(expert))
            return forward(x, self.matrix_of(expert), None, [each[expert] for each in of_all], own)

        name = f"{type(self.holder[0]).__name__}.{self.parameter}"
        return StandIn(name, weight, product, self.transposed, not self.transposed)


class AdaptedExperts(ProjectionHolder):
    """Mixin for the class of experts with adapted weights, see `adapted_experts_class`."""

    base_class: type[nn.Module]
    config: Any

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
        if any(layer.is_quantized for layer in layers):  # other implementations are kernels, which take no stand-in
            twin.__dict__["config"] = copy.copy(self.config)
            twin.__dict__["config"]._experts_implementation = "eager"
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
