"""The families of image models, and which one a folder, a file or a hub repository is of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from dora_mm import targets
from dora_mm.config.models import ModelConfig
from dora_mm.config.paths import CONFIG, INDEX, resolve_model, resolve_path
from dora_mm.formats.files.model_folder import ModelFolder
from dora_mm.models.hub import local_copy
from dora_mm.models.identity import ModelIdentity, digests_of, weights_of
from dora_mm.models.images.components import (
    META,
    Components,
    class_of,
    empty_network,
    is_network,
    load_components,
    load_single_file,
    load_vae,
    missing_in,
    pipeline_class_of,
    tensor_names,
)
from dora_mm.models.images.denoiser_file import PREFIX, load_denoiser
from dora_mm.models.images.image_model import Distilled, ImageModel
from dora_mm.models.images.schedulers import changes_for
from dora_mm.models.images.weights import PipelineFiles
from dora_mm.models.opening import check_revision, is_weights, loaded_files, opened_folder, opening
from dora_mm.models.quantization import check_installed, quantize_layers
from dora_mm.models.streaming import blocks_to_stream
from dora_mm.registries.image_families import IMAGE_FAMILIES
from dora_mm.registries.registry import load
from dora_mm.utils.digest import weights_digest


def family_of(path: str, revision: str | None = None) -> type[ImageModel]:
    """The family of a model, by its index or by the names of the tensors in a single checkpoint.

    Args:
        path: A folder, a `.safetensors` file or a hub name.
        revision: A commit, branch or tag of a hub model; None: its main branch.

    Raises:
        ValueError: There is no model, or it is of no family here.
    """
    if Path(path).is_file():
        if found := family_of_file(Path(path)):
            return found
        if denoiser_family := _family_of_denoiser(tensor_names(Path(path))):
            raise ValueError(
                f"model.path: {path} is the denoiser of {denoiser_family} alone: set model.denoiser={path}, and "
                "model.path to a folder or hub name of the model."
            )
        files = " and ".join(family.title for family in IMAGE_FAMILIES.values() if family.tensors)
        raise ValueError(
            f"model.path: {path} cannot be loaded: it is no checkpoint of {files}, of which single files are read."
        )
    pipeline = pipeline_class_of(path, revision)
    if name := IMAGE_FAMILIES.first(lambda family: family.pipeline == pipeline):
        return load(IMAGE_FAMILIES[name].import_path)
    edits = re.search("Edit|Kontext", pipeline) is not None
    families = [family for family in IMAGE_FAMILIES.values() if family.edits or not edits]
    known = ", ".join(f"{family.title} ({family.pipeline})" for family in families)
    kind = "models that edit" if edits else "image models"
    raise ValueError(f"model.path: {path} is a {pipeline}, which is no family of {kind} here; there are {known}.")


def _family_of_denoiser(names: Iterable[str]) -> str | None:
    """The title of the family that a file with the denoiser alone is of, by the names of its tensors."""
    names = [PREFIX.sub("", name) for name in names]
    found = IMAGE_FAMILIES.first(lambda it: any(name.startswith(it.denoiser) for name in names))
    return IMAGE_FAMILIES[found].title if found else None


def family_of_file(file: Path) -> type[ImageModel] | None:
    """The family of a single checkpoint, by the names of its tensors; None: it is of none.

    Raises:
        ValueError: It is not a file of safetensors.
    """
    names = tensor_names(file)
    found = IMAGE_FAMILIES.first(lambda family: family.is_checkpoint(names))
    return load(IMAGE_FAMILIES[found].import_path) if found else None


def load_image_model(config: ModelConfig, *, empty: bool = False) -> ImageModel:
    """Opens the model that a config's `model` section names: frozen, in the configured dtype, on the CPU.

    Its components are loaded when they are asked for; asking for one whose weights are missing or damaged is an error.

    Args:
        config: The `model` section.
        empty: Its networks are built from their configs, on the meta device: no weights need be there.

    Raises:
        ValueError: The model or its VAE does not exist, lacks a component, is of no family here or does not fit the
            section, or a package is missing; the message names the key.
    """
    path, dtype = resolve_model(config.path), getattr(torch, config.dtype)
    for key in ("quantization", "text_quantization"):
        if (quantization := getattr(config, key)) and not empty:
            check_installed(quantization, f"model.{key}")
    check_revision(path, config.revision)
    family = family_of(path, config.revision)
    for name, _ in config.sections():
        if name != family.name:
            found, given = family.record().title, IMAGE_FAMILIES[name].title
            raise ValueError(f"model.{name}: {path} is {found}, not {given}: leave it out.")
    names = [name for phase in family.phases for name in phase]
    read_here = _read_from_path(family, config)
    if Path(path).is_dir() and (missing := missing_in(Path(path), _named_in_path(family, config))):
        raise ValueError(f"model.path: {path} is incomplete: it lacks {', '.join(missing)}.")
    changes = scheduler_changes(family, path, config.prediction)
    single = family.single_file if Path(path).is_file() else None
    files = _opened_folder(family, path, config.revision)
    own = PipelineFiles(path, files.path, read_here, config)

    def load(wanted: Sequence[str]) -> dict[str, Any]:
        pipeline, others = family.pipeline_class(), [name for name in wanted if not is_network(name)]
        if single and empty:
            found = {**single.parts(), **load_components(pipeline, str(single.configs), ["scheduler"], names, dtype)}
        elif single:
            unwanted: dict[str, Any] = {name: None for name in names if name not in wanted}
            found = load_single_file(pipeline, path, dtype, single.configs, {**unwanted, **single.parts()})
        else:
            read = others if empty else [name for name in wanted if name in read_here]
            if "vae" in read and Path(path).is_dir() and set(own.here["vae"]) == {CONFIG}:
                raise ValueError(f"model.path: {path} has no weights of its VAE: set model.vae to a folder with them.")
            variant = "" if empty else own.variant
            found = load_components(pipeline, own.fetch(read), read, names, dtype, variant) if read else {}
        if config.denoiser and family.denoiser in wanted and not empty:
            found[family.denoiser] = _denoiser_of_file(family, files, config)
        if empty:
            found |= {name: empty_network(files, name, dtype) for name in wanted if name not in others}
        if changes and "scheduler" in found:
            scheduler = found["scheduler"]
            found["scheduler"] = type(scheduler).from_config(scheduler.config, **changes)
        for name in wanted:
            if quantization := config.quantization_of(name, family.denoiser):
                layers = targets.find(family.maps[name]) if name == family.denoiser else None
                device, streamed = components.device_of(name), components.streamed.get(name)
                waiting = blocks_to_stream(found[name], streamed.targets, streamed.amount, device) if streamed else ()
                quantize_layers(found[name], layers, quantization, device, waiting)
        return found

    def weights(name: str) -> list[Path]:
        if config.denoiser and name == family.denoiser:
            return [_denoiser_file(config)]
        return [Path(path)] if single else own.weights(name)

    def loaded_as(name: str) -> str:
        is_text = name.startswith("text_encoder")
        rounded = f" {config.text_quantization}" if is_text and config.text_quantization else ""
        return f"{config.dtype} {config.quantization}{rounded}"

    components = Components(load, family.phases, files, None if empty else weights, loaded_as)
    if empty:
        components.to(META)
    model = family(components, dict(config.sections()).get(family.name))
    if config.vae:
        vae = resolve_model(config.vae, "model.vae")
        components["vae"] = load_vae(family.vae_class(), vae, dtype, empty=empty)
    model.check(config)
    return model


def _denoiser_of_file(family: type[ImageModel], files: ModelFolder, config: ModelConfig) -> Any:
    """The denoiser of `model.denoiser`; see `load_denoiser`."""
    file, kept = _denoiser_file(config), targets.find(family.maps[family.denoiser])
    with opening(str(file), f"{file} cannot be loaded", key="model.denoiser"):
        kind, file_config = class_of(files, family.denoiser), files.config(family.denoiser)
        stays = config.quantization == "float8"
        return load_denoiser(kind, file_config, file, getattr(torch, config.dtype), kept if stays else None)


def _denoiser_file(config: ModelConfig) -> Path:
    return resolve_path(str(config.denoiser), "model.denoiser")


def _read_from_path(family: type[ImageModel], config: ModelConfig) -> list[str]:
    """The components that are read from `model.path`: all but a denoiser and a VAE that are elsewhere."""
    elsewhere = {family.denoiser if config.denoiser else None, "vae" if config.vae else None}
    return [name for phase in family.phases for name in phase if name not in elsewhere]


def _named_in_path(family: type[ImageModel], config: ModelConfig) -> list[str]:
    """The components that have to have a folder in `model.path`: what another VAE has to fit is in its own config."""
    return [*_read_from_path(family, config), *(["vae"] if config.vae else [])]


def _opened_folder(family: type[ImageModel], path: str, revision: str | None) -> ModelFolder:
    """The index and configs of a model; a single checkpoint lacks them, and its family has them."""
    if family.single_file and Path(path).is_file():
        return ModelFolder(family.single_file.configs)
    return opened_folder(path, revision, key="model.path")


def scheduler_changes(family: type[ImageModel], path: str, prediction: str) -> dict[str, Any]:
    """The settings of a model's scheduler to change, for what it predicts: see `changes_for`.

    Raises:
        ValueError: A single checkpoint is of a kind that its family does not know.
    """
    try:
        single = family.single_file if Path(path).is_file() else None
        marked = single.scheduler(tensor_names(Path(path))) if single else {}
        return changes_for(prediction, marked)
    except ValueError as error:
        raise ValueError(f"model.path: {path} cannot be used: {error}.") from None


def distilled_of(config: ModelConfig) -> Distilled | None:
    """How a model generates that was distilled to few steps, by its files; None: it was not."""
    path = resolve_model(config.path)
    family = family_of(path, config.revision)
    return family.distilled(_opened_folder(family, path, config.revision))


def has_unread_layers(config: ModelConfig) -> bool:
    """Whether a training leaves some adapters without gradients; False of a model that cannot be found, too."""
    try:
        return family_of(resolve_model(config.path), config.revision).has_unread_layers
    except ValueError:  # which is said when it is loaded
        return False


def about_prediction(config: ModelConfig) -> str:
    """A line with what an image model predicts, and what says so."""
    path = resolve_model(config.path)
    family = family_of(path, config.revision)
    changes = scheduler_changes(family, path, config.prediction)
    own = _opened_folder(family, path, config.revision).config("scheduler")
    found = {**own, **changes}
    line = f"{family.record().title} that predicts {found.get('prediction_type', 'a velocity')}"
    if found.get("rescale_betas_zero_snr"):
        line += ", whose last noise level has no signal (zero terminal SNR)"
    if not changes:
        return line
    return f"{line}, as {'its marker tensors say' if config.prediction == 'auto' else 'model.prediction says'}"


def identity_of(config: ModelConfig) -> ModelIdentity:
    """The identity of the image model that a config's `model` section names.

    Raises:
        ValueError: There is no such model, or a file of it is damaged; the message names the key.
    """
    weights = _weight_files(config)
    if not weights or not all(weights.values()):  # of a hub model, the configs alone may be here
        return ModelIdentity()
    digests = {weights_of(name): weights_digest(found) for name, found in weights.items()}
    return ModelIdentity(digests, file_digests(config))


def file_digests(config: ModelConfig) -> dict[str, str]:
    """Digests of the files of an image model beside the weights, see `ModelIdentity.files`.

    A network that a file or folder of its own replaces still has its config in `model.path`. A single checkpoint has
    no such files: its configs are its family's.
    """
    path, vae = _copies(config)
    if path is None or path.is_file():
        return digests_of(vae, "model.vae/") if vae else {}
    family = family_of(str(path))
    own, found = _read_from_path(family, config), digests_of(path, names=[INDEX])
    for name in (name for phase in family.phases for name in phase):
        found |= digests_of(path / name, f"{name}/", [] if name in own else [CONFIG])
    return found | (digests_of(vae, "model.vae/") if vae else {})


def _weight_files(config: ModelConfig) -> dict[str, list[Path]]:
    """The files with the weights of each network; empty: something was not downloaded yet."""
    path, vae = _copies(config)
    if path is None or (config.vae and vae is None):
        return {}
    family, found = family_of(str(path)), {"checkpoint": [path]}
    if path.is_dir():
        names = _read_from_path(family, config)
        own = PipelineFiles(str(path), path, names, config)
        found = {name: own.weights(name) for name in names if is_network(name)}
    if config.denoiser:
        found[family.denoiser] = [_denoiser_file(config)]
    if vae:
        found["vae"] = [file for file in loaded_files(vae) if is_weights(file)]
    return found


def _copies(config: ModelConfig) -> tuple[Path | None, Path | None]:
    """The local copies of `model.path` and of `model.vae`; None: there is none."""
    vae = local_copy(resolve_model(config.vae, "model.vae")) if config.vae else None
    return local_copy(resolve_model(config.path), config.revision), vae


def load_image_model_if_local(config: ModelConfig) -> ImageModel | None:
    """As `load_image_model`; None if a component of the model would have to be downloaded.

    Raises:
        ValueError: A local model does not exist, is incomplete or of no family here; the message names the key.
    """
    given = resolve_model(config.path)
    found = {"path": local_copy(given, config.revision)}
    if config.vae:
        found["vae"] = local_copy(resolve_model(config.vae, "model.vae"))
    if None in found.values() or (not Path(given).exists() and not is_complete(str(found["path"]), config)):
        return None
    revision = config.revision if Path(given).exists() else None  # the copy is of this revision
    changes = {"revision": revision, **{key: str(path) for key, path in found.items()}}
    return load_image_model(config.model_copy(update=changes))


def is_complete(copy: str, config: ModelConfig) -> bool:
    """Whether a hub model's copy on this machine has all components: parts of it may have been downloaded alone."""
    if not (Path(copy) / INDEX).is_file():
        return False
    family = family_of(copy)
    names = _read_from_path(family, config)
    return (
        not missing_in(Path(copy), _named_in_path(family, config))
        and PipelineFiles(copy, Path(copy), names, config).has_weights
    )
