"""The modules of a model by the names that configs have for them: parts (`unet.attn`, `vision.mlp`) and patterns.

A name is a part of a target map with the network's in front. The parts of a network called "model", the only one of
most models, have the map's names; so have those that begin with the network's, such as `vision.attn` of "vision".
Patterns are of the main network, unless the name of another one is in front. The special counts: a pattern takes its
modules from the parts, and a part that is named from `all-linear`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import nn

from dora_mm.config.adapter import (
    ALL_LINEAR,
    EACH_TEXT_ENCODER,
    EXTRA_WEIGHT_MODULES,
    FROZEN,
    TEXT_ENCODERS,
    AdapterConfig,
    PartConfig,
)
from dora_mm.core import TargetMap
from dora_mm.core.targets import match_modules, matching, parts_in
from dora_mm.core.wrappers.experts import ExpertProjection
from dora_mm.core.wrappers.separation import with_projections

MODEL = "model"  # the network of a model that is a single one
NOT_LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, ExpertProjection)


class PartModules(NamedTuple):
    """The modules that a name takes, by path, and how they are trained."""

    settings: PartConfig
    paths: tuple[str, ...]


Selection = dict[str, dict[str, PartModules]]  # by network, then by the part of its target map or the pattern


def full_name(component: str, part: str) -> str:
    """The name that a config has for a part of a network's target map."""
    return part if component == MODEL or part.startswith(f"{component}.") else f"{component}.{part}"


def check_names(config: AdapterConfig, target_maps: Mapping[str, TargetMap]) -> None:
    """Checks the names of parts against target maps alone, before networks are loaded; patterns need these.

    Raises:
        ValueError: A model with these maps can have no such part.
    """
    known = [full_name(component, part) for component, targets in target_maps.items() for part in targets.parts]
    for name in config.parts:
        if config.is_part(name) and not set(_meant(name, target_maps)) & set(known):
            raise ValueError(f"adapter.parts: this model has no part {name}; it has {', '.join(known)}")


def select_modules(
    config: AdapterConfig, networks: Mapping[str, nn.Module], target_maps: Mapping[str, TargetMap]
) -> Selection:
    """The modules that a config trains, by name, each with its complete settings.

    Args:
        config: The `adapter` section.
        networks: The networks by component, adapted or not, with weights or without.
        target_maps: The target maps of those that can be adapted. Where the config names no parts, these are the
            default ones of the first map.

    Returns:
        What is trained, by component in the order of `target_maps`; parts in the order of the config, then patterns.
        Nothing of methods that change no module.

    Raises:
        ValueError: The model has no such part or module, or two patterns take the same one.
    """
    if config.method in EXTRA_WEIGHT_MODULES:
        return {}
    main, targets = next(iter(target_maps.items()))
    names = config.all_parts([full_name(main, part) for part in targets.select().parts])
    patterns = {name: names.pop(name) for name in config.parts if config.is_pattern(name)}
    linear, parts = names.pop(ALL_LINEAR, None), _parts(names, networks, target_maps)
    found: Selection = {}
    for component, targets in target_maps.items():
        modules = with_projections(dict(networks[component].named_modules()))
        matched = _matched(patterns, component, modules, target_maps)
        own = {part: settings for (of, part), settings in parts.items() if of == component}
        others = parts_in(networks[component], targets) if linear and component == main else ()
        rest = {part: linear for part in others if linear and part not in own}
        selected = found[component] = {}
        for part, settings in (own | rest).items():
            paths = [path for path in match_modules(networks[component], targets.select([part])) if path not in matched]
            if part in own and not paths:
                raise ValueError(f"adapter.parts: patterns take all modules of {full_name(component, part)}")
            left = [path for path in paths if part in own or not isinstance(modules[path], NOT_LINEAR)]
            selected[part] = PartModules(settings, tuple(left))
        for name, settings in patterns.items():
            paths = [path for path, pattern in matched.items() if pattern == name]
            selected[name] = PartModules(settings, tuple(paths))
    return _trained(found)


def _trained(found: Selection) -> Selection:
    """A selection without frozen modules, and without the names and networks that are empty then."""
    trained = {
        component: {name: one for name, one in names.items() if one.paths and one.settings.method != FROZEN}
        for component, names in found.items()
    }
    return {component: names for component, names in trained.items() if names}


def _parts(
    names: Mapping[str, PartConfig], networks: Mapping[str, nn.Module], target_maps: Mapping[str, TargetMap]
) -> dict[tuple[str, str], PartConfig]:
    """The settings of parts by their networks and names in the target maps of these.

    Raises:
        ValueError: The model has no such part, and it is not frozen.
    """
    modules_by_name = {
        full_name(component, part): (component, part)
        for component, targets in target_maps.items()
        for part in parts_in(networks[component], targets)
    }
    found = {}
    for name, settings in names.items():
        meant = [modules for each in _meant(name, target_maps) if (modules := modules_by_name.get(each))]
        if not meant and settings.method != FROZEN:
            raise ValueError(f"adapter.parts: this model has no part {name}; it has {', '.join(modules_by_name)}")
        found |= dict.fromkeys(meant, settings)
    return found


def _matched(
    patterns: Iterable[str], component: str, modules: Mapping[str, nn.Module], target_maps: Mapping[str, TargetMap]
) -> dict[str, str]:
    """The pattern of each module of a network that one takes, by path.

    Raises:
        ValueError: A pattern matches no module, or one that cannot be adapted; or two match the same one.
    """
    found: dict[str, str] = {}
    for name in patterns:
        for full in _meant(name, target_maps):
            front, _, rest = full.partition(".")
            of, pattern = (front, rest) if front in target_maps and front != MODEL else (next(iter(target_maps)), full)
            for path in matching(pattern, modules, "adapter.parts") if of == component else ():
                if found.setdefault(path, name) != name:
                    raise ValueError(f"adapter.parts: both {found[path]} and {name} take {path}")
    return {path: found[path] for path in modules if path in found}


def _meant(name: str, target_maps: Mapping[str, TargetMap]) -> Iterator[str]:
    """The parts that a name of a config means: itself, or for `text_encoders.attn` that of each text encoder."""
    component, _, part = name.partition(".")
    if component != TEXT_ENCODERS:
        yield name
        return
    yield from (full_name(known, part) for known in target_maps if known.startswith(EACH_TEXT_ENCODER))
