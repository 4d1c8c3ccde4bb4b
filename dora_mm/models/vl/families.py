"""The families of models: one that a config names, loaded or only its structure."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dora_mm.config.models import VisionConfig, VLBartModelConfig, VLMModelConfig, VLModelConfig
from dora_mm.config.paths import resolve_model
from dora_mm.core import TargetMap
from dora_mm.data.features.sources import open_features
from dora_mm.data.vl.needed import found_features
from dora_mm.models.folders import empty_model, has_weights, read_config, saved_dtype
from dora_mm.models.opening import UnreachableError, commit_of, local_copy
from dora_mm.models.vl.towers.tower import load_tower
from dora_mm.models.vl.vl_bart.family import VISION, VLBartModel, vl_bart_maps
from dora_mm.models.vl.vl_bart.loading import empty_vl_bart, is_vl_bart
from dora_mm.models.vl.vl_model import VLModel
from dora_mm.models.vl.vlm.family import VLM
from dora_mm.targets import map_of


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
        vision: The `vision` section, which only VL-BART reads.
        seed: Seed of the weights that no file holds.
        trained_tower: A vision tower beside the model is adapted, so its outputs change from one step to the next.
        device: Where it computes.

    Raises:
        ValueError: The model cannot be loaded; the message names the key.
    """
    if isinstance(model, VLBartModelConfig):
        return VLBartModel.load(model, vision, seed=seed, trained_tower=trained_tower, device=device)
    if is_vl_bart(path := resolve_model(model.path)):
        raise ValueError(f"model.path: {path} is a VL-BART: set model.family to vl_bart")
    return VLM(model, device)


def load_to_ask(
    path: str,
    run: tuple[VLModelConfig, VisionConfig] | None,
    *,
    seed: int,
    trained_tower: bool,
    given: Mapping[str, str],
    device: torch.device | str,
) -> VLModel:
    """Loads a model for a single question, with the settings of the run that trained an adapter of it.

    Args:
        path: The model: a folder, or a hub name.
        run: The `model` and `vision` sections of the run; None: there is none.
        seed: Seed of the weights that no file holds, as in the run.
        trained_tower: The run adapts a vision tower beside the model.
        given: A `dtype` or `revision` that replaces that of the run.
        device: Where the model computes.

    Raises:
        ValueError: The model cannot be loaded, or needs a run and there is none.
    """
    if is_vl_bart(path):
        if given:
            raise ValueError(f"--dtype and --revision are not for {path}, a VL-BART")
        if run is None or not isinstance(run[0], VLBartModelConfig):
            raise ValueError(
                f"{path} is a VL-BART, whose vision tower only a run of its own names: give one by --adapter"
            )
        model, vision = run[0].model_copy(update={"path": path}), run[1].model_copy(update={"features": ()})
        loaded = load_vl_model(model, vision, seed=seed, trained_tower=trained_tower, device=device)
        loaded.check([loaded.question_task])
        return loaded
    if run is not None and isinstance(run[0], VLMModelConfig):
        same = {} if resolve_model(run[0].path) == path else {"revision": None}
        settings = run[0].model_copy(update={"path": path, **same, **given})
    else:
        dtype = given.get("dtype") or saved_dtype(path, read_config(path, given.get("revision")))
        settings = VLMModelConfig.model_validate({"path": path, **given, "dtype": dtype})
    return load_vl_model(settings, VisionConfig(), seed=seed, device=device)


def pinned(model: VLModelConfig) -> VLModelConfig:
    """The `model` section with the commit of a hub model as its revision, for all that is read of it later.

    Raises:
        ValueError: The hub cannot be reached, or the path is no model.
    """
    path = resolve_model(model.path)
    if isinstance(model, VLBartModelConfig) or Path(path).exists():
        return model
    read_config(path, model.revision)  # puts it into the hub's cache
    return model.model_copy(update={"revision": commit_of(path, model.revision) or model.revision})


def load_vl_model_if_local(
    model: VLModelConfig,
    vision: VisionConfig,
    *,
    seed: int,
    trained_tower: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[VLModel | None, bool]:
    """As `load_vl_model`, for a model that is on this machine.

    Returns:
        The model, None where a file of it is missing that is needed to read rows; and whether its weights are here.

    Raises:
        ValueError: As there, but not because the hub cannot be reached.
    """
    path = resolve_model(model.path)
    if isinstance(model, VLBartModelConfig):
        here = local_copy(path) is not None and len(found_features(vision)) == len(vision.features)
    else:
        here = has_weights(path, model.revision)
        with suppress(UnreachableError):
            return load_vl_model(model, vision, seed=seed, trained_tower=trained_tower, device=device), here
    found = load_vl_model(model, vision, seed=seed, trained_tower=trained_tower, device=device) if here else None
    return found, here


@dataclass(frozen=True)
class Structure:
    """The networks of a model without their weights, on the meta device, and their target maps, by component."""

    networks: Mapping[str, nn.Module]
    target_maps: Mapping[str, TargetMap]


def structure_of(model: VLModelConfig, vision: VisionConfig, *, tower: bool = False) -> Structure:
    """Builds the networks that a config names from their configs alone.

    Args:
        model: The `model` section.
        vision: The `vision` section, which only VL-BART reads.
        tower: Whether VL-BART's vision tower is among the networks.

    Raises:
        ValueError: There is no such model.
    """
    path = resolve_model(model.path)
    if isinstance(model, VLMModelConfig):
        network = empty_model(path, model.revision).to(getattr(torch, model.dtype))
        return Structure({"model": network}, {"model": map_of(network)})
    with torch.device("meta"):
        features = found_features(vision)
        dim = open_features(features).dim if features else model.feature_dim
        trunk: Any = load_tower(vision.model_copy(update={"pretrained": None})) if tower or dim is None else None
        network = empty_vl_bart(model, trunk.feature_dim if dim is None else dim)
    networks = {"model": network} | ({VISION: trunk} if tower else {})
    return Structure(networks, vl_bart_maps(trunk if tower else None))
