"""Adapter files: one module per format.

To add a format, write a module in this folder that has what `Format` lists, and add it to `FORMATS`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import distributed, nn

from dora_mm.core.forms import TORCH, Forward
from dora_mm.core.inject import InjectReport
from dora_mm.core.sharded import is_sharded
from dora_mm.core.strength import Strength
from dora_mm.formats import card, diffusers, native, peft
from dora_mm.formats.checks import first_not_finite
from dora_mm.formats.components import components_to_load, components_to_save
from dora_mm.formats.state import AdapterState, check_kinds, from_models, into_models, joined
from dora_mm.formats.tensor_file import PICKLES, TensorFile, pickle_error
from dora_mm.formats.tools.comfy import other_half

log = logging.getLogger(__name__)


class Format(Protocol):
    """What a module has to define to be a format."""

    @property
    def FILE_NAME(self) -> str:
        """The name of the weights file, different for every format: files are recognised by it."""
        ...

    @property
    def COMPONENTS(self) -> tuple[str, ...]:
        """The components that the format knows; empty where it takes any name."""
        ...

    @staticmethod
    def why_not(components: Mapping[str, nn.Module]) -> str | None:
        """Why the format cannot hold the adapters of these models, as an error message with the way out, or None."""
        ...

    @staticmethod
    def save(
        state: AdapterState, components: Mapping[str, nn.Module], folder: Path, metadata: Mapping[str, str]
    ) -> Path:
        """Writes an adapter to `folder`/FILE_NAME, atomically.

        Args:
            state: The adapter, of models for which `why_not` returns None.
            components: The adapted models by component, such as {"unet": ...}, for the shapes and types of layers.
            folder: The folder to write to; it is created where it does not exist.
            metadata: Additional entries for the header of the file.

        Returns:
            The path of the file.

        Raises:
            ValueError: The format cannot hold the adapter; nothing is written then.
        """
        ...

    @staticmethod
    def read(path: Path, components: Mapping[str, nn.Module] | None = None) -> tuple[AdapterState, dict[str, str]]:
        """Reads an adapter.

        Args:
            path: The file; any name is accepted.
            components: The models, adapted or not, that the adapter will be loaded into; the component and module names
                of the result are theirs. None keeps the names of the file.

        Returns:
            The adapter, and the metadata of the file's header.

        Raises:
            ValueError: The file is damaged or incomplete, or in another format.
        """
        ...


FORMATS: dict[str, Format] = {"diffusers": diffusers, "peft": peft, "native": native}


def format_for(components: Mapping[str, nn.Module], preferred: str) -> str:
    """The preferred format where it can hold the adapters of these models, or else our own, which holds all."""
    return "native" if FORMATS[preferred].why_not(components) else preferred


def save(
    model: nn.Module | Mapping[str, nn.Module],
    folder: Path,
    *,
    format: str,
    metadata: Mapping[str, str],
    extra_parameters: Sequence[str] = (),
    strength: float = 1.0,
) -> Path:
    """Saves the adapters of models, with a model card.

    Where FSDP2 has sharded them, every process has to call this, and one writes.

    Args:
        model: The adapted model, or several by component, such as {"unet": ..., "text_encoder": ...}.
        folder: The folder to write to; it is created where it does not exist.
        format: A key of `FORMATS`.
        metadata: Additional entries for the header of the file.
        extra_parameters: Names of parameters that were trained in addition to the adapters of a single model.
        strength: The strength of the adapters that becomes strength 1 in the file.

    Returns:
        The path of the weights file.

    Raises:
        ValueError: There is no such format, the component of a single model is unknown, no layer is adapted, a layer
            has several adapters, a value is NaN or infinite, or the format cannot hold what was trained. Nothing
            is written then.
    """
    if format not in FORMATS:
        raise ValueError(f"there is no adapter format {format!r}: use {', '.join(FORMATS)}")
    chosen = FORMATS[format]
    components = components_to_save(model, chosen.COMPONENTS, format)
    state = from_models(components, extra_parameters, strength)
    if problem := chosen.why_not(components):
        raise ValueError(problem)
    if name := first_not_finite(state.tensors()):
        raise ValueError(f"{name} has values that are NaN or infinite, so the adapter was not saved")
    sharded = any(is_sharded(parameter) for m in components.values() for parameter in m.parameters())
    try:
        if not sharded or distributed.get_rank() == 0:
            chosen.save(state, components, folder, metadata)
            card.write_card(folder, format, state, metadata)
    finally:
        if sharded:
            distributed.barrier()  # the others may read the file next, and must not wait forever after an error
    return folder / chosen.FILE_NAME


def write_card(folder: Path, *, pictures: card.Pictures = (), scores: card.Scores | None = None) -> None:
    """Writes the model card of a saved adapter again, with pictures and scores: see `card.write_card`.

    Args:
        folder: The folder of the adapter.
        pictures: Prompts, each with the path of a picture in the folder.
        scores: The name of the metric and its value, by task.

    Raises:
        ValueError: The folder holds no adapter.
    """
    file = find_file(folder)
    format = next(name for name, module in FORMATS.items() if file.name == module.FILE_NAME)
    state, metadata = read(file)
    card.write_card(folder, format, state, metadata, pictures, scores)


def remove_other_formats(file: Path) -> None:
    """Removes the adapter files of other formats beside this one, so that the folder holds a single adapter."""
    for other in FORMATS.values():
        if file.name != other.FILE_NAME:
            file.with_name(other.FILE_NAME).unlink(missing_ok=True)


def read(path: Path, components: Mapping[str, nn.Module] | None = None) -> tuple[AdapterState, dict[str, str]]:
    """Reads an adapter without loading it into a model.

    Args:
        path: The adapter file, or a folder that contains exactly one. A file whose name belongs to no format is one of
            diffusers or of another tool, as its keys say.
        components: The models by component that the adapter is for; component and module names of the result are
            theirs. None keeps the names of the file.

    Returns:
        The adapter, and the metadata of the file's header.

    Raises:
        ValueError: There is no such file, or it is damaged, incomplete or not an adapter. The values of the tensors are
            not looked at: `state.check_finite` does that.
    """
    from dora_mm.formats.layers import read_state  # it imports this module

    file = find_file(path)
    module = next((module for module in FORMATS.values() if file.name == module.FILE_NAME), None)
    if module is None and any(map(diffusers.is_key, TensorFile(file).entries)):
        module = diffusers
    state, metadata = module.read(file, components) if module else read_state(file, components)
    check_kinds(state, file)
    return state, metadata


def load(
    model: nn.Module | Mapping[str, nn.Module],
    path: Path,
    *,
    strength: Strength = 1.0,
    name: str = "default",
    forward: Forward = TORCH,
) -> InjectReport:
    """Loads the adapters of a file into models.

    Extra parameters in the file overwrite those of the model permanently: see `into_models`.

    Args:
        model: The model, or several by component, such as {"unet": ...}; they are adapted where they are not yet.
        path: The adapter file, or a folder that contains exactly one.
        strength: The strength of the adapters, or of their parts: see `core.strength.strengths_of`. The names of parts
            begin with the component; with a single model they need not.
        name: The name of the adapter; another name than that of a loaded adapter stacks this one on top of it.
        forward: The function that runs the adapted layers.

    Returns:
        The layers that the file adapts.

    Raises:
        ValueError: There is no such file, it is damaged, or it does not fit the models, which are then unchanged.
    """
    file = find_file(path)
    components = components_to_load(model, file, peft.PREFIX.partition(".")[0])
    state, header = read(file, components)
    if half := other_half(header):
        log.warning("%s: %s.", file, half)
    if isinstance(strength, Mapping) and not isinstance(model, Mapping):
        strength = {_with_component(name, next(iter(components))): value for name, value in strength.items()}
    return into_models(state, components, file, strength=strength, name=name, forward=forward)


def _with_component(name: str, component: str) -> str:
    return name if name.split(".")[0] == component else joined(component, name)


def find_file(path: Path) -> Path:
    """Finds the adapter file.

    Args:
        path: The file itself, the folder that contains it, or a run directory, in which that is the folder `adapter`.

    Raises:
        ValueError: `path` does not exist, or is a folder with no adapter file or with several.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"there is no adapter at {path}: give an adapter file or its folder")
    path = adapter_folder(path)
    found = [path / module.FILE_NAME for module in FORMATS.values() if (path / module.FILE_NAME).is_file()]
    if len(found) != 1:
        names = " or ".join(module.FILE_NAME for module in FORMATS.values())
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
        if pickles and not found:
            raise pickle_error(path / pickles[0])
        raise ValueError(
            f"the folder {path} contains {len(found) or 'no'} adapter files ({names}): give the path of one"
        )
    return found[0]


def adapter_folder(path: Path) -> Path:
    """The folder of an adapter that is given by its run directory, its folder or its file."""
    if path.is_file():
        return path.parent
    return path / "adapter" if (path / "adapter").is_dir() else path
