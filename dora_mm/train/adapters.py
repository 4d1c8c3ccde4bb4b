"""What a training config says about adapters, as the library takes it."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

import dora_mm
from dora_mm.config.schema import AnyAdapterConfig
from dora_mm.core import DoRASpec, adapted_layers


def make_spec(config: AnyAdapterConfig) -> DoRASpec:
    """The spec of a config's `adapter` section."""
    return DoRASpec(config.rank, config.alpha, config.dropout, config.method, config.norm_grad, config.cache)


def load_initial_adapter(file: Path, adapted: Mapping[str, nn.Module], spec: DoRASpec) -> None:
    """Loads `adapter.init_from` into freshly adapted networks.

    Args:
        file: The adapter file or its folder.
        adapted: The networks by component.
        spec: What they were adapted with.

    Raises:
        ValueError: The file does not fit, or its alpha is not the config's.
    """
    dora_mm.load_adapter(adapted, file)
    if spec.method not in ("dora", "lora"):
        return
    alphas = {layer.spec.alpha or 0.0 for network in adapted.values() for layer in adapted_layers(network).values()}
    if alphas != {spec.alpha}:
        found = ", ".join(f"{alpha:g}" for alpha in sorted(alphas))
        raise ValueError(f"adapter.init_from: {file} has alpha {found}, and adapter.alpha is {spec.alpha:g}")
