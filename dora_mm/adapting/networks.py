"""Trained parameters of a model by its config: adapters by part, and parameters of the model itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

import dora_mm
from dora_mm import backend as backends
from dora_mm.adapting import bottlenecks, prefixes
from dora_mm.adapting.parts import PartModules, Selection, select_modules
from dora_mm.config.adapter import AdapterConfig, PartConfig, VLAdapterConfig
from dora_mm.core import AdaptedLayer, DoRASpec, InjectReport, TargetMap, adapted_layers
from dora_mm.core.inject import inject_paths
from dora_mm.core.targets import matches
from dora_mm.core.wrappers.quantized import is_quantized

METHOD_MODULES = {
    "series": bottlenecks,
    "parallel": bottlenecks,
    "prefix": prefixes,
}  # by the method, which changes no weight


@dataclass
class TrainedNetworks:
    """The networks with trained parameters, and these parameters.

    Attributes:
        networks: The main network and the others with trained parameters, by component.
        reports: The adapted modules of each network, where it has any.
        parameters: All trained parameters, by component and name.
        extra: The names of those that are the model's own, by component.
        rates: The learning rates that differ from `optimizer.lr`, by component and name.
    """

    networks: dict[str, nn.Module] = field(default_factory=dict)
    reports: dict[str, InjectReport] = field(default_factory=dict)
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    extra: dict[str, list[str]] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)

    @property
    def adapted(self) -> dict[str, nn.Module]:
        """The networks with adapters, by component."""
        return {component: self.networks[component] for component in self.reports}

    @property
    def num_trained(self) -> int:
        """The number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def num_all(self) -> int:
        """The number of parameters of these networks, trained adapters included."""
        layers = (m for n in self.networks.values() for m in n.modules() if isinstance(m, AdaptedLayer))
        assistant = sum(p.numel() for m in layers if m.adaptation.assists for p in m.adapter_tensors().values())
        return sum(p.numel() for network in self.networks.values() for p in network.parameters()) - assistant

    @property
    def share(self) -> str:
        percent = 100 * self.num_trained / self.num_all
        return f"trainable {self.num_trained:,} of {self.num_all:,} parameters ({percent:.3f} %)"

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters of the adapters, by component and name."""
        return {
            f"{component}.{name}": parameter
            for component, network in self.adapted.items()
            for name, parameter in dora_mm.adapter_parameters(network).items()
        }

    def __str__(self) -> str:
        """A line about each adapted network, and the share of parameters that is trained."""
        return "\n".join([*(one_line(name, report) for name, report in self.reports.items()), self.share])


def one_line(name: str, report: InjectReport) -> str:
    """One line about the adapted modules of a network; `print(report)` shows the complete table."""
    parts = Counter(module.part for module in report.modules)
    counts = ", ".join(f"{part} {count}" for part, count in parts.items())
    return f"{name}: {report.num_modules} modules adapted ({counts}), {report.num_parameters:,} parameters"


def adapt(
    networks: Mapping[str, nn.Module],
    target_maps: Mapping[str, TargetMap],
    config: AdapterConfig,
    *,
    seed: int,
    backend: str,
) -> TrainedNetworks:
    """Injects the adapters of a config, and makes the other parameters trainable that it names.

    Args:
        networks: The networks of a model by component, or their structure, which is enough to count parameters.
        target_maps: The target maps of those that can be adapted; the first is the main network's.
        config: The `adapter` section.
        seed: Seed of A.
        backend: "auto", "torch" or "triton".

    Raises:
        ValueError: The model has no such part; or a part cannot be adapted like this.
    """
    main = next(iter(target_maps))
    if methods := METHOD_MODULES.get(config.method):
        added = methods.attach(networks[main], target_maps[main], config.method, config.rank, seed)
        return TrainedNetworks({main: networks[main]}, parameters={f"{main}.{name}": p for name, p in added.items()})
    selection = select_modules(config, networks, target_maps)
    found = TrainedNetworks({name: networks[name] for name in target_maps if name == main or name in selection})
    _train_itself(found, main, list(parameters_by_name(networks[main], extra_names(config))), None)
    for component, selected in selection.items():
        _adapt_network(found, component, selected, config, seed, backend)
    if frozen := [name for name, parameter in found.parameters.items() if not parameter.requires_grad]:
        raise ValueError(f"adapter.extra_trainable: {frozen[0]} is adapted, so it cannot be trained itself, too")
    found.parameters |= found.adapter_parameters()
    found.rates |= _adapter_rates(found, selection)
    return found


def extra_names(config: AdapterConfig) -> tuple[str, ...]:
    """The `extra_trainable` of a config, which only those of questions have."""
    return config.extra_trainable if isinstance(config, VLAdapterConfig) else ()


def _adapter_rates(found: TrainedNetworks, selection: Selection) -> dict[str, float]:
    """The learning rates of adapters of parts that have one of their own, by component and name of the parameter."""
    rates = {}
    for component, report in found.reports.items():
        layers = adapted_layers(found.networks[component])
        for module in report.modules:
            if rate := selection[component][module.part].settings.lr:
                names = layers[module.path].adapter_tensors()
                rates |= {f"{component}.{module.path}.{name}": rate for name in names}
    return rates


def _adapt_network(
    found: TrainedNetworks,
    component: str,
    selected: Mapping[str, PartModules],
    config: AdapterConfig,
    seed: int,
    backend: str,
) -> None:
    """Adapts the selected modules of one network.

    With method `full`, layers train their own weights; in models for questions also their biases.
    """
    network, forward = found.networks[component], backends.select(backend)
    modules: list[Any] = []
    for name, (settings, paths) in selected.items():
        if settings.method == "full" and config.full_trains_biases:
            own = dict(_own_parameters(network, paths))
            to_float32(own.values())
            _train_itself(found, component, [n for n in own if not n.endswith(".weight")], settings.lr)
        wanted = dict.fromkeys(paths, (name, spec_of(config, settings)))
        modules += inject_paths(network, wanted, seed=seed, forward=forward).modules
    if modules:
        found.reports[component] = InjectReport(tuple(modules))


def train_mode(networks: Iterable[nn.Module]) -> None:
    """Puts networks in training mode, except batch normalization: an adapter file has no running statistics."""
    for network in networks:
        network.train()
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def spec_of(config: AdapterConfig, part: PartConfig) -> DoRASpec:
    """The DoRASpec of a part with complete settings."""
    assert part.method is not None
    assert part.rank is not None
    has_update = part.method in ("dora", "lora")
    norm_grad = config.norm_grad if part.method != "lora" else "detached"
    return DoRASpec(part.rank, part.alpha, config.dropout if has_update else 0.0, part.method, norm_grad, config.cache)


def _own_parameters(network: nn.Module, paths: Iterable[str]) -> Iterator[tuple[str, nn.Parameter]]:
    for path in paths:
        layer = network.get_submodule(path)
        if is_quantized(layer):
            raise ValueError(f"adapter.parts: {path} is quantised, and method full trains weights: adapt it instead")
        for name, parameter in layer.named_parameters():
            yield f"{path}.{name}", parameter


def _train_itself(found: TrainedNetworks, component: str, names: Sequence[str], rate: float | None) -> None:
    """Makes parameters of a network trainable, and gives them a learning rate of their own."""
    parameters = {name: found.networks[component].get_parameter(name) for name in names}
    to_float32(parameters.values())
    for name, parameter in parameters.items():
        parameter.requires_grad_()
        found.parameters[f"{component}.{name}"] = parameter
        if rate:
            found.rates[f"{component}.{name}"] = rate
    known = found.extra.setdefault(component, [])
    known += [name for name in names if name not in known]


def to_float32(parameters: Iterable[nn.Parameter]) -> None:
    """Half precision loses the small steps of a training."""
    for parameter in parameters:
        if parameter.dtype.itemsize < 4:
            parameter.data = parameter.data.float()


def parameters_by_name(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """Selects parameters of a model before it is adapted.

    Args:
        model: The model.
        names: "biases", "norms" (their scales), "embeddings" (of tokens, positions and images), "visual_embedding" (of
            models that read features of images), or patterns: a plain one is a dotted suffix of a parameter's name,
            `re:` marks a regular expression that matches all of it.

    Returns:
        The parameters by name, in the order of the model.

    Raises:
        ValueError: A name selects no parameter.
    """
    kinds = {f"{path}.weight": type(module) for path, module in model.named_modules()}
    tests: dict[str, Callable[[str], bool]] = {
        "biases": lambda name: name.endswith(".bias"),
        "norms": lambda name: name in kinds and "Norm" in kinds[name].__name__,
        "embeddings": lambda name: name in kinds and issubclass(kinds[name], nn.Embedding),
        "visual_embedding": lambda name: ".visual_embedding." in name,
    }
    parameters, chosen = dict(model.named_parameters()), set()
    for name in names:
        test = tests.get(name, partial(matches, name, where="adapter.extra_trainable"))
        found = set(filter(test, parameters))
        if not found:
            raise ValueError(
                f"adapter.extra_trainable: {name!r} matches no parameter of this model, and is none of "
                f"{', '.join(tests)}"
            )
        chosen |= found
    return {name: parameter for name, parameter in parameters.items() if name in chosen}
