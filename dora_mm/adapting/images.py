"""Trained parameters of an image model by its config: adapters, new tokens, and their initial values."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from dora_mm.adapting import networks
from dora_mm.adapting.assistant import check_assistant, load_assistant
from dora_mm.adapting.initial import check_settings, load_initial_file
from dora_mm.adapting.networks import TrainedNetworks, spec_of
from dora_mm.adapting.new_tokens import load_initial_tokens, train_tokens
from dora_mm.adapting.parts import check_names, select_modules
from dora_mm.config.adapter import EACH_TEXT_ENCODER, AdapterConfig
from dora_mm.config.images import TrainDiffusionConfig
from dora_mm.config.paths import resolve_path
from dora_mm.core import base_model
from dora_mm.formats.adapter_file import AdapterFile
from dora_mm.models.images.fitting import check_denoiser, denoiser_layers
from dora_mm.models.images.image_model import ImageModel


def adapt_image_model(model: ImageModel, config: TrainDiffusionConfig) -> TrainedNetworks:
    """Injects the adapters of the config, trains its new tokens, and loads `init_from` and the assistant."""
    found = networks.adapt(model.adaptable, model.target_maps, config.adapter, seed=config.seed, backend=config.backend)
    train_tokens(config.tokens, model, found)
    if config.adapter.init_from:
        load_initial_file(found, config.adapter, config.backend)
        load_initial_tokens(config.tokens, model, config.adapter)
    if config.adapter.assistant:
        load_assistant(config.adapter.assistant, model, config.backend)
    return found


def check_fit(config: TrainDiffusionConfig, model: ImageModel) -> None:
    """Checks a config against an image model whose weights are not loaded yet.

    Raises:
        ValueError: The model lacks a named part or rescaled guidance, or `adapter.init_from` or the assistant does not
            fit it.
    """
    model.check_rescale(config.sample.guidance_rescale, "sample.guidance_rescale")
    check_names(config.adapter, model.target_maps)
    check_initial_file(config.adapter, model)
    check_assistant(config.adapter, model)


def check_initial_file(config: AdapterConfig, model: ImageModel) -> None:
    """Checks `adapter.init_from` against the configs of an image model, before anything is loaded or encoded.

    Args:
        config: The `adapter` section.
        model: The model; its denoiser is looked at, without weights.

    Raises:
        ValueError: The file cannot be trained on, is for another model, or has another method or rank than the config.
    """
    if config.init_from is None:
        return
    file = AdapterFile(resolve_path(config.init_from, "adapter.init_from"))
    if reason := file.why_not_trainable():
        raise ValueError(f"adapter.init_from: {reason}")
    name, denoiser = model.denoiser, model.empty_denoiser()
    try:
        check_denoiser(file, model, denoiser)
    except ValueError as error:
        raise ValueError(f"adapter.init_from: {error}") from error
    others = [part for part in config.parts if part.startswith(EACH_TEXT_ENCODER)]
    own = config.model_copy(update={"parts": {p: s for p, s in config.parts.items() if p not in others}})
    if others and not own.parts:
        return
    selected = select_modules(own, {name: denoiser}, {name: model.target_maps[name]}).get(name, {})
    settings = {path: modules.settings for modules in selected.values() for path in modules.paths}
    for path, layer in denoiser_layers(file, model, denoiser):
        if path in settings:
            check_settings(file.path, f"{name}.{path}", layer.spec, spec_of(config, settings[path]), config)


@contextmanager
def bare(adapted: Iterable[nn.Module], model: ImageModel) -> Iterator[None]:
    """A context in which a model is that without trained adapters and new tokens; an assistant stays."""
    with base_model(adapted, with_assistant=True), model.new_tokens.off():
        yield
