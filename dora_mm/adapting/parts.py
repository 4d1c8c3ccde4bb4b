"""The parts of a model by the names that configs have for them: `unet.attn`, `text_encoder.attn`, `vision.mlp`.

A name is a part of a target map with the network's in front. The parts of a network called "model", the only one of
most models, have the map's names; so have those that begin with the network's, such as `vision.attn` of "vision".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from dora_mm.config.adapter import EACH_TEXT_ENCODER, TEXT_ENCODERS, AdapterConfig, PartConfig
from dora_mm.core import TargetMap
from dora_mm.core.targets import parts_in

MODEL = "model"  # the network of a model that is a single one
Settings = dict[str, dict[str, PartConfig]]  # by network, then by the part of its target map


def full_name(component: str, part: str) -> str:
    """The name that a config has for a part of a network's target map."""
    return part if component == MODEL or part.startswith(f"{component}.") else f"{component}.{part}"


def check_names(config: AdapterConfig, target_maps: Mapping[str, TargetMap]) -> None:
    """Checks the names of parts against target maps alone, before networks are loaded.

    Raises:
        ValueError: A model with these maps can have no such part.
    """
    known = [full_name(component, part) for component, targets in target_maps.items() for part in targets.parts]
    for name in config.parts:
        if not set(_meant(name, target_maps)) & set(known):
            raise ValueError(f"adapter.parts: this model has no part {name}; it has {', '.join(known)}")


def settings_of(
    config: AdapterConfig, networks: Mapping[str, nn.Module], target_maps: Mapping[str, TargetMap]
) -> Settings:
    """The complete settings of every part that a config trains.

    Args:
        config: The `adapter` section.
        networks: The networks by component, adapted or not, with weights or without.
        target_maps: The target maps of those that can be adapted. Where the config names no parts, these are the
            default ones of the first map.

    Returns:
        The settings by component, in the order of `target_maps`, then by the map's part, in the order of the config.

    Raises:
        ValueError: The model has no such part.
    """
    places = {
        full_name(component, part): (component, part)
        for component, targets in target_maps.items()
        for part in parts_in(networks[component], targets)
    }
    main, targets = next(iter(target_maps.items()))
    parts = config.trained_parts([full_name(main, part) for part in targets.select().parts])
    found: Settings = {component: {} for component in target_maps}
    for name, settings in parts.items():
        meant = [place for each in _meant(name, target_maps) if (place := places.get(each))]
        if not meant:
            raise ValueError(f"adapter.parts: this model has no part {name}; it has {', '.join(places)}")
        for component, part in meant:
            found[component][part] = settings
    return {component: of_parts for component, of_parts in found.items() if of_parts}


def _meant(name: str, target_maps: Mapping[str, TargetMap]) -> Iterator[str]:
    """The parts that a name of a config means: itself, or for `text_encoders.attn` that of each text encoder."""
    component, _, part = name.partition(".")
    if component != TEXT_ENCODERS:
        yield name
        return
    yield from (full_name(known, part) for known in target_maps if known.startswith(EACH_TEXT_ENCODER))
