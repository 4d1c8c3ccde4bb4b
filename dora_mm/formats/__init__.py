"""Adapter files: one module per format, one line here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from dora_mm.core.fused import TORCH, Forward
from dora_mm.core.inject import InjectReport
from dora_mm.formats import diffusers, full, peft
from dora_mm.formats.state import AdapterState, from_models, into_models

FORMATS = {"diffusers": diffusers, "peft": peft, "full": full}


def save(
    components: Mapping[str, nn.Module],
    folder: Path,
    *,
    format: str,
    metadata: Mapping[str, str],
    extra_parameters: Sequence[str] = (),
    strength: float = 1.0,
) -> Path:
    """Writes the adapters of these models, and the `extra_parameters` that were trained with them; returns the file.

    strength: of the adapters as they are, which is strength 1 of the file.
    """
    if format not in FORMATS:
        raise ValueError(f"there is no adapter format {format!r}: use {' or '.join(FORMATS)}")
    return FORMATS[format].save(from_models(components, extra_parameters, strength), components, folder, metadata)


def read(path: Path, components: Mapping[str, nn.Module] | None = None) -> tuple[AdapterState, dict[str, str]]:
    """(adapters, header metadata) of a file, or of the one adapter file in a folder."""
    file = find_file(path)
    module = next((module for module in FORMATS.values() if file.name == module.FILE_NAME), diffusers)
    return module.read(file, components)


def load(
    components: Mapping[str, nn.Module],
    path: Path,
    *,
    strength: float = 1.0,
    name: str = "default",
    forward: Forward = TORCH,
) -> InjectReport:
    """Loads the adapters of a file or folder into these models; a name of its own stacks it upon others.

    Parameters that the file holds beside them replace the model's, for good: see `into_models`.
    """
    state, _ = read(path, components)
    return into_models(state, components, find_file(path), strength=strength, name=name, forward=forward)


def find_file(path: Path) -> Path:
    """The adapter file that `path` is, or that lies in the folder `path`."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"there is no adapter file {path}")
    found = [path / module.FILE_NAME for module in FORMATS.values() if (path / module.FILE_NAME).is_file()]
    if len(found) != 1:
        names = " or ".join(module.FILE_NAME for module in FORMATS.values())
        raise ValueError(f"the folder {path} holds {len(found) or 'no'} adapter files ({names}): name one")
    return found[0]


def adapter_folder(path: Path) -> Path:
    """The folder of an adapter that is given as a run directory, a folder or a file."""
    if path.is_file():
        return path.parent
    return path / "adapter" if (path / "adapter").is_dir() else path
