"""Initial weights of a training, from the adapter file of `adapter.init_from`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from dora_mm import backend as backends
from dora_mm import formats
from dora_mm.adapting.files import check_identity, files_in
from dora_mm.adapting.networks import TrainedNetworks, spec_of
from dora_mm.adapting.parts import MODEL
from dora_mm.config.adapter import AdapterConfig, PartConfig
from dora_mm.config.paths import resolve_path
from dora_mm.core import AdaptedLayer, DoRASpec, InjectReport, adapted_layers
from dora_mm.core.inject import inject_paths
from dora_mm.formats.adapter_file import AdapterFile
from dora_mm.formats.models import is_shared
from dora_mm.utils.shell import command_line

FROM_FILE = "init_from"  # in reports, the part of the modules that only the file adapts


def check_settings(file: Path, name: str, found: DoRASpec, wanted: DoRASpec, config: AdapterConfig) -> None:
    """Checks that a module of a file has the method and rank that a config trains it with; the values set otherwise.

    Raises:
        ValueError: It does not; the message names the keys of the `adapter` section.
    """
    if found.method == wanted.method and (found.rank == wanted.rank or found.method not in ("dora", "lora")):
        return
    changes = [f"adapter.method={found.method}"] if found.method != wanted.method else []
    if found.rank != wanted.rank:
        changes += [f"adapter.rank={found.rank}", f"adapter.alpha={found.alpha:g}"]
        changes += ["adapter.scaling=rank"] if config.scaling != "rank" else []
    raise ValueError(
        f"adapter.init_from: {file} has {found.method} of rank {found.rank} at {name}, and the config trains "
        f"{wanted.method} of rank {wanted.rank} there: --set {command_line(*changes)}"
    )


def load_initial_file(trained: TrainedNetworks, config: AdapterConfig, backend: str) -> None:
    """Loads `adapter.init_from`, one file of any tool for all networks.

    Its modules other than those that the config selects are adapted, too: files of other tools adapt modules for which
    there are no parts, such as `proj_in`, and have other ranks in some.

    Args:
        trained: What the config trains, freshly injected.
        config: The `adapter` section.
        backend: "auto", "torch" or "triton".

    Raises:
        ValueError: The file cannot be read, does not fit the networks, or its alpha differs from the config's; a module
            cannot be adapted, or its adapter has no low rank.
    """
    assert config.init_from is not None
    file = AdapterFile(resolve_path(config.init_from, "adapter.init_from"))
    if reason := file.why_not_trainable():
        raise ValueError(f"adapter.init_from: {reason}")
    for component, others in _adapt_others(file, trained.networks, config, backend).items():
        known = trained.reports.get(component, InjectReport(()))
        trained.reports[component] = InjectReport(known.modules + others.modules)
    adapters = trained.adapter_parameters()  # in the order of the networks, which gradient norms are summed in
    own = {name: parameter for name, parameter in trained.parameters.items() if name not in adapters}
    trained.parameters = {**own, **adapters}
    _load(trained.adapted, file, config)


def _adapt_others(
    file: AdapterFile, networks: Mapping[str, nn.Module], config: AdapterConfig, backend: str
) -> dict[str, InjectReport]:
    """Adapts the modules of a file that are not adapted yet, with the method, rank and alpha of the file.

    Returns:
        What was adapted here, by component.
    """
    state, _ = formats.read(file, networks)
    reports: dict[str, InjectReport] = {}
    for component, network in networks.items():
        modules, wanted = dict(network.named_modules()), {}
        for path, layer in state.layers.get(component, {}).items():
            if path in modules and not isinstance(modules[path], AdaptedLayer):  # loading refuses what is not there
                own = {key: getattr(layer.spec, key) for key in ("method", "rank", "alpha")}
                wanted[path] = FROM_FILE, spec_of(config, PartConfig(**own))
        if wanted:
            reports[component] = inject_paths(network, wanted, forward=backends.select(backend))
    return reports


def load_initial_folder(trained: TrainedNetworks, config: AdapterConfig, identity: Mapping[str, str]) -> None:
    """Loads `adapter.init_from`, a folder as `save_trained` writes it.

    Args:
        trained: What the config trains, freshly injected.
        config: The `adapter` section.
        identity: The weights of the loaded model, see `check_identity`.

    Raises:
        ValueError: The adapter was trained with another base model or vision tower, or holds parameters that this run
            would neither train nor save.
    """
    assert config.init_from is not None
    folder = formats.adapter_folder(resolve_path(config.init_from, "adapter.init_from"))
    files = files_in(folder)
    state, metadata = formats.read(files[MODEL], {MODEL: trained.networks[MODEL]})
    check_identity(folder, metadata, identity)
    network = trained.networks[MODEL]
    if tied := [name for name in sorted(state.untied.get(MODEL, ())) if is_shared(network, name)]:
        raise ValueError(
            f"adapter.init_from: {folder} trained {tied[0]} apart from what this model ties to it, and a training here "
            "would tie it again: merge the adapter into the model by dora-mm merge, and train on that"
        )
    untrained = sorted(name for name in state.parameters.get(MODEL, ()) if f"{MODEL}.{name}" not in trained.parameters)
    if untrained:
        raise ValueError(
            f"adapter.init_from: {folder} also trained {untrained[0]}, which adapter.extra_trainable does not include"
        )
    if different := sorted(set(files) ^ set(trained.networks)):
        raise ValueError(
            f"adapter.init_from: only one of {folder} and adapter.parts adapts the {different[0]} tower: either both "
            "or neither must do so"
        )
    for component, network in trained.networks.items():
        _load({component: network}, files[component], config)


def initial_identity(config: AdapterConfig, digest: Callable[[Path], str]) -> dict[str, str]:
    """A digest of `adapter.init_from`, by a description; empty without it.

    Args:
        config: The `adapter` section.
        digest: Gives that of an adapter at a path.
    """
    if config.init_from is None:
        return {}
    return {"the initial adapter": digest(resolve_path(config.init_from, "adapter.init_from"))}


def _load(adapted: Mapping[str, nn.Module], file: AdapterFile, config: AdapterConfig) -> None:
    """Loads an adapter file into freshly injected networks.

    Args:
        adapted: The adapted networks by component.
        file: The adapter file.
        config: The `adapter` section.

    Raises:
        ValueError: The file does not fit the networks, or its alpha differs from the config's.
    """
    before = _alphas(adapted)
    state, _ = formats.read(file, adapted)
    for component, network in adapted.items():
        layers = state.layers.get(component, {})
        for path, layer in adapted_layers(network).items():
            if path in layers:
                name = path if component == MODEL else f"{component}.{path}"
                check_settings(file.path, name, layers[path].spec, layer.adaptation.spec, config)
    formats.load(adapted, file, forward=backends.select("auto"))
    for path, alpha in _alphas(adapted).items():
        if not math.isclose(alpha, before[path], rel_tol=1e-6):  # files may hold it as float32
            raise ValueError(
                f"adapter.init_from: {file.path} has alpha {alpha:g} at {path}, and adapter.alpha and adapter.scaling "
                f"make {before[path]:g}"
            )


def _alphas(adapted: Mapping[str, nn.Module]) -> dict[str, float]:
    """The alpha of every adapted layer that has one, by component and path."""
    return {
        f"{component}.{path}": layer.adaptation.spec.alpha or 0.0
        for component, network in adapted.items()
        for path, layer in adapted_layers(network).items()
        if layer.adaptation.spec.method in ("dora", "lora")
    }
