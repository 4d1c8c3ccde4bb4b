"""The adapters of a vision-language model: what a config trains of it, and its folder on disk.

The adapter of the network "model" is in the folder itself, those of other networks in subfolders of their names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn
from yaml import YAMLError

import dora_mm
from dora_mm import formats
from dora_mm.config import yaml12
from dora_mm.config.adapter import PartConfig, VLAdapterConfig
from dora_mm.config.loader import dump_config, resolve_path
from dora_mm.config.vl import TrainVLConfig
from dora_mm.core import DoRASpec, InjectReport, TargetMap
from dora_mm.core.quantized import is_quantized
from dora_mm.core.targets import match_modules, matches, parts_in
from dora_mm.models.families import Structure
from dora_mm.models.vl import VLModel
from dora_mm.tasks.adapters import load_initial_adapter

MODEL = "model"
IDENTITIES = {  # keys of an adapter's header
    "base_digest": "model.path: another base model",
    "vision_digest": "vision: another tower or features",
}


@dataclass
class Trained:
    """What a config trains of a model.

    Attributes:
        networks: The networks with trained parameters, by component.
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
    def num_trained(self) -> int:
        """The number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def num_all(self) -> int:
        """The number of parameters of these networks, adapters included."""
        return sum(parameter.numel() for network in self.networks.values() for parameter in network.parameters())

    @property
    def share(self) -> str:
        percent = 100 * self.num_trained / self.num_all
        return f"trainable {self.num_trained:,} of {self.num_all:,} parameters ({percent:.3f} %)"


def adapt(model: VLModel | Structure, config: VLAdapterConfig, *, seed: int, backend: str) -> Trained:
    """Injects the adapters of a config, and makes the other parameters trainable that it names.

    A part with method `full` trains the weights and biases of its modules themselves. Where other parts of the same
    network are adapted, they are parameters beside the adapters, which PEFT's format can hold.

    Args:
        model: The model, or its structure, which is enough to count parameters.
        config: The `adapter` section.
        seed: Seed of A.
        backend: "auto", "torch" or "triton".

    Raises:
        ValueError: The model has no such part; or a part cannot be adapted like this.
    """
    parts = config.trained_parts(tuple(model.target_maps[MODEL].select().parts))
    maps = model.target_maps.items()
    known = [part for component, targets in maps for part in parts_in(model.networks[component], targets)]
    if unknown := [part for part in parts if part not in known]:
        raise ValueError(f"adapter.parts: this model has no part {unknown[0]}; it has {', '.join(known)}")
    found = Trained({MODEL: model.networks[MODEL]})
    _train_itself(found, MODEL, list(parameters_by_name(found.networks[MODEL], config.extra_trainable)), None)
    for component, targets in model.target_maps.items():
        chosen = {part: settings for part, settings in parts.items() if part in targets.parts}
        if chosen:
            found.networks[component] = model.networks[component]
            _adapt_network(found, component, targets, chosen, config, seed, backend)
    if frozen := [name for name, parameter in found.parameters.items() if not parameter.requires_grad]:
        raise ValueError(f"adapter.extra_trainable: {frozen[0]} is adapted, so it cannot be trained itself, too")
    for component, report in found.reports.items():
        names = dora_mm.adapter_parameters(found.networks[component])
        found.parameters |= {f"{component}.{name}": parameter for name, parameter in names.items()}
        for module in report.modules:
            if rate := parts[module.part].lr:
                found.rates |= {f"{component}.{name}": rate for name in names if name.rpartition(".")[0] == module.path}
    return found


def _adapt_network(
    found: Trained,
    component: str,
    targets: TargetMap,
    parts: Mapping[str, PartConfig],
    config: VLAdapterConfig,
    seed: int,
    backend: str,
) -> None:
    network = found.networks[component]
    adapted = {part for part, settings in parts.items() if settings.method != "full"}
    modules: list[Any] = []
    for part, settings in parts.items():
        if settings.method == "full":
            own = dict(_own_parameters(network, targets.select([part])))
            _to_float32(own.values())
            _train_itself(found, component, [n for n, p in own.items() if adapted or p.dim() == 1], settings.lr)
        if part in adapted or not adapted:
            spec = spec_of(config, settings)
            modules += dora_mm.inject(network, targets, spec, parts=[part], seed=seed, backend=backend).modules
    if modules:
        found.reports[component] = InjectReport(tuple(modules))


def train_mode(networks: Iterable[nn.Module]) -> None:
    """Puts networks in training mode, except batch normalization: an adapter file has no running statistics."""
    for network in networks:
        network.train()
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def spec_of(config: VLAdapterConfig, part: PartConfig) -> DoRASpec:
    """The DoRASpec of a part with complete settings."""
    assert part.method is not None
    assert part.rank is not None
    has_update = part.method in ("dora", "lora")
    norm_grad = config.norm_grad if part.method != "lora" else "detached"
    return DoRASpec(part.rank, part.alpha, config.dropout if has_update else 0.0, part.method, norm_grad, config.cache)


def _own_parameters(network: nn.Module, targets: TargetMap) -> Iterator[tuple[str, nn.Parameter]]:
    for path in match_modules(network, targets):
        layer = network.get_submodule(path)
        if is_quantized(layer):
            raise ValueError(f"adapter.parts: {path} is quantised, and method full trains weights: adapt it instead")
        for name, parameter in layer.named_parameters():
            yield f"{path}.{name}", parameter


def _train_itself(found: Trained, component: str, names: Sequence[str], rate: float | None) -> None:
    """Makes parameters of a network trainable, and gives them a learning rate of their own."""
    parameters = {name: found.networks[component].get_parameter(name) for name in names}
    _to_float32(parameters.values())
    for name, parameter in parameters.items():
        parameter.requires_grad_()
        found.parameters[f"{component}.{name}"] = parameter
        if rate:
            found.rates[f"{component}.{name}"] = rate
    known = found.extra.setdefault(component, [])
    known += [name for name in names if name not in known]


def _to_float32(parameters: Iterable[nn.Parameter]) -> None:
    """Half precision loses the small steps of a training."""
    for parameter in parameters:
        if parameter.dtype.itemsize < 4:
            parameter.data = parameter.data.float()


def parameters_by_name(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """Selects parameters of a model before it is adapted.

    Args:
        model: The model.
        names: "biases", "norms" (their scales), "embeddings" (of tokens, positions and images), "visual_embedding" (of
            VL-BART), or patterns: a plain one is a dotted suffix of a parameter's name, `re:` marks a regular
            expression that matches all of it.

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
        found = {parameter for parameter in parameters if tests.get(name, partial(_matches, name))(parameter)}
        if not found:
            raise ValueError(
                f"adapter.extra_trainable: {name!r} matches no parameter of this model, and is none of "
                f"{', '.join(tests)}"
            )
        chosen |= found
    return {name: parameter for name, parameter in parameters.items() if name in chosen}


def _matches(pattern: str, name: str) -> bool:
    return matches(pattern, name, "adapter.extra_trainable")


# --- on disk ---------------------------------------------------------------------------------------------------------


def save(trained: Trained, config: TrainVLConfig, identity: Mapping[str, str], folder: Path) -> None:
    """Saves what was trained: in PEFT's format where it can hold it, else in our own."""
    about = {"base_model": config.model.path, "seed": str(config.seed), "config": dump_config(config), **identity}
    about["pipeline_tag"] = "image-text-to-text" if config.model.family == "vlm" else "visual-question-answering"
    if config.model.revision:
        about["base_revision"] = config.model.revision
    for component, network in trained.networks.items():
        if component in trained.reports:
            format = formats.format_for({component: network}, preferred="peft")
            names = trained.extra.get(component, [])
            path = folder if component == MODEL else folder / component
            file = dora_mm.save_adapter(
                {component: network}, path, format=format, metadata=about, extra_parameters=names
            )
            formats.remove_other_formats(file)  # a resumed run may have saved another one before


def load_initial(trained: Trained, config: TrainVLConfig, identity: Mapping[str, str]) -> None:
    """Loads `adapter.init_from`.

    Raises:
        ValueError: The adapter was trained with another base model or vision tower, or holds parameters that this run
            would neither train nor save.
    """
    assert config.adapter.init_from is not None
    folder = formats.adapter_folder(resolve_path(config.adapter.init_from, "adapter.init_from"))
    state, metadata = formats.read(folder, {MODEL: trained.networks[MODEL]})
    check_identity(folder, metadata, identity)
    untrained = sorted(set(state.parameters.get(MODEL, ())) - set(trained.extra[MODEL]))
    if untrained:
        raise ValueError(
            f"adapter.init_from: {folder} also trained {untrained[0]}, which adapter.extra_trainable does not include"
        )
    subfolders = {file.parent.name for file in folder.glob("*/*.safetensors")}
    if different := sorted(subfolders ^ (set(trained.networks) - {MODEL})):
        raise ValueError(
            f"adapter.init_from: only one of {folder} and adapter.parts adapts the {different[0]} tower: either both "
            "or neither must do so"
        )
    for component, network in trained.networks.items():
        path = folder if component == MODEL else folder / component
        load_initial_adapter(path, {component: network})


def check_identity(folder: Path, metadata: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Checks that an adapter was trained with this base model and vision tower.

    Args:
        folder: The adapter's folder, for the message.
        metadata: The header of the adapter file.
        here: The identity of the loaded model, by the keys of IDENTITIES. What either side lacks is not compared.

    Raises:
        ValueError: The adapter was trained with another base model or vision tower.
    """
    for key, what in IDENTITIES.items():
        if metadata.get(key) and here.get(key) and metadata[key] != here[key]:
            raise ValueError(f"{what} than the one that the adapter {folder} was trained with")


def seed_of(folder: Path) -> int:
    """The seed of the weights that no file of the base model holds (VL-BART's), from an adapter's header.

    Returns:
        The seed; 0 if the header names none.

    Raises:
        ValueError: The header's seed is not a number.
    """
    text = formats.read(folder)[1].get("seed", "0")
    if not text.isdecimal():
        raise ValueError(f"{formats.find_file(folder)} has a header key seed that is not a number: {text!r}")
    return int(text)


def saved_config(path: Path) -> TrainVLConfig | None:
    """The config of the training that saved an adapter, from the header of its file; None: no such training saved it.

    Args:
        path: The adapter's file or folder.

    Raises:
        ValueError: There is no adapter.
    """
    try:
        return TrainVLConfig.model_validate(yaml12.read(formats.read(path)[1]["config"]).value)
    except (KeyError, YAMLError, ValidationError):
        return None


def load(model: VLModel, path: Path, *, backend: str) -> None:
    """Loads the adapters of a model, after checking that they were trained with it.

    Args:
        model: The bare model.
        path: A run directory, an adapter folder or an adapter file.
        backend: "auto", "torch" or "triton".

    Raises:
        ValueError: The adapter belongs to another model, or adapts a network that this one does not have.
    """
    folder = formats.adapter_folder(path)
    check_identity(folder, formats.read(folder)[1], model.identity)
    subfolders = {file.parent.name for file in folder.glob("*/*.safetensors")}
    if missing := sorted(subfolders - set(model.networks)):
        raise ValueError(
            f"{folder} adapts the {missing[0]} tower too: remove vision.features, so that the tower encodes the images"
        )
    for component in (MODEL, *sorted(subfolders)):
        network, path = model.networks[component], folder if component == MODEL else folder / component
        own = formats.read(path, {component: network})[0].parameters.get(component, {})
        _to_float32(parameter for name, parameter in network.named_parameters() if name in own)  # as they were trained
        dora_mm.load_adapter({component: network}, path, backend=backend)
