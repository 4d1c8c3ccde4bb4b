"""A table of what a config trains of a vision-language model, part by part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from dora_mm.config.adapter import PartConfig, VLAdapterConfig
from dora_mm.config.training import OptimizerConfig
from dora_mm.core import TargetMap
from dora_mm.core.targets import match_modules, parts_in
from dora_mm.tasks.vl_adapters import MODEL, Trained, parameters_by_name
from dora_mm.utils.tables import aligned_columns

HEADING = ("part", "modules", "method", "rank", "alpha", "lr", "count", "parameters")
MOST_NAMES = 7  # of modules of a part that are listed


def parts_table(
    trained: Trained, target_maps: Mapping[str, TargetMap], adapter: VLAdapterConfig, optimizer: OptimizerConfig
) -> str:
    """A text table of every part of a model: how it is trained, its modules and trained parameters; frozen ones last.

    Args:
        trained: What the config trains; of a model without weights, too.
        target_maps: The target maps of all networks of the model.
        adapter: The `adapter` section.
        optimizer: The `optimizer` section, for the learning rates.
    """
    settings = adapter.trained_parts(tuple(target_maps[MODEL].select().parts))
    rows, frozen, counted = [], [], set()
    for component, targets in target_maps.items():
        network = trained.networks.get(component)
        if network is None:  # nothing of it is trained
            continue
        for part in parts_in(network, targets):
            paths = list(match_modules(network, targets.select([part])))
            if part not in settings:
                frozen.append((part, leaves(paths), "frozen", "", "", "", f"{len(paths):,}", ""))
                continue
            names = _trained_in(trained, component, paths, whole=settings[part].method == "full")
            rows.append((part, leaves(paths), *_settings(settings[part], optimizer), *_counts(paths, names)))
            counted |= names.keys()
    for name, parameters in _extra_groups(trained, adapter.extra_trainable, counted).items():
        rows.append((f"extra: {name}", "", "full", "", "", _rate(optimizer.lr), *_counts(parameters, parameters)))
    rows.append(("all", "", "", "", "", "", "", f"{trained.num_trained:,}"))
    return aligned_columns([HEADING, *rows, *frozen], num_text=3)


def _trained_in(trained: Trained, component: str, paths: Iterable[str], *, whole: bool) -> dict[str, nn.Parameter]:
    """The trained parameters of modules: of their adapters, or (`whole`) the modules' own."""
    known, found = set(trained.extra.get(component, ())), {}
    for path in paths:
        for name, parameter in trained.networks[component].get_submodule(path).named_parameters():
            key = f"{component}.{path}.{name}"
            if key in trained.parameters and (whole or f"{path}.{name}" not in known):
                found[key] = parameter
    return found


def _extra_groups(trained: Trained, groups: Sequence[str], counted: set[str]) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters of `adapter.extra_trainable` by its entries, each in the first that has it."""
    found, counted = {}, set(counted)
    for group in groups:
        names = parameters_by_name(trained.networks[MODEL], [group])
        found[group] = {key: p for name, p in names.items() if (key := f"{MODEL}.{name}") not in counted}
        counted |= found[group].keys()
    return found


def _counts(items: Iterable[object], parameters: Mapping[str, nn.Parameter]) -> tuple[str, str]:
    return f"{len(list(items)):,}", f"{sum(parameter.numel() for parameter in parameters.values()):,}"


def _settings(part: PartConfig, optimizer: OptimizerConfig) -> tuple[str, str, str, str]:
    """Method, rank, alpha and learning rate of a part."""
    has_update = part.method in ("dora", "lora")
    rank, alpha = (f"{part.rank}", f"{part.alpha:g}") if has_update else ("", "")
    return str(part.method), rank, alpha, _rate(part.lr or optimizer.lr)


def _rate(value: float) -> str:
    return f"{value:.4g}"


def leaves(paths: Sequence[str]) -> str:
    """The distinct last names of paths, such as q_proj; the last two, such as mlp.0, where the last one is a number."""
    pieces = [path.split(".") for path in paths]
    names = list(dict.fromkeys(".".join(piece[-2:] if piece[-1].isdigit() else piece[-1:]) for piece in pieces))
    return ", ".join(names[:MOST_NAMES]) + (", ..." if len(names) > MOST_NAMES else "")
