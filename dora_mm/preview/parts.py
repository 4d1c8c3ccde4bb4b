"""A table of what a config trains of a model, part by part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from dora_mm.adapting.initial import FROM_FILE
from dora_mm.adapting.networks import TrainedNetworks, extra_names, parameters_by_name
from dora_mm.adapting.parts import full_name, select_modules
from dora_mm.config.adapter import EXTRA_WEIGHT_MODULES, AdapterConfig, PartConfig
from dora_mm.config.training import OptimizerConfig
from dora_mm.core import TargetMap
from dora_mm.core.targets import match_modules, parts_in
from dora_mm.targets.derived import NAME, about_experts, about_left_out
from dora_mm.utils.tables import aligned_columns

HEADING = ("part", "modules", "method", "rank", "alpha", "lr", "count", "parameters")
MOST_NAMES = 7  # of modules of a part that are listed
LONGEST_PATTERN = 40  # characters; a longer one is shown by the parts that it takes modules of


def parts_table(
    trained: TrainedNetworks,
    networks: Mapping[str, nn.Module],
    target_maps: Mapping[str, TargetMap],
    adapter: AdapterConfig,
    optimizer: OptimizerConfig,
) -> str:
    """A text table of every part of a model: how it is trained, its modules and trained parameters; frozen ones last.

    Args:
        trained: What the config trains; of a model without weights, too.
        networks: The networks of the model.
        target_maps: The target maps of those that can be adapted.
        adapter: The `adapter` section.
        optimizer: The `optimizer` section, for the learning rates.
    """
    selection = select_modules(adapter, networks, target_maps)
    rows, frozen, counted = [], [], set()
    for component, targets in target_maps.items():
        report = trained.reports.get(component)
        of_file = [module.path for module in report.modules if module.part == FROM_FILE] if report else []
        taken = set(of_file)
        for name, (chosen, paths) in selection.get(component, {}).items():
            names = _trained_in(trained, component, paths, full=chosen.method == "full")
            shown = (
                full_name(component, name)
                if name in targets.parts
                else _pattern_title(name, networks[component], targets, paths)
            )
            rows.append((shown, leaves(paths), *_settings(chosen, adapter, optimizer), *_counts(paths, names)))
            counted |= names.keys()
            taken |= set(paths)
        for part in parts_in(networks[component], targets):
            found = match_modules(networks[component], targets.select([part]))
            if paths := [path for path in found if path not in taken]:
                frozen.append((full_name(component, part), leaves(paths), "frozen", "", "", "", f"{len(paths):,}", ""))
        if of_file:
            names = _trained_in(trained, component, of_file, full=False)
            about = ("as in the file", "", "", _rate(optimizer.lr))
            rows.append((full_name(component, FROM_FILE), leaves(of_file), *about, *_counts(of_file, names)))
    if adapter.method in EXTRA_WEIGHT_MODULES:
        added = dict.fromkeys(name.rsplit(".", 2)[0] for name in trained.parameters)  # without down.weight, for example
        hosts, _, names = zip(*(path.rpartition(".") for path in added), strict=True)
        about = (adapter.method, f"{adapter.rank}", "", _rate(optimizer.lr))
        rows.append((names[0], leaves(hosts), *about, *_counts(added, trained.parameters)))
    for name, parameters in _extra_groups(trained, extra_names(adapter), counted).items():
        rows.append((f"extra: {name}", "", "full", "", "", _rate(optimizer.lr), *_counts(parameters, parameters)))
    rows.append(("all", "", "", "", "", "", "", f"{trained.num_trained:,}"))
    return aligned_columns([HEADING, *rows, *frozen], num_text=3)


def about_untouched(
    trained: TrainedNetworks, networks: Mapping[str, nn.Module], target_maps: Mapping[str, TargetMap]
) -> list[str]:
    """Lines on what stays as it is: what parts that follow from a network's structure leave out, and experts."""
    lines = [
        f"parts derived from the model's structure; {about_left_out(network, match_modules(network, targets))}"
        for name, network in networks.items()
        if (targets := target_maps.get(name)) and targets.name == NAME
    ]
    experts = (about_experts(network, trained.parameters.values()) for network in networks.values())
    return [*lines, *filter(None, experts)]


def _pattern_title(pattern: str, network: nn.Module, targets: TargetMap, paths: Sequence[str]) -> str:
    """A pattern of the config as the table has it; of a long one the parts that its modules are in."""
    if len(pattern) <= LONGEST_PATTERN:
        return pattern
    parts = [
        part
        for part in parts_in(network, targets)
        if not match_modules(network, targets.select([part])).keys().isdisjoint(paths)
    ]
    return f"pattern in {', '.join(parts)}" if parts else f"{pattern[:LONGEST_PATTERN]}..."


def _trained_in(
    trained: TrainedNetworks, component: str, paths: Iterable[str], *, full: bool
) -> dict[str, nn.Parameter]:
    """The trained parameters of modules: of their adapters, or (`full`) the modules' own."""
    known, found = set(trained.extra.get(component, ())), {}
    for path in paths:
        for name, parameter in trained.networks[component].get_submodule(path).named_parameters():
            key = f"{component}.{path}.{name}"
            if key in trained.parameters and (full or f"{path}.{name}" not in known):
                found[key] = parameter
    return found


def _extra_groups(
    trained: TrainedNetworks, groups: Sequence[str], counted: set[str]
) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters of `adapter.extra_trainable` by its entries, each in the first that has it."""
    found, counted = {}, set(counted)
    main, network = next(iter(trained.networks.items()))
    for group in groups:
        names = parameters_by_name(network, [group])
        found[group] = {key: p for name, p in names.items() if (key := f"{main}.{name}") not in counted}
        counted |= found[group].keys()
    return found


def _counts(items: Iterable[object], parameters: Mapping[str, nn.Parameter]) -> tuple[str, str]:
    return f"{len(list(items)):,}", f"{sum(parameter.numel() for parameter in parameters.values()):,}"


def _settings(part: PartConfig, adapter: AdapterConfig, optimizer: OptimizerConfig) -> tuple[str, str, str, str]:
    """Method, rank, alpha and learning rate of a part; with scaling sqrt alpha is that of the config, times a root."""
    if part.method not in ("dora", "lora"):
        return str(part.method), "", "", _rate(part.lr or optimizer.lr)
    assert part.rank
    assert part.alpha
    alpha = f"{part.alpha:g}"
    if adapter.scaling == "sqrt":  # layers and files divide by the rank, and this by its root
        alpha = f"{part.alpha / part.rank**0.5:g} x sqrt({part.rank})"
    return str(part.method), f"{part.rank}", alpha, _rate(part.lr or optimizer.lr)


def _rate(value: float) -> str:
    return f"{value:.4g}"


def leaves(paths: Sequence[str]) -> str:
    """The distinct last names of paths, such as q_proj; the last two, such as mlp.0, where the last one is a number."""
    pieces = [path.split(".") for path in paths]
    names = list(dict.fromkeys(".".join(piece[-2:] if piece[-1].isdigit() else piece[-1:]) for piece in pieces))
    return ", ".join(names[:MOST_NAMES]) + (", ..." if len(names) > MOST_NAMES else "")
