"""Adapters that were trained before: to go on from, and to be used."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

import dora_mm
from dora_mm import io
from dora_mm.core import DoRASpec, adapted_layers

TOWER = "vision"  # the folder of the tower's adapter, in that of the model's
IDENTITIES = {"base_digest": "model.path: another base model", "eyes_digest": "vision: another tower or features"}


def go_on_from(file: Path, adapted: Mapping[str, nn.Module], spec: DoRASpec) -> None:
    """Loads `adapter.init_from` into freshly adapted networks; ValueError where its alpha is not the config's."""
    dora_mm.load_adapter(adapted, file)
    if spec.method not in ("dora", "lora"):
        return
    alphas = {layer.spec.alpha or 0.0 for network in adapted.values() for layer in adapted_layers(network).values()}
    if alphas != {spec.alpha}:
        found = ", ".join(f"{alpha:g}" for alpha in sorted(alphas))
        raise ValueError(f"adapter.init_from: {file} has alpha {found}, and adapter.alpha is {spec.alpha:g}")


def adapter_folder(path: Path) -> Path:
    """The folder of an adapter that is given as a run, a folder or a file."""
    if path.is_file():
        return path.parent
    return path / "adapter" if (path / "adapter").is_dir() else path


def check_identity(folder: Path, metadata: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Raises ValueError where the adapter was trained upon another base, or saw through other eyes.

    here: digests by the keys of IDENTITIES. What either side does not know is not compared.
    """
    for key, what in IDENTITIES.items():
        if metadata.get(key) and here.get(key) and metadata[key] != here[key]:
            raise ValueError(f"{what} than the one that the adapter {folder} was trained with")


def seed_of(folder: Path, metadata: Mapping[str, str]) -> int:
    """The seed that what a bare BART lacks was drawn from."""
    text = metadata.get("seed", "0")
    if not text.isdecimal():
        raise ValueError(f"{io.find_file(folder)} has a header key seed that is no number: {text!r}")
    return int(text)


def load_vl_adapters(path: Path, model: nn.Module, tower: nn.Module | None, backend: str) -> None:
    """A VL-BART's adapter (a run, a folder or a file) and, where its run adapted it, its tower's."""
    folder = adapter_folder(path)
    if (folder / TOWER).is_dir() and tower is None:
        raise ValueError(f"{folder} adapts the vision tower too: leave vision.features out, so that it looks itself")
    dora_mm.load_adapter({"model": model}, folder, backend=backend)
    if (folder / TOWER).is_dir() and tower is not None:
        dora_mm.load_adapter({TOWER: tower}, folder / TOWER, backend=backend)
