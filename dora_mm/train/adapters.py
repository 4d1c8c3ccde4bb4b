"""Training that goes on from an adapter file."""

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
