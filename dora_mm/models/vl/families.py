"""The families of vision-language models: the model that a config names, loaded or only its structure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dora_mm.config.models import VisionConfig, VLModelConfig
from dora_mm.config.paths import resolve_model
from dora_mm.formats.files.model_folder import ModelFolder
from dora_mm.models.folders import read_config
from dora_mm.models.hub import UnreachableError
from dora_mm.models.opening import commit_of
from dora_mm.models.vl.vl_model import Structure, VLModel
from dora_mm.registries.registry import load
from dora_mm.registries.vl_families import DEFAULT, VL_FAMILIES


def family_of(model: VLModelConfig) -> type[VLModel]:
    """The family that a config names."""
    return load(VL_FAMILIES[model.family].import_path)


def family_of_folder(path: str) -> str | None:
    """The name of the family that alone reads a folder; None: there is none, or `path` is no folder of a model."""
    try:
        kind = ModelFolder(Path(path)).config().get("model_type")
    except ValueError:
        return None
    return VL_FAMILIES.first(lambda family: kind in family.model_types)


def load_vl_model(
    model: VLModelConfig,
    vision: VisionConfig,
    *,
    seed: int,
    trained_tower: bool = False,
    device: torch.device | str = "cpu",
) -> VLModel:
    """Loads the model that a config names, frozen.

    Args:
        model: The `model` section.
        vision: The `vision` section, for families without a tower of their own.
        seed: Seed of the weights that no file holds.
        trained_tower: A vision tower beside the model is adapted, so its outputs change from one step to the next.
        device: Where it computes.

    Raises:
        ValueError: The model cannot be loaded; the message names the key.
    """
    path = resolve_model(model.path)
    if (name := family_of_folder(path)) and name != model.family:
        raise ValueError(f"model.path: {path} is a {VL_FAMILIES[name].title}: set model.family to {name}")
    return family_of(model).load(model, vision, seed=seed, trained_tower=trained_tower, device=device)


def load_for_questions(
    path: str,
    run: tuple[VLModelConfig, VisionConfig] | None,
    *,
    seed: int,
    trained_tower: bool,
    given: Mapping[str, str],
    device: torch.device | str,
    today: str | None = None,
) -> VLModel:
    """Loads a model for a single question, with the settings of the run that trained an adapter of it.

    Args:
        path: The model: a folder, or a hub name.
        run: The `model` and `vision` sections of the run; None: there is none.
        seed: Seed of the weights that no file holds, as in the run.
        trained_tower: The run adapts a vision tower beside the model.
        given: A `dtype` or `revision` that replaces that of the run.
        device: Where the model computes.
        today: The day that its chat template may ask for, in ISO format; None: no row is rendered.

    Raises:
        ValueError: The model cannot be loaded, or needs a run and there is none.
    """
    name = family_of_folder(path) or (run[0].family if run else DEFAULT)
    family, section = load(VL_FAMILIES[name].import_path), load(VL_FAMILIES[name].section)
    model, vision = run if run and run[0].family == name else (None, VisionConfig())
    settings = {"path": path, **family.interactive_settings(path, model, given)}
    settings |= {"date": today} if "date" in section.model_fields else {}
    model = model.model_copy(update=settings) if model else section.model_validate({"family": name, **settings})
    vision = vision.model_copy(update={"features": ()})
    loaded = load_vl_model(model, vision, seed=seed, trained_tower=trained_tower, device=device)
    loaded.day.source = "today"
    if not loaded.converses:  # those that do take any question
        loaded.check([loaded.question_task])
    return loaded


def pinned(model: VLModelConfig) -> VLModelConfig:
    """The `model` section with the commit of a hub model as its revision, for all that is read of it later.

    Raises:
        ValueError: The hub cannot be reached, or the path is no model.
    """
    path = resolve_model(model.path)
    if "revision" not in type(model).model_fields or Path(path).exists():
        return model
    read_config(path, model.revision)  # puts it into the hub's cache
    return model.model_copy(update={"revision": commit_of(path, model.revision) or model.revision})


def is_local(model: VLModelConfig, vision: VisionConfig) -> bool:
    """Whether all that a model is loaded from is on this machine."""
    return family_of(model).is_local(model, vision)


def load_vl_model_if_local(model: VLModelConfig, vision: VisionConfig, **settings: Any) -> tuple[VLModel | None, bool]:
    """As `load_vl_model`, for a model that is on this machine.

    Returns:
        The model, None where a file of it is missing that is needed to read rows; and whether its weights are here.

    Raises:
        ValueError: As there, but not because the hub cannot be reached.
    """
    family = family_of(model)
    here = family.is_local(model, vision)
    if not here and not family.opens_without_weights:
        return None, False
    try:
        return load_vl_model(model, vision, **settings), here
    except UnreachableError:
        if here:
            raise
        return None, False


def structure_of(model: VLModelConfig, vision: VisionConfig, *, tower: bool = False) -> Structure:
    """Builds the networks that a config names from their configs alone.

    Args:
        model: The `model` section.
        vision: The `vision` section, for families without a tower of their own.
        tower: Whether a vision tower beside the model is among the networks.

    Raises:
        ValueError: There is no such model.
    """
    return family_of(model).structure(model, vision, tower=tower)
