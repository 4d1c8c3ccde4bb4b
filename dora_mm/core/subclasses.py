"""Subclasses of layers that can be adapted: those that only rename, or scale what the known class computes."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dora_mm.core.adapted import AdaptedLayer


@functools.cache
def subclass(first: type[nn.Module], second: type[nn.Module]) -> type[AdaptedLayer]:
    """The adapted class for another class of layers: one of the two is that, the other an AdaptedLayer.

    `super().forward` of the first one calls the second one's.
    """
    base = second if issubclass(first, AdaptedLayer) else first

    def reduce(self, protocol):  # such a class cannot be found by its name
        return new_layer, (first, second), self.__dict__

    return type(f"DoRA{base.__name__}", (first, second), {"__reduce_ex__": reduce})  # pyright: ignore[reportReturnType]


def new_layer(first: type[nn.Module], second: type[nn.Module]) -> AdaptedLayer:
    """An empty layer of a `subclass`, for unpickling and copying."""
    kind = subclass(first, second)
    return kind.__new__(kind)


# What trials have found, by class and dtype of the layer: they take time, and run code of others.
_FOUND: dict[tuple[type[nn.Module], torch.dtype], type[AdaptedLayer] | None] = {}


def class_for_subclass(
    layer: nn.Module, known: type[nn.Module], adapted: type[AdaptedLayer], bias_last: type[AdaptedLayer] | None
) -> type[AdaptedLayer] | None:
    """The adapted class for a subclass of a known class that has a `forward` of its own; None where none computes it.

    An adapted layer computes what the known class does with another weight. So a copy of the layer is tried: (a) it has
    another weight; (b) it has its own, and the known class is replaced by one that takes the other. The same bits mean
    that all that `forward` does with the weight goes through the known class. (Without memory, only whether it raises
    can be seen.)

    Args:
        layer: A layer whose class is a subclass of `known`.
        known: A class of layers that can be adapted.
        adapted: Its adapted class.
        bias_last: An adapted class that adds the bias after x W^T, where there is one.
    """
    weight = layer.get_parameter("weight")
    if weight.is_meta:
        return _find(layer, known, adapted, bias_last)
    key = type(layer), weight.dtype
    if key not in _FOUND:
        _FOUND[key] = _find(layer, known, adapted, bias_last)
    return _FOUND[key]


def _find(
    layer: nn.Module, known: type[nn.Module], adapted: type[AdaptedLayer], bias_last: type[AdaptedLayer] | None
) -> type[AdaptedLayer] | None:
    base = type(layer)
    trials: list[tuple[type[AdaptedLayer], bool, bool]] = [(adapted, True, False)]
    if list(inspect.signature(base.forward).parameters) == list(inspect.signature(known.forward).parameters):
        trials.append((adapted, False, False))  # the adapted class is called instead
        trials += [] if bias_last is None else [(bias_last, False, True)]
    for kind, calls_super, adds_bias in trials:
        stand_in = with_other_weight(known, adds_bias=adds_bias)
        trial = type("Trial", (base, stand_in) if calls_super else (stand_in, base), {})
        if all(computes_the_same(layer, trial, training, calls_super) for training in (True, False)):
            return subclass(base, kind) if calls_super else subclass(kind, base)
    return None


def with_other_weight(known: Any, *, adds_bias: bool) -> type[nn.Module]:
    """A stand-in for an adapted class: `forward` of the known class, with another weight."""

    class OtherWeight(known):
        def forward(self, input: Tensor) -> Tensor:
            own, bias = self._parameters["weight"], self._parameters.get("bias")
            replaced = {"weight": other_weight(own), **({"bias": None} if adds_bias else {})}
            with parameters(self, **replaced):
                y = known.forward(self, input)
            return y + bias if adds_bias and bias is not None else y

    return OtherWeight


@torch.no_grad()
def computes_the_same(layer: nn.Module, trial: type[nn.Module], training: bool, calls_super: bool) -> bool:
    """Whether `forward` of a layer with another weight returns what it does in its trial class, and keeps no tensor."""
    layer = copy.deepcopy(layer)
    base, weight, before = type(layer), layer._parameters["weight"], set(map(id, vars(layer).values()))
    assert weight is not None
    layer.train(training)
    try:
        x = trial_input(layer)
        with torch.random.fork_rng(), parameters(layer, weight=other_weight(weight)):
            torch.manual_seed(0)
            expected = layer.forward(x)
        object.__setattr__(layer, "__class__", trial)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found = layer.forward(x)
    except Exception:  # whatever a foreign layer raises on this input: it is not adapted
        return False
    finally:
        object.__setattr__(layer, "__class__", base)
    if any(isinstance(value, Tensor) and id(value) not in before for value in vars(layer).values()):
        return False  # it keeps something that it has computed, from the weight perhaps
    return calls_super if weight.is_meta else torch.equal(found, expected)


@contextmanager
def parameters(layer: nn.Module, **values: Tensor | None) -> Iterator[None]:
    """A context in which parameters of a layer have other values."""
    before = {name: layer._parameters.get(name) for name in values}
    layer._parameters.update(values)  # pyright: ignore[reportCallIssue, reportArgumentType]
    try:
        yield
    finally:
        layer._parameters.update(before)


def other_weight(weight: Any) -> Tensor:
    """A weight of the same size with other values, norms and zeros."""
    return weight.flip(0) * 1.5 - weight


def trial_input(layer: Any) -> Tensor:
    """Two tokens for a Linear or an Embedding, one block of positions for a convolution."""
    weight = layer.weight
    if isinstance(layer, nn.Embedding):
        return torch.tensor([0, len(weight) - 1], device=weight.device)
    groups = getattr(layer, "groups", 1)
    shape = (2, weight.shape[1] * groups, *(2 * size + 1 for size in weight.shape[2:]))
    values = torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float32, device=weight.device)
    return values.to(weight.dtype).view(shape)
