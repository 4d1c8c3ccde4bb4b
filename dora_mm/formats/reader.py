"""The reader: the modules of a file in the neutral form, by their neutral names, with the weights that they change."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dora_mm.core.adapted import AdaptedLayer
from dora_mm.core.spec import DoRASpec
from dora_mm.core.wrappers.quantized import DoRAQuantized, dequantized, is_quantized
from dora_mm.core.wrappers.separation import with_projections
from dora_mm.core.wrappers.sharded import gathered
from dora_mm.core.wrappers.streaming import bring
from dora_mm.formats.adapter_file import AdapterFile, located
from dora_mm.formats.algebra import exact, fused
from dora_mm.formats.files.base_weights import BaseWeights
from dora_mm.formats.naming.names import TEXT_PREFIX, ModuleGroup, Name
from dora_mm.formats.naming.spellings import Namer, Names
from dora_mm.formats.state import UNNAMED, AdapterState, LayerState
from dora_mm.formats.tokens import TokenRows, keys_by_word
from dora_mm.formats.tools import tool_of
from dora_mm.formats.tools.parts import NO_LOW_RANK
from dora_mm.formats.tools.peft_experts import oriented


class Bias(NamedTuple):
    """The difference of the bias of a module or a norm."""

    name: Name
    change: Tensor
    of_norm: bool


class Extras(NamedTuple):
    """The contents of a file besides low-rank adapters: norms, biases and embeddings.

    Attributes:
        norms: The names in it of differences of norms, which are read as adapters are.
        biases: By key, the differences of biases.
        embeddings: By key, the rows of trained tokens.
    """

    norms: tuple[str, ...]
    biases: Mapping[str, Bias]
    embeddings: Mapping[str, Tensor]

    @property
    def tokens(self) -> TokenRows:
        """The rows of new tokens, by word and then by table."""
        words = keys_by_word(self.embeddings)
        return {word: {table: self.embeddings[key] for table, key in keys.items()} for word, keys in words.items()}


_HOLD_LORA = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, AdaptedLayer)


class LayerReader:
    """Reads adapters one at a time.

    Args:
        source: The adapter file.
        weights: The base model; None where it is not known.
        axis: The axis of the magnitudes, where their shape does not say it.
        namer: Maps the names of modules in the file to modules; None: by the names of `weights`.
        reads_extras: Whether extra parameters are read with the adapters, and values only when they are used.

    Raises:
        ValueError: The file cannot be read, belongs to another model, or holds more than adapters.
    """

    def __init__(
        self,
        source: str | Path | AdapterFile,
        weights: Mapping[Name, Tensor] | None = None,
        axis: str | None = None,
        namer: Namer | None = None,
        *,
        reads_extras: bool = False,
    ):
        self.file = opened(source)
        if axis is not None:
            self.file.check_axis()
        self.weights, self.axis, self.reads_extras = weights, axis, reads_extras
        adapted = self.file.parameters if reads_extras else ()
        if lost := [key for key in self.file.others if key not in adapted]:
            raise ValueError(f"{self.file.path} also holds {lost[0]}, which belongs to no adapter, and would be lost")
        modules = [module for module in self.file.modules if not (adapted and self.file.is_parameter(module))]
        self._namer = namer or Names(weights or ())
        groups, missing = self.file.groups(modules, self._namer)
        if missing:
            raise self.file.not_found(missing)
        if not reads_extras:
            check_headers(self.file, groups, weights, axis)
        self._modules: dict[Name, tuple[str, ModuleGroup]] = {}
        for module, group in groups.items():
            for name in group.names:
                if name in self._modules:
                    raise ValueError(f"{self.file.path} adapts {name} twice, as {self._modules[name][0]} and {module}")
                self._modules[name] = module, group
        self._last: tuple[str, list[LayerState]] = "", []

    @property
    def path(self) -> Path:
        """The file."""
        return self.file.path

    @property
    def header(self) -> Mapping[str, str]:
        """The header of the file."""
        return self.file.header

    def names(self) -> list[Name]:
        """The adapted modules, in the order of the file."""
        return list(self._modules)

    def leave_out(self, modules: Collection[str]) -> None:
        """Leaves modules of the file out."""
        self._modules = {name: entry for name, entry in self._modules.items() if entry[0] not in modules}

    def biases(self) -> dict[str, Name]:
        """The modules of whose biases the file has a difference, by their names in it."""
        groups, missing = self.file.groups(self.file.biases, self._namer) if self.file.biases else ({}, {})
        if missing:
            raise self.file.not_found(missing)
        return {module: name for module, group in groups.items() for name in group.names}

    def extras(self) -> Extras:
        """The contents of the file besides low-rank adapters."""
        file = self.file
        norms = tuple(module for module in file.modules if file.is_norm(module))
        biases = {
            file.biases[module]: Bias(name, file.tensor(file.biases[module]).float(), module in norms)
            for module, name in self.biases().items()
        }
        return Extras(norms, biases, {key: file.tensor(key) for key in file.embeddings})

    def any_magnitude(self) -> bool:
        """Whether a module has a magnitude, from the keys alone."""
        tool = tool_of(self.file.tool)
        return any("m" in tool.roles(module, endings) for module, endings in self.file.modules.items())

    def is_norm(self, name: Name) -> bool:
        """Whether the adapter of a module is the difference of a norm."""
        return self.file.is_norm(self._modules[name][0])

    def has_no_magnitude(self) -> bool:
        """Whether all modules but norms are plain LoRA, from the keys alone: what they add depends on no base."""
        endings = {ending for found in self.file.modules.values() for ending in found}
        return not self.any_magnitude() and not endings & NO_LOW_RANK

    def layer(self, name: Name) -> LayerState:
        """The adapter of a module; of a fused one its part."""
        module, group = self._modules[name]
        if self._last[0] != module:
            with located(f"{self.file.path}: {module}"):
                self._last = module, fused.split(group, self.file.layer(module, self.axis, mapped=self.reads_extras))
        return self._last[1][group.names.index(name)]

    def transposed(self, name: Name) -> bool:
        """Whether the base stores the weight (I, O)."""
        return name in self._modules and self.file.transposed(self._modules[name][0])

    def base(self, name: Name, *, as_stored: bool = False) -> Tensor:
        """W0 in fp32, with O first; where no base model is known, a random weight whose rows fit the magnitude.

        Args:
            name: The module.
            as_stored: Whether it keeps the dtype of the file: whoever computes with it converts some rows at a time.
        """
        if self.weights is None:
            return stand_in(self.layer(name))
        W0 = self.weights[name] if as_stored else self.weights[name].float()
        return W0.T if self.transposed(name) else W0

    def fused(self, group: ModuleGroup, *, as_stored: bool = False) -> tuple[LayerState, Tensor]:
        """The adapter and W0 of a module of a file that stacks the rows of several, which then is fp32 in any case."""
        if group.is_stored_so and as_stored:
            W0 = self.base(group.names[0], as_stored=True)
            return exact.fitted(self.layer(group.names[0]), W0), W0
        W0s = [self.base(name) if name in self._modules else self._untouched(name) for name in group.names]
        if group.is_stored_so:
            return exact.fitted(self.layer(group.names[0]), W0s[0]), W0s[0]
        layers = [
            exact.fitted(self.layer(name), W0) if name in self._modules else None
            for name, W0 in zip(group.names, W0s, strict=True)
        ]
        dora = any(layer is not None and "magnitude" in layer.tensors for layer in layers)
        if self.weights is None and any(layer and exact.depends_on_base(layer, magnitude=dora) for layer in layers):
            raise ValueError("it stacks the rows of several modules, with norms of the base model: give it with --base")
        return _fuse(group, layers, W0s), fused.stack_rows(group, W0s)

    def _untouched(self, name: Name) -> Tensor:
        """W0 of a part of a fused projection that the file does not adapt."""
        if self.weights is None:
            raise ValueError(f"{name} is part of a fused projection and not adapted: give the model with --base")
        return self.weights[name].float()


def check_headers(
    file: AdapterFile, groups: Mapping[str, ModuleGroup], weights: Mapping[Name, Tensor] | None, axis: str | None
) -> None:
    """Checks all that headers tell about modules of a file, before the first value is read.

    Raises:
        ValueError: A module cannot be read (see `AdapterFile.layer`), or is not for the weight of the base model.
    """
    for module, group in groups.items():
        with located(f"{file.path}: {module}"):
            layer = file.layer_shapes(module, axis)
            if isinstance(weights, BaseWeights) and group.is_stored_so:
                shape = weights.shape(group.names[0])
                W0 = torch.empty(shape[::-1] if file.transposed(module) else shape, device="meta")
                exact.fitted(layer, W0)


def opened(source: str | Path | AdapterFile) -> AdapterFile:
    """The file itself, or the one at a path."""
    return source if isinstance(source, AdapterFile) else AdapterFile(source)


def read(
    source: str | Path | AdapterFile, models: Mapping[str, nn.Module] | None = None
) -> tuple[AdapterState, dict[str, str]]:
    """Reads an adapter as a whole, without loading it into models.

    Args:
        source: The file of any tool, or a folder that contains exactly one.
        models: The models by component whose module names the result has. With their weights, magnitudes over another
            norm than the paper's are converted exactly, and what is no DoRA of output rows (differences of weights,
            magnitudes of input columns) becomes a LoRA of full rank. None keeps the names of the file, and all forms.

    Returns:
        The adapter, whose values may not have been looked at (`state.check_finite` does that), and the header.

    Raises:
        ValueError: There is no such file, it is damaged or incomplete, or it belongs to another model.
    """
    file = opened(source)
    file.check_complete()
    namer = ModelNames(file, models or {})
    reader = LayerReader(file, namer.weights, namer=namer, reads_extras=True)
    rows = {word: {table: file.tensor(key) for table, key in keys.items()} for word, keys in file.tokens.items()}
    state = AdapterState({}, tokens=rows)
    for name in reader.names():
        layer = reader.layer(name)
        has_no_form = "diff" in layer.tensors or layer.axis == "in"  # in our layer
        if models and (has_no_form or layer.norm != "updated"):
            with located(f"{file.path}: {name}"):
                W0 = reader.base(name)
                if has_no_form and not isinstance(models[name.component].get_submodule(name.path), _HOLD_LORA):
                    W = exact.new_weight(exact.fitted(layer, W0), W0)  # a norm or an embedding
                    state.parameters.setdefault(name.component, {})[f"{name.path}.weight"] = W
                    continue
                layer = (exact.full_rank if has_no_form else exact.paper_form)(exact.fitted(layer, W0), W0)
        if layer.num_experts is not None and models and file.tool == "peft":
            layer = oriented(layer, namer.modules.get(name))
        if layer.spec.method == "magnitude":
            layer = replace(layer, tensors={"magnitude": layer.tensors["magnitude"]})
        state.layers.setdefault(name.component, {})[name.path] = layer
    for key, name in file.parameters.items():
        component = namer.component(name)
        state.parameters.setdefault(component, {})[name.path] = file.tensor(key, mapped=True)
        if tool_of(file.tool).in_header.unties(file.header, name):
            state.untied.setdefault(component, set()).add(name.path)
    for module, name in reader.biases().items():
        if models is None:
            break
        bias = getattr(models[name.component].get_submodule(name.path), "bias", None)
        if bias is None:
            raise ValueError(f"{file.path} holds the bias {file.biases[module]}, and {name} has none in this model")
        value = bias.detach().float().cpu() + file.tensor(file.biases[module]).float()
        state.parameters.setdefault(name.component, {})[f"{name.path}.bias"] = value
    return state, file.header


class ModelNames:
    """Maps module names in a file to modules of models, whose names may differ from those in diffusers.

    Args:
        file: The file.
        models: The models by component; empty where they are not known.
    """

    def __init__(self, file: AdapterFile, models: Mapping[str, nn.Module]):
        self.file, self.models, self.weights = file, models, ModelWeights(models)
        self._names = Names(self.weights)

    def read(self, key: str) -> ModuleGroup:
        """See `Names.read`. A name that is the model's own is not looked up: loading reports any that does not fit."""
        own = self.file.named(key)
        if own is None:
            return self._names.read(key)
        component = self.component(own)
        model = self.models.get(component)
        bare = model is not None and not hasattr(model, "text_model")  # transformers 5 has dropped it in one encoder
        return ModuleGroup((Name(component, own.path.removeprefix(TEXT_PREFIX) if bare else own.path),))

    @cached_property
    def modules(self) -> dict[Name, nn.Module]:
        """The modules of the models, with the layers of experts that are not adapted yet."""
        found = {component: with_projections(dict(model.named_modules())) for component, model in self.models.items()}
        return {Name(component, path): module for component, own in found.items() for path, module in own.items()}

    def component(self, name: Name) -> str:
        """The component of a name, which a file for any model does not have."""
        return name.component or (next(iter(self.models)) if len(self.models) == 1 else UNNAMED)


class ModelWeights(Mapping[Name, Tensor]):
    """The weights of models as they store them, on the CPU, where the tensors of files are; none is quantised."""

    def __init__(self, models: Mapping[str, nn.Module]):
        self._modules = {
            Name(component, path): module
            for component, model in models.items()
            for path, module in model.named_modules()
            if isinstance(getattr(module, "weight", None), Tensor)
        }

    def __getitem__(self, name: Name) -> Tensor:
        module = self._modules[name]
        bring(module)  # where it is streamed
        quantized = isinstance(module, DoRAQuantized) or is_quantized(module)
        return (dequantized(module) if quantized else gathered(module.get_parameter("weight"))).cpu()

    def __iter__(self) -> Iterator[Name]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


def stand_in(layer: LayerState) -> Tensor:
    """A random weight for an adapter whose base is not known, always the same."""
    if layer.tensors.keys() == {"diff"}:
        return torch.randn(layer.tensors["diff"].shape, generator=torch.Generator().manual_seed(0))
    if "lora_A" not in layer.tensors:
        raise ValueError("it has no A and B, so that the shape of the weight is not known: give the model with --base")
    shape = (layer.tensors["lora_B"].shape[0], *layer.tensors["lora_A"].shape[1:])
    W0 = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if "magnitude" not in layer.tensors:
        return W0
    # With norms of m itself, m alone would change nothing, and errors would be divided by an update of 0.
    wanted = 0.9 * exact.along(layer.tensors["magnitude"], W0, layer.axis)
    return W0 * (wanted / exact.norms(W0, layer.axis))


def _fuse(group: ModuleGroup, layers: list[LayerState | None], W0s: list[Tensor]) -> LayerState:
    """The adapter of stacked weights; a difference where the parts have no A, or magnitudes of input columns."""
    pairs = list(zip(layers, W0s, strict=True))
    given = [layer for layer in layers if layer is not None]
    if any(layer.axis == "in" or "lora_A" not in layer.tensors for layer in given):
        D = [W0.new_zeros(W0.shape) if layer is None else exact.new_weight(layer, W0) - W0 for layer, W0 in pairs]
        return LayerState(DoRASpec(method="full"), {"diff": fused.stack_rows(group, D)})
    dora = any("magnitude" in layer.tensors for layer in given)
    parts = []
    for layer, W0 in pairs:
        if layer is not None:
            parts.append(exact.paper_form(layer, W0, magnitude=dora))
        else:
            parts.append(fused.untouched(W0.shape[0], W0.shape[1], exact.norms(W0, "out").flatten() if dora else None))
    return fused.fuse(group, parts)
