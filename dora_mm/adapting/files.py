"""The adapters of a model on disk; of one for questions a folder, with a subfolder for each further network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from torch import nn
from yaml import YAMLError

import dora_mm
from dora_mm import backend as backends
from dora_mm import formats
from dora_mm.adapting.networks import METHOD_MODULES, TrainedNetworks, to_float32
from dora_mm.adapting.parts import MODEL
from dora_mm.config.images import TrainDiffusionConfig
from dora_mm.config.loader import dump_config
from dora_mm.config.models import ModelConfig, validated
from dora_mm.config.paths import resolve_model
from dora_mm.config.slider import THING, TrainSliderConfig
from dora_mm.config.vl import TrainVLConfig
from dora_mm.formats.adapter_file import AdapterFile
from dora_mm.models.images.image_model import ImageModel
from dora_mm.models.images.new_tokens import NewTokens
from dora_mm.models.opening import commit_of
from dora_mm.registries.renamed import migrated
from dora_mm.utils import yaml12
from dora_mm.utils.digest import weights_digest

if TYPE_CHECKING:
    from dora_mm.models.vl.vl_model import VLModel  # which needs the extra vl, and those who train images have none

IDENTITIES = {  # keys of an adapter's header
    "base_digest": "model.path: another base model",
    "vision_digest": "vision: another tower or features",
}


def save_trained(trained: TrainedNetworks, config: TrainVLConfig, model: VLModel, folder: Path) -> None:
    """Saves what was trained: in PEFT's format where it can hold it, else in our own.

    Args:
        trained: The adapted networks.
        config: The config of the training.
        model: The model, whose `identity` was computed before it was adapted.
        folder: Where to save.
    """
    about = {"base_model": config.model.path, "seed": str(config.seed), "config": dump_config(config)}
    about |= {**model.identity.weights, "pipeline_tag": model.pipeline_tag}
    about |= {"day": model.day.recorded} if model.day.recorded else {}
    if methods := METHOD_MODULES.get(config.adapter.method):
        methods.save(trained.networks[MODEL], config.adapter.method, config.adapter.rank, about, folder)
        return
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


def about_image_adapter(config: TrainDiffusionConfig, model: ImageModel) -> dict[str, str]:
    """Header metadata of adapter files: the base model, and the config of the training."""
    return {
        **about_base(config.model),
        "placeholder": config.data.placeholder or "",
        "instance_prompt": config.data.instance_prompt or config.data.placeholder or "",
        "unconditional": model.unconditional,  # the empty prompt in training: the zero embedding, or ""
        "config": dump_config(config),
    }


def about_slider(config: TrainSliderConfig) -> dict[str, str]:
    """Header metadata of the adapter files of a slider, likewise."""
    prompt = config.slider.neutral.replace(THING, next(iter(config.slider.things), ""))
    return {**about_base(config.model), "placeholder": "", "instance_prompt": prompt, "config": dump_config(config)}


def about_base(config: ModelConfig) -> dict[str, str]:
    """Header metadata on the base model of an adapter, without what the config leaves out."""
    base = {
        "base_model": config.path,
        "base_revision": commit_of(resolve_model(config.path), config.revision),
        "base_vae": config.vae,
        "base_dtype": config.dtype,
        "base_settings": json.dumps(settings) if (settings := config.generation_settings()) else None,
    }
    return {key: value for key, value in base.items() if value}


def save_image_adapter(
    config: TrainDiffusionConfig | TrainSliderConfig,
    adapted: Mapping[str, nn.Module],
    new_tokens: NewTokens,
    about: Mapping[str, str],
    folder: Path,
) -> None:
    """Saves what was trained of an image model: as diffusers does where that can hold it, else in the native form."""
    settings: dict[str, Any] = {"metadata": about, "strength": config.adapter.strength}
    format = formats.format_for(adapted, preferred="diffusers")
    formats.save(adapted, folder, format=format, tokens=new_tokens.by_word(), **settings)


def remarks_on_files(trained: TrainedNetworks) -> list[str]:
    """A sentence on each network whose adapter PEFT's format cannot hold."""
    found = (formats.about_format({component: network}, "peft") for component, network in trained.adapted.items())
    return [sentence for sentence in found if sentence]


def files_in(folder: Path) -> dict[str, AdapterFile]:
    """The adapter files that `save_trained` has written to a folder, by component.

    Raises:
        ValueError: There is no adapter, or a file is damaged.
    """
    subfolders = sorted({file.parent.name for file in folder.glob("*/*.safetensors")})
    return {MODEL: AdapterFile(folder)} | {name: AdapterFile(folder / name) for name in subfolders}


def digest_of_adapter(path: Path) -> str:
    """A digest of what `load_trained` loads: of each network's adapter, as `formats.adapter_digest`.

    Args:
        path: A run directory, an adapter folder or an adapter file.

    Raises:
        ValueError: There is no adapter, or a file is damaged.
    """
    methods, header = _extra_weights(path)
    if methods:
        about = [weights_digest([formats.find_file(path)]), {key: header.get(key) for key in methods.SETTINGS}]
    else:
        files = files_in(formats.adapter_folder(path))
        digests = {name: formats.adapter_digest(file) for name, file in files.items()}
        about = [digests, files[MODEL].header.get("seed")]  # that of weights which no file has: see `seed_of`
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def check_identity(folder: Path, metadata: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Checks that an adapter was trained with this base model and vision tower.

    Args:
        folder: The adapter's folder, for the message.
        metadata: The header of the adapter file.
        here: The weights of the loaded model, by the keys of IDENTITIES. What either side lacks is not compared.

    Raises:
        ValueError: The adapter was trained with another base model or vision tower.
    """
    for key, what in IDENTITIES.items():
        if metadata.get(key) and here.get(key) and metadata[key] != here[key]:
            raise ValueError(f"{what} than the one that the adapter {folder} was trained with")


def seed_of(folder: Path) -> int:
    """The seed of the weights that no file of the base model holds, from an adapter's header.

    Returns:
        The seed; 0 if the header names none.

    Raises:
        ValueError: The header's seed is not a number.
    """
    text = header_of(folder).get("seed", "0")
    if not text.isdecimal():
        raise ValueError(f"{formats.find_file(folder)} has a header key seed that is not a number: {text!r}")
    return int(text)


def header_of(path: Path) -> dict[str, str]:
    """The header of an adapter's file, also of one that changes no weight.

    Raises:
        ValueError: There is no adapter.
    """
    return _extra_weights(path)[1] or dict(formats.read(path)[1])


def _extra_weights(path: Path) -> tuple[Any, dict[str, str]]:
    """The loader of an adapter that changes no weights (bottlenecks, prefix), and its header; else (None, {})."""
    found = ((kind, kind.header_in(path)) for kind in dict.fromkeys(METHOD_MODULES.values()))
    return next(((kind, header) for kind, header in found if header is not None), (None, {}))


def saved_config(path: Path) -> TrainVLConfig | None:
    """The config of the training that saved an adapter, from the header of its file; None: no such training saved it.

    Args:
        path: The adapter's file or folder.

    Raises:
        ValueError: There is no adapter.
    """
    try:
        return validated(TrainVLConfig, migrated(yaml12.read(header_of(path)["config"]).value))
    except (KeyError, YAMLError, ValidationError):
        return None


def load_trained(model: VLModel, path: Path, *, backend: str) -> None:
    """Loads the adapters of a model, after checking that they were trained with it.

    Args:
        model: The bare model.
        path: A run directory, an adapter folder or an adapter file.
        backend: "auto", "torch" or "triton".

    Raises:
        ValueError: The adapter belongs to another model, or adapts a network that this one does not have.
    """
    folder = formats.adapter_folder(path)
    methods, header = _extra_weights(path)
    if methods:
        check_identity(folder, header, model.identity.weights)
        methods.load(model.networks[MODEL], model.target_maps[MODEL], path)
        return
    files = files_in(folder)
    check_identity(folder, formats.read(files[MODEL])[1], model.identity.weights)
    if missing := sorted(set(files) - set(model.networks)):
        raise ValueError(
            f"{folder} adapts the {missing[0]} tower too: remove vision.features, so that the tower encodes the images"
        )
    for component, file in files.items():
        network, own = model.networks[component], {name.path for name in file.parameters.values()}
        to_float32(parameter for name, parameter in network.named_parameters() if name in own)  # as they were trained
        formats.load({component: network}, file, forward=backends.select(backend))
