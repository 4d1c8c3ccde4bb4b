"""The components of an image model of diffusers, each loaded when it is asked for, and what its files say of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn

from dora_mm.config.paths import CONFIG, INDEX
from dora_mm.config.streaming import Amount
from dora_mm.core import TargetMap
from dora_mm.core.wrappers.streaming import stream
from dora_mm.formats.files.model_folder import ModelFolder
from dora_mm.formats.files.variants import choose_variant
from dora_mm.models.hub import local_copy
from dora_mm.models.opening import opened_folder, opening
from dora_mm.models.streaming import blocks_to_stream
from dora_mm.utils.digest import module_digest, weights_digest

META = torch.device("meta")
LIBRARIES = ("diffusers", "transformers")


class StreamedNetwork(NamedTuple):
    """A network of which some blocks wait in main memory.

    Attributes:
        amount: How much of it.
        targets: Its target map; None: it has none.
    """

    amount: Amount
    targets: TargetMap | None


class Components:
    """The components of a model, named as in diffusers; networks are frozen, and in eval mode.

    Args:
        load: Loads components by their names; it may return more than it is asked for.
        phases: The names of all components, in the groups in which they are loaded: a group is loaded when one of it is
            first asked for.
        files: The model's own index and configs; None: configs are those of what is loaded.
        weights: The files with the weights of a component, by its name; None: they are not known.
        loaded_as: Dtype and quantisation of what is loaded, by its name; digests depend on it.

    Attributes:
        device: The device that networks are moved to when they are loaded.
        streamed: The networks of which some blocks wait in main memory, from when they are moved; set it before that.
    """

    def __init__(
        self,
        load: Callable[[Sequence[str]], Mapping[str, Any]],
        phases: Sequence[Sequence[str]],
        files: ModelFolder | None = None,
        weights: Callable[[str], Sequence[Path]] | None = None,
        loaded_as: Callable[[str], str] = lambda name: "",
    ):
        self._load, self._phases, self._files = load, phases, files
        self._weights, self._loaded_as = weights, loaded_as
        self._loaded: dict[str, Any] = {}
        self._replaced: set[str] = set()
        self._released: set[str] = set()
        self.device = torch.device("cpu")
        self._unmoved: frozenset[str] = frozenset()
        self.streamed: Mapping[str, StreamedNetwork] = {}

    @classmethod
    def of(cls, **components: Any) -> Components:
        """Components that are in memory already, as they are."""
        found = cls(lambda names: components, [tuple(components)])
        found._loaded = components
        return found

    @property
    def names(self) -> list[str]:
        """The names of all components, loaded or not."""
        return [name for phase in self._phases for name in phase]

    @property
    def networks(self) -> list[str]:
        """The names of those that have weights, loaded or not."""
        return [name for name in self.names if is_network(name)]

    def __getitem__(self, name: str) -> Any:
        """A component, or None if it was released."""
        if name not in self._loaded and not self.is_released(name):
            (group,) = (phase for phase in self._phases if name in phase)
            missing = [each for each in group if each not in self._loaded and not self.is_released(each)]
            for each, component in self._load(missing).items():
                if each not in self._loaded and not self.is_released(each):
                    self._loaded[each] = self._ready(each, component)
        return self._loaded.get(name)

    def __setitem__(self, name: str, component: Any) -> None:
        self._loaded[name] = component
        self._replaced.add(name)

    def digest(self, name: str) -> str:
        """Digest of the weights of a network, as it is loaded; nothing is loaded if its files are local."""
        if self.device == META:
            return self._loaded_as(name)
        if self._weights is None or name in self._replaced:
            return module_digest(self[name])
        files = self._weights(name) or (self[name] and self._weights(name))  # of a hub model, loading brings them
        return f"{weights_digest(files)} {self._loaded_as(name)}"

    def config(self, name: str) -> Mapping[str, Any]:
        """The config of the model's own component, without loading it where the model's files have configs."""
        return self[name].config if self._files is None else self._files.config(name)

    def empty(self, name: str) -> Any:
        """A network without its weights, on the meta device, where the model's files have configs; else itself."""
        return self[name] if self._files is None else empty_network(self._files, name)

    @property
    def index(self) -> Mapping[str, Any]:
        """The content of the model's model_index.json; empty where there is none."""
        return (self._files and self._files.index) or {}

    def release(self, names: Iterable[str]) -> None:
        """Frees components, for good."""
        for name in names:
            self._released.add(name)
            self._loaded.pop(name, None)

    def device_of(self, name: str) -> torch.device:
        """The device that a network is moved to when it is loaded."""
        return torch.device("cpu") if name in self._unmoved else self.device

    def is_released(self, name: str) -> bool:
        return name in self._released

    def to(self, device: torch.device | str, but: Iterable[str] = ()) -> None:
        """Moves all networks to a device, also those that are loaded later, but for some that stay where they are."""
        self.device, self._unmoved = torch.device(device), frozenset(but)
        for name, component in self._loaded.items():
            if isinstance(component, nn.Module) and name not in self._unmoved:
                self._move(name, component)

    def _ready(self, name: str, component: Any) -> Any:
        if not isinstance(component, nn.Module):
            return component
        component.requires_grad_(False).eval()
        self._move(name, component)
        return component

    def _move(self, name: str, network: nn.Module) -> None:
        device, streamed = self.device_of(name), self.streamed.get(name)
        if streamed is not None:
            stream(blocks_to_stream(network, streamed.targets, streamed.amount, device), device)
        network.to(device)


def is_network(name: str) -> bool:
    """Whether a component of a pipeline has weights: schedulers, processors and tokenizers have none."""
    return name not in ("scheduler", "processor") and not name.startswith("tokenizer")


def class_of(files: ModelFolder, name: str) -> Any:
    """The class of a component, that the index of its pipeline names.

    A library that an index names is imported only if diffusers or transformers is meant: an import runs code.

    Raises:
        ValueError: It is none of a network in diffusers, transformers, or what the process has imported.
    """
    library, named_class = (files.index or {})[name]
    module = import_module(library) if library in LIBRARIES else sys.modules.get(library)
    module = module or getattr(import_module("diffusers.pipelines"), library, None)
    found = getattr(module, named_class, None)
    if isinstance(found, type) and issubclass(found, nn.Module):
        return found
    raise ValueError(
        f"model.path: the {INDEX} of {files.path} names {library}.{named_class} as its {name}, which is no network of "
        f"{' or '.join(LIBRARIES)}"
    )


def empty_network(
    files: ModelFolder, name: str = "", dtype: torch.dtype = torch.float32, kind: Any = None
) -> nn.Module:
    """Builds a network from its config alone, on the meta device.

    Args:
        files: The folder of a pipeline, or of the only network.
        name: The component.
        dtype: Of its weights.
        kind: Its class; None: the one that the index of the pipeline names.

    Raises:
        ValueError: The config does not fit the class.
    """
    kind = kind or class_of(files, name)
    config: Any = dict(files.config(name))
    with opening(str(files.path), f"the {kind.__name__} of {files.path} cannot be built", loads=False), META:
        is_of_diffusers = hasattr(kind, "from_config")
        network = kind.from_config(config) if is_of_diffusers else kind(kind.config_class.from_dict(config))
    nn.Module.to(network, dtype)  # diffusers' own `to` warns of what to keep in float32
    for path, module in network.named_modules():
        if keeps_float32(kind, path):
            nn.Module.to(module, torch.float32)
    return network


def keeps_float32(kind: Any, path: str) -> bool:
    """Whether a class of diffusers loads the weights below a path in float32, whatever the dtype of the others."""
    kept = getattr(kind, "_keep_in_fp32_modules", None) if hasattr(kind, "from_config") else None
    return not set(kept or ()).isdisjoint(path.split("."))


def pipeline_class_of(path: str, revision: str | None) -> str:
    """The class of diffusers that the index of a pipeline names.

    Args:
        path: A folder, or a hub name.
        revision: A commit, branch or tag of a hub model; None: its main branch.

    Raises:
        ValueError: There is no index, it is damaged, or the hub cannot be reached.
    """
    folder = opened_folder(path, revision, key="model.path")
    if folder.index is None:
        found = sorted(each.name for each in folder.path.iterdir() if folder.has_config(each.name))
        inside = f"has {', '.join(found)}, but no {INDEX}" if found else f"has no {INDEX}"
        raise ValueError(f"model.path: {path} is not an image model of diffusers: it {inside}.")
    name = folder.index.get("_class_name")
    if not isinstance(name, str):
        raise ValueError(f"model.path: the {INDEX} of {path} is damaged: it names no class.")
    return name


def tensor_names(file: Path) -> list[str]:
    """The names of the tensors in a single checkpoint.

    Raises:
        ValueError: It is not a file of safetensors.
    """
    if file.suffix != ".safetensors":
        raise ValueError(f"model.path: {file} does not end in .safetensors: convert it first.")
    with _opening(str(file)), safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def missing_in(folder: Path, components: Iterable[str]) -> list[str]:
    """The components of a pipeline that a folder lacks."""
    return [name for name in components if not (folder / name).is_dir() or not any((folder / name).iterdir())]


def load_single_file(
    pipeline: Any, path: str, dtype: torch.dtype, configs: Path, others: Mapping[str, Any]
) -> dict[str, Any]:
    """Loads components of a pipeline of diffusers, most of them from a single checkpoint.

    Args:
        pipeline: The class of diffusers.
        path: The `.safetensors` file.
        dtype: The dtype of all networks.
        configs: A folder with the index and the configs of the pipeline.
        others: The components that are not in the file, and None for those that are not wanted.

    Raises:
        ValueError: It lacks something, or is of another size than the configs.
    """
    with _opening(path):
        loaded = pipeline.from_single_file(path, config=str(configs), dtype=dtype, local_files_only=True, **others)
    return {name: component for name, component in loaded.components.items() if component is not None}


def load_components(
    pipeline: Any,
    path: str,
    names: Sequence[str],
    every: Iterable[str],
    dtype: torch.dtype,
    variant: str = "",
) -> dict[str, Any]:
    """Loads components of a pipeline of diffusers.

    Args:
        pipeline: The class of diffusers.
        path: A folder.
        names: The components.
        every: All components of the pipeline.
        dtype: The dtype of all networks.
        variant: The variant of the weights, for networks that have it; empty: the one without a name.

    Raises:
        ValueError: One is missing or cannot be loaded.
    """
    others: dict[str, Any] = {name: None for name in every if name not in names}
    with _opening(path):
        settings: dict[str, Any] = {"variant": variant or None, "use_safetensors": True, **others}
        loaded = pipeline.from_pretrained(path, dtype=dtype, **settings)
    return {name: getattr(loaded, name) for name in names}


def load_vae(kind: Any, path: str | Path, dtype: torch.dtype = torch.float32, *, empty: bool = False) -> Any:
    """Loads a VAE, frozen and in eval mode.

    Args:
        kind: Its class of diffusers.
        path: A folder or a hub name.
        dtype: Of its weights.
        empty: It is built from its config, on the meta device.

    Raises:
        ValueError: There is none, or it cannot be loaded.
    """
    if empty:
        files = opened_folder(str(path), key="model.vae")
        if not files.has_config():
            raise ValueError(f"model.vae: {path} cannot be loaded: it has no {CONFIG}")
        return empty_network(files, dtype=dtype, kind=kind).requires_grad_(False).eval()
    with _opening(str(path), "model.vae"):
        copy = local_copy(str(path))
        variant = choose_variant([os.listdir(copy)]) if copy else ""
        vae = kind.from_pretrained(str(path), dtype=dtype, use_safetensors=True, variant=variant or None)
    return vae.requires_grad_(False).eval()


def _opening(name: str, key: str = "model.path") -> AbstractContextManager[None]:
    return opening(name, f"{name} cannot be loaded", key=key)
