"""A random adapter of equal norm: a control that tells what an adapter changes from what any change would do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from dora_mm import formats
from dora_mm.core import AdaptedLayer, DoRASpec, adapted_layers, remove
from dora_mm.core.functional import merged_weight
from dora_mm.core.inject import inject_paths
from dora_mm.formats.adapter_file import AdapterFile
from dora_mm.utils.randomness import generator


@torch.no_grad()
def random_adapter(networks: Mapping[str, nn.Module], path: Path, folder: Path, *, seed: int = 0) -> Path:
    """Writes an adapter whose update of each layer is random, with the norm and the rank of another one's.

    It has no magnitudes: its update s B A is that of normal A and B, scaled to the Frobenius norm of W' - W0.

    Args:
        networks: The networks of the model by component, not adapted; they are as before afterwards.
        path: The file of the adapter.
        folder: Where to write the control.
        seed: Of A and B.

    Returns:
        The file.
    """
    formats.load(networks, AdapterFile(path))
    adapted = {name: network for name, network in networks.items() if any(map(_is_adapted, network.modules()))}
    norms = {name: _norms(network) for name, network in adapted.items()}
    for network in adapted.values():
        remove(network)
    try:
        for name, network in adapted.items():
            _inject_random(network, name, norms[name], seed)
        return formats.save(adapted, folder, format="diffusers", metadata={"control_of": path.name})
    finally:
        for network in adapted.values():
            if any(map(_is_adapted, network.modules())):
                remove(network)


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(module, AdaptedLayer)


def _norms(network: nn.Module) -> dict[str, tuple[float, int]]:
    """The Frobenius norm of W' - W0, and the rank, of each adapted layer, by path."""
    found = {}
    for path, layer in adapted_layers(network).items():
        W0 = layer.full_matrix()
        update = merged_weight(W0, layer.adapters()).float() - W0.float()
        found[path] = float(torch.linalg.vector_norm(update)), layer.adaptation.spec.rank
    return found


def _inject_random(network: nn.Module, component: str, norms: Mapping[str, tuple[float, int]], seed: int) -> None:
    """Adapts layers by random updates of these norms and ranks."""
    wanted = {path: ("control", DoRASpec(rank, float(rank), method="lora")) for path, (_, rank) in norms.items()}
    inject_paths(network, wanted)
    for path, layer in adapted_layers(network).items():
        stream = generator(seed, 0, f"control {component}.{path}")
        A, B = layer.lora_A, layer.lora_B
        assert A is not None
        assert B is not None
        for matrix in (A, B):
            matrix.copy_(torch.randn(matrix.shape, generator=stream))
        W0 = layer.full_matrix()
        norm = float(torch.linalg.vector_norm(merged_weight(W0, layer.adapters()).float() - W0.float()))
        B.mul_(norms[path][0] / norm)
