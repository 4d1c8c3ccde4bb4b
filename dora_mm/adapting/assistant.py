"""The assistant of a training: a frozen adapter that another is trained over, and that is not part of the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from dora_mm import backend as backends
from dora_mm import formats
from dora_mm.config.adapter import AssistantConfig, ImageAdapterConfig
from dora_mm.config.paths import resolve_path
from dora_mm.core import AdaptedLayer
from dora_mm.formats.adapter_file import AdapterFile
from dora_mm.models.images.fitting import changes_text, check_denoiser, denoiser_layers
from dora_mm.models.images.image_model import ImageModel

KEY = "adapter.assistant.path"
NAME = "assistant"  # of the adapter in the layers


def check_assistant(config: ImageAdapterConfig, model: ImageModel) -> None:
    """Checks `adapter.assistant` against the configs of an image model, before anything is loaded or encoded.

    Args:
        config: The `adapter` section.
        model: The model; its denoiser is looked at, without weights.

    Raises:
        ValueError: The file is damaged or for another model; or it has more than adapters of the denoiser.
    """
    if config.assistant is None:
        return
    path = resolve_path(config.assistant.path, KEY)
    try:
        file, denoiser = AdapterFile(path), model.empty_denoiser()
        check_denoiser(file, model, denoiser)
        methods = {layer.spec.method for _, layer in denoiser_layers(file, model, denoiser)}
    except ValueError as error:
        about = "" if str(path) in str(error) else f"{path}: "
        raise ValueError(f"{KEY}: {about}{error}") from error
    if not methods:
        raise ValueError(
            f"{KEY}: {file.path} does not fit this model: it adapts nothing of the {model.denoiser} of {model.title}"
        )
    if changes_text(file, model, denoiser) or file.biases or file.parameters or "full" in methods:
        raise ValueError(
            f"{KEY}: {file.path} has more than adapters of the {model.denoiser}, such as text encoders, new tokens, "
            "biases or whole weights, which cannot be left out again: give a file without them"
        )


def load_assistant(config: AssistantConfig, model: ImageModel, backend: str) -> int:
    """Loads an assistant into the denoiser of a model, whose trained adapters it is added to.

    Args:
        config: Its section.
        model: The model, with the adapters that are trained.
        backend: "auto", "torch" or "triton".

    Returns:
        The number of modules that it adapts.

    Raises:
        ValueError: The file cannot be read, or does not fit the denoiser.
    """
    denoiser, forward = {model.denoiser: model.networks[model.denoiser]}, backends.select(backend)
    settings = {"strength": config.strength, "name": NAME, "forward": forward, "assists": True}
    try:
        return formats.load(denoiser, resolve_path(config.path, KEY), **settings).num_modules
    except ValueError as error:
        raise ValueError(f"{KEY}: {error}") from error


def assistant_identity(config: ImageAdapterConfig, digest: Callable[[Path], str]) -> dict[str, str]:
    """A digest of `adapter.assistant`, by a description; empty without it.

    Args:
        config: The `adapter` section.
        digest: Gives that of an adapter at a path.
    """
    if config.assistant is None:
        return {}
    return {"the assistant": digest(resolve_path(config.assistant.path, KEY))}


def assistant_line(config: AssistantConfig, networks: Mapping[str, nn.Module]) -> str:
    """A line on a loaded assistant, for the dry run."""
    layers = [m.adaptation for network in networks.values() for m in network.modules() if isinstance(m, AdaptedLayer)]
    count = sum(state.assists or any(other.assists for other in state.stacked.values()) for state in layers)
    where = "in contact sheets but the last" if config.in_samples else "not in contact sheets"
    return (
        f"assistant {config.path}, strength {config.strength:g}, {count} modules: at work in training and held-out "
        f"losses, {where}, not in the result"
    )
