"""The files of a pipeline of diffusers: which variant of the weights is loaded, and what of it the hub sends."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from dora_mm.config.models import ModelConfig
from dora_mm.formats.files.variants import choose_variant, of_variant, variant_of, variants_in
from dora_mm.models.hub import download, hub_answers, hub_files
from dora_mm.models.images.components import is_network
from dora_mm.models.opening import WEIGHTS, loaded_files, opening

log = logging.getLogger(__name__)
TEXTS = (".json", ".txt", ".jinja", ".model")  # of configs and tokenizers
Sizes = Mapping[str, Mapping[str, int]]  # of the files of each component, in bytes


class PipelineFiles:
    """The files of a pipeline in a folder, or in a repository of the hub and its copy on this machine.

    Args:
        path: The folder, or the hub name.
        folder: The folder, or the copy, which may hold configs alone.
        names: All components.
        config: The `model` section.
    """

    def __init__(self, path: str, folder: Path, names: Sequence[str], config: ModelConfig):
        self.path, self.folder, self.names, self.config = path, folder, names, config
        self._announced = False

    @cached_property
    def here(self) -> Sizes:
        """The files on this machine."""
        return {name: _sizes(self.folder / name) for name in self.names}

    @cached_property
    def on_hub(self) -> Sizes | None:
        """The files in the repository; None: it is a local folder, or the hub cannot be reached."""
        if Path(self.path).exists() or not hub_answers():
            return None
        with opening(self.path, f"{self.path} cannot be read", key="model.path", revision=self.config.revision):
            return by_component(hub_files(self.path, self.config.revision), self.names)

    @property
    def has_weights(self) -> bool:
        """Whether each network has weights on this machine."""
        return all(variants_in(self.here[name]) for name in self.names if is_network(name))

    @cached_property
    def variant(self) -> str:
        """The variant of the weights; empty: the one without a name.

        Raises:
            ValueError: There is none, or not the one of `model.variant`.
        """
        found = self.here if self.has_weights or self.on_hub is None else self.on_hub
        half = found is not self.here and self.config.dtype != "float32"
        return chosen_variant(self.path, found, self.config.variant, half=half)

    def weights(self, name: str) -> list[Path]:
        """The files with the weights of a component that are on this machine."""
        folder = self.folder / name
        found = loaded_files(folder, self.variant) if folder.is_dir() else []
        return [file for file in found if file.suffix in WEIGHTS]

    def fetch(self, names: Iterable[str]) -> str:
        """Downloads what components need and is not here; returns what to load them from."""
        if self.on_hub is None:
            return str(self.folder)
        wanted = wanted_files(self.on_hub, self.names, self.variant)
        missing = {file: size for file, size in wanted.items() if not (self.folder / file).exists()}
        if missing and not self._announced:
            log.info("%s", download_line(self.path, missing))
        self._announced = True
        patterns = [file for file in wanted if file.partition("/")[0] in set(names)]
        with opening(self.path, f"{self.path} cannot be loaded", key="model.path", revision=self.config.revision):
            return str(download(self.path, self.config.revision, patterns))


def by_component(files: Mapping[str, int], names: Sequence[str]) -> Sizes:
    """The files of a repository by component, with their sizes."""
    found: dict[str, dict[str, int]] = {name: {} for name in names}
    for path, size in files.items():
        component, _, name = path.partition("/")
        if component in found and "/" not in name:
            found[component][name] = size
    return found


def chosen_variant(path: str, files: Sizes, given: str | None, *, half: bool) -> str:
    """The variant of the weights of a pipeline.

    Args:
        path: The pipeline, for messages.
        files: Its files.
        given: `model.variant`.
        half: Whether one in half precision is preferred.

    Raises:
        ValueError: There is no such variant, or none that all networks have.
    """
    known = set().union(*map(variants_in, files.values()))
    if given is not None and given not in known:
        others = ", ".join(sorted(known - {""})) or "no variants"
        raise ValueError(f"model.variant: {path} has no weights of the variant {given}: it has {others}")
    try:
        return given or choose_variant(files.values(), half=half)
    except ValueError as error:
        raise ValueError(f"model.path: {path} cannot be loaded: {error}") from None


def wanted_files(files: Sizes, names: Iterable[str], variant: str) -> dict[str, int]:
    """The files of components that are loaded, with their sizes: of weights, safetensors of one variant."""
    chosen = {name: of_variant(files[name], variant) for name in names}
    return {
        f"{name}/{file}": files[name][file]
        for name, found in chosen.items()
        for file in found
        if variant_of(file) is not None or Path(file).suffix in TEXTS
    }


def download_line(path: str, files: Mapping[str, int]) -> str:
    """A line on what is downloaded, and its size."""
    named = {variant_of(file.rpartition("/")[2]) or "" for file in files} - {""}
    of = f" (its {', '.join(sorted(named))} weights)" if named else ""
    return f"{path}{of} is not on this machine: {sum(files.values()) / 1e9:.1f} GB are downloaded."


def _sizes(folder: Path) -> dict[str, int]:
    files = folder.iterdir() if folder.is_dir() else ()
    return {file.name: file.stat().st_size for file in files if file.is_file()}
