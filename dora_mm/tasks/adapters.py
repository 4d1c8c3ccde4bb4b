"""Translates the `adapter` section of a training config into calls of the library."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

import dora_mm
from dora_mm import backend as backends
from dora_mm import formats
from dora_mm.config.adapter import AnyAdapterConfig
from dora_mm.core import AdaptedLayer, DoRASpec, InjectReport, adapted_layers
from dora_mm.core.inject import inject_paths
from dora_mm.formats.adapter_file import AdapterFile
from dora_mm.formats.tools.comfy import other_half


def make_spec(config: AnyAdapterConfig) -> DoRASpec:
    """The DoRASpec of a config's `adapter` section."""
    return DoRASpec(config.rank, config.alpha, config.dropout, config.method, config.norm_grad, config.cache)


def adapter_parameters(adapted: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The trained parameters of adapted networks, by component and name."""
    return {
        f"{component}.{name}": parameter
        for component, network in adapted.items()
        for name, parameter in dora_mm.adapter_parameters(network).items()
    }


def one_line(name: str, report: InjectReport) -> str:
    """One line about the adapted modules of a network; `print(report)` shows the complete table."""
    parts = Counter(module.part for module in report.modules)
    counts = ", ".join(f"{part} {count}" for part, count in parts.items())
    return f"{name}: {report.num_modules} modules adapted ({counts}), {report.num_parameters:,} parameters"


def adapt_others(
    file: Path, networks: Mapping[str, nn.Module], spec: DoRASpec, backend: str
) -> dict[str, InjectReport]:
    """Adapts the modules that the file of `adapter.init_from` has beside those that the config selects.

    Files of other tools adapt modules for which there are no parts, such as `proj_in`, and have other ranks in some.

    Args:
        file: The adapter file or its folder.
        networks: The networks by component name, adapted as the config says.
        spec: The config's; method, rank and alpha are those of each module in the file.
        backend: The config's.

    Returns:
        What was adapted here, by component.

    Raises:
        ValueError: The file cannot be read, a module cannot be adapted, or its adapter has no low rank.
    """
    check_low_rank(formats.find_file(file))
    state, _ = formats.read(file, networks)
    reports: dict[str, InjectReport] = {}
    for component, network in networks.items():
        modules, wanted = dict(network.named_modules()), {}
        for path, layer in state.layers.get(component, {}).items():
            if path in modules and not isinstance(modules[path], AdaptedLayer):  # loading refuses what is not there
                own = layer.spec
                wanted[path] = "init_from", replace(spec, method=own.method, rank=own.rank, alpha=own.alpha)
        reports[component] = inject_paths(network, wanted, forward=backends.select(backend))
    return reports


def check_low_rank(file: Path) -> None:
    """Checks that a file can be trained on.

    Raises:
        ValueError: It holds differences of weights, or magnitudes of input columns, which load as LoRA of full rank; or
            it is one of two files.
    """
    adapter = AdapterFile(file)
    if half := other_half(adapter.header):
        raise ValueError(f"adapter.init_from: {file}: {half}")
    for module, endings in adapter.modules.items():
        if "diff" in endings or adapter.axis(module) == "in":
            raise ValueError(
                f"adapter.init_from: {file} has no low rank at {module}, and can be drawn with but not trained on: fit "
                "it with dora-mm convert --to diffusers --rank R --allow-lossy, or extract"
            )


def load_initial_adapter(file: Path, adapted: Mapping[str, nn.Module]) -> None:
    """Loads the adapter file of `adapter.init_from` into freshly injected networks.

    Args:
        file: The adapter file or its folder.
        adapted: The adapted networks by component name.

    Raises:
        ValueError: The file does not fit the networks, or its alpha differs from the config's.
    """
    before = _alphas(adapted)
    dora_mm.load_adapter(adapted, file)
    for path, alpha in _alphas(adapted).items():
        if alpha != before[path]:
            raise ValueError(
                f"adapter.init_from: {file} has alpha {alpha:g}, and adapter.alpha is {before[path]:g} ({path})"
            )


def _alphas(adapted: Mapping[str, nn.Module]) -> dict[str, float]:
    """The alpha of every adapted layer that has one, by component and path."""
    return {
        f"{component}.{path}": layer.adaptation.spec.alpha or 0.0
        for component, network in adapted.items()
        for path, layer in adapted_layers(network).items()
        if layer.adaptation.spec.method in ("dora", "lora")
    }
