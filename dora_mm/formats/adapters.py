"""Saving the adapters of models, and loading those of files into them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, distributed, nn

from dora_mm.core.adapted import AdaptedLayer
from dora_mm.core.forms import TORCH, Forward
from dora_mm.core.inject import InjectReport
from dora_mm.core.layer import DoRATransposedLinear
from dora_mm.core.strength import Strength
from dora_mm.core.wrappers.experts import DoRAExperts
from dora_mm.core.wrappers.sharded import is_sharded
from dora_mm.formats import model_card
from dora_mm.formats.adapter_file import AdapterFile
from dora_mm.formats.algebra.exact import unfolded, with_strength
from dora_mm.formats.base_samples import header_of_base, samples_in, warn_of_other_base
from dora_mm.formats.components import component_of, components_to_load, components_to_save
from dora_mm.formats.files.checks import first_not_finite
from dora_mm.formats.models import from_models, into_models, weight_shape
from dora_mm.formats.naming.names import Name
from dora_mm.formats.reader import opened, read
from dora_mm.formats.state import UNNAMED, AdapterState, LayerState, joined
from dora_mm.formats.tokens import TokenRows, bundled, write_token_file
from dora_mm.formats.tools import FORMATS
from dora_mm.formats.tools.tool import Contents, Format, write_companions
from dora_mm.registries.tools import TOOLS
from dora_mm.utils.tensor_writer import save_tensors

log = logging.getLogger(__name__)
_EMBEDDING = {"lora_A.weight": "lora_embedding_A", "lora_B.weight": "lora_embedding_B"}  # as PEFT calls them


def default_format(model: nn.Module | Mapping[str, nn.Module]) -> str:
    """The format of a file where none is chosen: diffusers' for networks of its pipelines, else PEFT's or our own."""
    if isinstance(model, Mapping) or component_of(model):
        return "diffusers"
    return format_for({UNNAMED: model}, "peft")


def format_for(components: Mapping[str, nn.Module], preferred: str) -> str:
    """The preferred format where it can hold the adapters of these models, or else our own, which holds all."""
    return "native" if why_not(preferred, components) else preferred


def why_not(format: str, components: Mapping[str, nn.Module]) -> str | None:
    """The reason why a format cannot hold the adapters of these models, with the remedy, or None where it can."""
    return FORMATS[format].why_not(components)


def about_format(components: Mapping[str, nn.Module], preferred: str) -> str | None:
    """A sentence on why a file of these models will not be in the preferred format, or None: it will."""
    if reason := why_not(preferred, components):
        return (
            "the adapter will be written in the native form alone, which "
            f"{TOOLS[preferred].title} cannot read: {reason}; dora-mm merge writes a model that every program reads"
        )
    return None


def save(
    model: nn.Module | Mapping[str, nn.Module],
    folder: Path,
    *,
    format: str | None,
    metadata: Mapping[str, str],
    extra_parameters: Sequence[str] = (),
    strength: float = 1.0,
    tokens: TokenRows | None = None,
) -> Path:
    """Saves the adapters of models, with a model card.

    Where FSDP2 has sharded them, every process has to call this, and one writes.

    Args:
        model: The adapted model, or several by component, such as {"unet": ..., "text_encoder": ...}.
        folder: The folder to write to; it is created where it does not exist.
        format: A key of `FORMATS`; None: that of `default_format`.
        metadata: Additional entries for the header of the file.
        extra_parameters: Names of parameters that were trained in addition to the adapters of a single model.
        strength: The strength of the adapters that becomes strength 1 in the file.
        tokens: The rows of new tokens. They are inside the file or in separate files, as the format has them, and as
            `<word>.safetensors` for other programs in any case.

    Returns:
        The path of the weights file.

    Raises:
        ValueError: There is no such format, the component of a single model is unknown, no layer is adapted, a layer
            has several adapters, a value is NaN or infinite, or the format cannot hold what was trained. Nothing
            is written then.
    """
    if format is None:
        format = default_format(model)
    if format not in FORMATS:
        raise ValueError(f"there is no adapter format {format!r}: use {', '.join(FORMATS)}")
    form = FORMATS[format]
    storage = form.export.holds.tokens
    components = components_to_save(model, form.components, format)
    state = _at_strength(from_models(components, extra_parameters), components, strength)
    state = replace(state, tokens=tokens or {})
    _warn_about_others(state, components)
    if form.parameter is not None and not form.export.holds.diffs:
        _move_full_weights(state)
    if problem := why_not(format, components):
        raise ValueError(problem)
    if state.tokens and not storage:
        raise ValueError(f"the {format} format has no place for the new token {next(iter(state.tokens))}: use native")
    if name := first_not_finite(state.tensors()):
        raise ValueError(f"{name} has values that are NaN or infinite, so the adapter was not saved")
    base = header_of_base(components)
    sharded = any(is_sharded(parameter) for m in components.values() for parameter in m.parameters())
    try:
        if not sharded or distributed.get_rank() == 0:
            token_header = write_token_file(folder, state.tokens)
            about = {**metadata, **base, **(token_header if storage == "separate" else {})}
            _write(state, components, folder, format, about)
            model_card.write_model_card(folder, format, state, metadata)
    finally:
        if sharded:
            distributed.barrier()  # the others may read the file next, and must not wait forever after an error
    return folder / form.file_name


def _warn_about_others(state: AdapterState, components: Mapping[str, nn.Module]) -> None:
    """Warns of parameters that may have been trained and will not be in the file."""
    for component, model in components.items():
        adapted = [module for module in model.modules() if isinstance(module, AdaptedLayer)]
        saved = {id(parameter) for layer in adapted for parameter in layer.adapter_tensors().values()}
        saved |= {id(model.get_parameter(name)) for name in state.parameters.get(component, {})}
        if others := [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in saved]:
            log.warning(
                "%d trainable parameters outside of the adapter (%s, ...) are not saved: name what was trained in "
                "extra_parameters, and freeze the rest by requires_grad_(False)",
                len(others),
                others[0],
            )


def _at_strength(state: AdapterState, components: Mapping[str, nn.Module], strength: float) -> AdapterState:
    """The adapters whose strength 1 is the given strength of these, which are those of the models."""
    if strength == 1:
        return state
    for component, layers in state.layers.items():
        for path, layer in layers.items():
            module = components[component].get_submodule(path)
            assert isinstance(module, AdaptedLayer)
            module.check_has_strength()
            layers[path] = unfolded(with_strength(layer, module.base_matrix(), strength), layer.spec)
    if name := next((name for found in state.parameters.values() for name in found), None):
        raise ValueError(f"the parameter {name} has no strength: save it with strength 1")
    return state


def _move_full_weights(state: AdapterState) -> None:
    """Makes weights of method `full` extra parameters, for a form that has adapters and these alone."""
    for component, layers in state.layers.items():
        full_layers = [path for path, layer in layers.items() if layer.spec.method == "full"]
        found = {f"{path}.weight": layers.pop(path).tensors["weight"] for path in full_layers}
        if found:
            state.parameters[component] = state.parameters.get(component, {}) | found


def _write(
    state: AdapterState, components: Mapping[str, nn.Module], folder: Path, format: str, metadata: Mapping[str, str]
) -> None:
    form = FORMATS[format]
    layers = {Name(c, path): layer for c, found in state.layers.items() for path, layer in found.items()}
    extra = {Name(c, name): tensor for c, found in state.parameters.items() for name, tensor in found.items()}
    if extra and form.parameter is None:
        raise ValueError(
            f"the {format} format holds adapters only, and {next(iter(extra)).path} was trained as well: save it as "
            "peft"
        )
    tensors = bundled(state.tokens) if form.export.holds.tokens == "inside" else {}
    own = {name: components[name.component].get_submodule(name.path) for name in layers}
    experts = [name for name, module in own.items() if isinstance(module, DoRAExperts)]
    in_file = form.export.experts(map(form.module, experts)) if experts and form.export.experts else {}
    for name, layer in layers.items():
        found = _tensors(form, name, form.oriented(layer, own[name]), own[name])
        module = form.module(name)
        tensors |= {f"{in_file.get(module, module)}.{ending}": tensor for ending, tensor in found.items()}
    if form.parameter is not None:
        tensors |= {form.parameter(name, layers.keys()): tensor for name, tensor in extra.items()}
    specs = {name: layer.spec for name, layer in layers.items()}
    transposed = {c for c, m in components.items() if any(isinstance(x, DoRATransposedLinear) for x in m.modules())}
    header = form.export.header(Contents(specs, metadata, list(extra), transposed, experts))
    if taken := header.keys() & metadata.keys():
        raise ValueError(f"the metadata key {min(taken)!r} is written by the format itself: choose another name")
    save_tensors(folder / form.file_name, tensors, {**metadata, **write_companions(header, folder)})


def _tensors(form: Format, name: Name, layer: LayerState, module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a layer by the end of their keys."""
    shape = weight_shape(module)
    assert shape is not None
    found = form.export.tensors(form.module(name), layer, torch.empty(shape, device="meta"))
    is_embedding = isinstance(module, nn.Embedding)
    return {_EMBEDDING.get(ending, ending) if is_embedding else ending: tensor for ending, tensor in found.items()}


def write_model_card(
    folder: Path, *, images: model_card.ModelCardImages = (), scores: model_card.ModelCardScores | None = None
) -> None:
    """Writes the model card of a saved adapter again, with images and scores: see `card.write_model_card`.

    Args:
        folder: The folder of the adapter.
        images: Prompts, each with the path of an image in the folder.
        scores: The name of the metric and its value, by task.

    Raises:
        ValueError: The folder holds no adapter.
    """
    file = AdapterFile(folder)
    format = next(name for name, form in FORMATS.items() if file.path.name == form.file_name)
    model_card.write_model_card(folder, format, *read(file), images, scores)


def remove_other_formats(file: Path) -> None:
    """Removes the adapter files of other formats in this file's folder, so that the folder holds a single adapter."""
    for other in FORMATS.values():
        if file.name != other.file_name:
            file.with_name(other.file_name).unlink(missing_ok=True)


def load(
    model: nn.Module | Mapping[str, nn.Module],
    path: Path | AdapterFile,
    *,
    strength: Strength = 1.0,
    name: str = "default",
    forward: Forward = TORCH,
    assists: bool = False,
) -> InjectReport:
    """Loads the adapters of a file into models.

    Extra parameters in the file overwrite those of the model permanently: see `into_models`.

    Args:
        model: The model, or several by component, such as {"unet": ...}; they are adapted where they are not yet.
        path: The adapter file, or a folder that contains exactly one.
        strength: The strength of the adapters, or of their parts: see `core.strength.strengths_of`. The names of parts
            begin with the component; with a single model they need not.
        name: The name of the adapter; another name than that of a loaded adapter stacks this one on top of it.
        forward: The function that runs the adapted layers.
        assists: Whether it is an assistant: see `into_models`.

    Returns:
        The layers that the file adapts.

    Raises:
        ValueError: There is no such file, it is damaged, or it does not fit the models, which are then unchanged.
    """
    file = opened(path)
    components = components_to_load(model, file)
    state, _ = read(file, components)
    samples = samples_in(file.header)
    if isinstance(strength, Mapping) and not isinstance(model, Mapping):
        strength = {_with_component(name, next(iter(components))): value for name, value in strength.items()}
    report = into_models(state, components, file.path, strength=strength, name=name, forward=forward, assists=assists)
    warn_of_other_base(components, samples, file.path)
    return report


def _with_component(name: str, component: str) -> str:
    return name if name.split(".")[0] == component else joined(component, name)
