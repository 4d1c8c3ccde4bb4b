"""Adapters that were trained before: to go on from, and to be used."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

import dora_mm
from dora_mm.core import DoRASpec, adapted_layers


def go_on_from(file: Path, adapted: Mapping[str, nn.Module], spec: DoRASpec) -> None:
    """Loads `adapter.init_from` into freshly adapted networks; ValueError where its alpha is not the config's."""
    dora_mm.load_adapter(adapted, file)
    alphas = {layer.spec.alpha or 0.0 for network in adapted.values() for layer in adapted_layers(network).values()}
    if alphas != {spec.alpha}:
        found = ", ".join(f"{alpha:g}" for alpha in sorted(alphas))
        raise ValueError(f"adapter.init_from: {file} has alpha {found}, and adapter.alpha is {spec.alpha:g}")


def load_vl_adapters(folder: Path, model: nn.Module, tower: nn.Module | None, backend: str) -> None:
    """A VL-BART's adapter and, where its run adapted it, its tower's, which lies in a folder inside."""
    dora_mm.load_adapter({"model": model}, folder, backend=backend)
    if folder.is_dir() and (folder / "vision").is_dir():
        if tower is None:
            raise ValueError(
                f"{folder} adapts the vision tower too: leave vision.features out, so that it looks itself"
            )
        dora_mm.load_adapter({"vision": tower}, folder / "vision", backend=backend)
