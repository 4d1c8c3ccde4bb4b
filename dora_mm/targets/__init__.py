"""The target maps: one file per architecture, whose record is in registries/target_maps.py.

Other models of transformers, those of vision and language above all, get a map from their structure (derived.py).
"""

import difflib
from collections.abc import Mapping
from typing import Any

from torch import nn

from dora_mm.core.targets import TargetMap, matches
from dora_mm.registries.registry import load
from dora_mm.registries.target_maps import TARGET_MAPS, map_for
from dora_mm.targets import derived

DERIVED = (  # names that stand for the map which a model's structure gives
    *(derived.NAME, "llava", "paligemma", "gemma3", "internvl", "fastvlm", "qwen2-vl", "qwen3-vl", "idefics3"),
    *("mllama", "florence2", "blip", "blip-2", "git"),
)

SHORT_NAMES = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}  # for strengths of the UNets of diffusers


def find(name: str, model: nn.Module | None = None) -> TargetMap:
    """Returns the target map of this name, with all its parts.

    Args:
        name: The name.
        model: The model that it is for, without which names of DERIVED have no map.

    Raises:
        ValueError: There is none, or none can be derived for the model; or its parts are not those of its record.
    """
    if name in DERIVED:
        if model is None:
            raise ValueError(f"the map {name} is derived from a model, and there is none")
        return derived.derive(model)
    if name not in TARGET_MAPS:
        if model is not None and any(matches(name, path, "targets") for path, _ in model.named_modules()):
            raise ValueError(f"there is no target map {name!r}; for modules of that name use a list: [{name!r}]")
        maps = ", ".join((*TARGET_MAPS, *DERIVED))
        own = "a list of names of modules adapts any other model: targets=['q_proj', 'v_proj']"
        raise ValueError(f"there is no target map {name!r}; there are {maps}; {own}")
    record = TARGET_MAPS[name]
    found: TargetMap = load(record.import_path)
    if set(found.parts) != set(record.parts):
        raise ValueError(
            f"target map {name}: {record.import_path} has the parts {', '.join(found.parts)}, and its record "
            f"{', '.join(record.parts) or 'none'}"
        )
    return found


def map_of(model: Any) -> TargetMap:
    """Returns the target map for a model of transformers or diffusers, derived if its class has none of its own.

    Args:
        model: The model, which may be on the meta device; or its config, or what `config.json` contains, which is
            enough for classes with a map. `model_type` decides for transformers, the name of the class for diffusers.

    Raises:
        ValueError: There is no map for it, and none can be derived; the message has the nearest names.
    """
    config = getattr(model, "config", model)
    keys = ("model_type", "_class_name")
    names_in_config = [config.get(key) if isinstance(config, Mapping) else getattr(config, key, None) for key in keys]
    names = [str(name) for name in (*names_in_config, type(model).__name__) if name]
    if found := map_for(names):
        return find(found)
    if isinstance(model, nn.Module) and names_in_config[0]:
        return derived.derive(model)
    known = [each for record in TARGET_MAPS.values() for each in record.models]
    close = difflib.get_close_matches(names[0], known, n=3, cutoff=0.0)
    raise ValueError(f"there is no target map for {names[0]}; nearest: {', '.join(close)}")
