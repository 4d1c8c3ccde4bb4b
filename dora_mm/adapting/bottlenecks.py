"""Bottlenecks, the baselines `series` and `parallel` of the paper's Table 1: y + U tanh(D x) with small D and U.

A series adapter stands behind each MLP and reads its output (Houlsby et al., arXiv 1902.00751), a parallel one beside
each of its last two layers (`up_proj` and `down_proj` of Llama) and reads the input of that (He et al., arXiv
2110.04366), without biases or a scale and in float32, as LLM-Adapters (arXiv 2304.01933) has them. They are no change
of a weight, so no other program reads them and nothing merges them. U is 0 at first, so that a fresh one changes no
bit; LLM-Adapters samples both D and U with a standard deviation of 0.02.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dora_mm.core import TargetMap
from dora_mm.core.targets import blocks_of, match_modules
from dora_mm.formats.adapter_file import find_file
from dora_mm.formats.files.tensor_file import TensorFile
from dora_mm.formats.tools.native import FILE_NAME
from dora_mm.utils.randomness import generator
from dora_mm.utils.tensor_writer import save_tensors

KEY, SIZE_KEY = "dora_mm_bottleneck", "dora_mm_bottleneck_size"  # of the header: the method, and the size
SETTINGS = (KEY, SIZE_KEY)  # of the header, that are computed with
NAME = "bottleneck"  # of the module, inside the one that it is behind or beside


class Bottleneck(nn.Module):
    """U tanh(D x), in float32.

    Args:
        size_in: Features of the input.
        size: Features between D and U.
        size_out: Features of the output.
        device: Where the parameters are.
    """

    def __init__(self, size_in: int, size: int, size_out: int, device: torch.device):
        super().__init__()
        settings: dict[str, Any] = {"bias": False, "device": device, "dtype": torch.float32}
        self.down = nn.Linear(size_in, size, **settings)
        self.up = nn.Linear(size, size_out, **settings)

    def start(self, seed: int, path: str) -> None:
        """Samples D as `nn.Linear` does, from the seed and the path of the module, and sets U to 0."""
        if self.down.weight.is_meta:
            return
        bound = self.down.in_features**-0.5
        uniform = torch.rand(self.down.weight.shape, generator=generator(seed, 0, f"bottleneck {path}"))
        self.down.weight.data.copy_((2 * uniform - 1) * bound)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.tanh(self.down(x)))


def attach(network: nn.Module, targets: TargetMap, method: str, size: int, seed: int) -> dict[str, nn.Parameter]:
    """Adds bottlenecks to a model.

    Args:
        network: The model, which is changed.
        targets: Its target map, whose part text.mlp says where MLPs are.
        method: "series" or "parallel".
        size: Features between D and U.
        seed: Of D.

    Returns:
        The parameters of the bottlenecks by name.

    Raises:
        ValueError: The model has no MLPs that can have bottlenecks.
    """
    found = {}
    for path, (size_in, size_out, device) in insertion_points(network, targets, method).items():
        host = network.get_submodule(path)
        added = Bottleneck(size_in, size, size_out, device)
        added.start(seed, path)
        host.add_module(NAME, added)
        host.register_forward_hook(_series if method == "series" else _parallel)
        found |= {f"{path}.{NAME}.{name}": parameter for name, parameter in added.named_parameters()}
    return found


def _series(host: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + host.bottleneck(output)


def _parallel(host: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + host.bottleneck(inputs[0])


def insertion_points(network: nn.Module, targets: TargetMap, method: str) -> dict[str, tuple[int, int, torch.device]]:
    """The modules that get a bottleneck, by path, with the features of its input and output, and its device.

    Raises:
        ValueError: The model has no MLPs in modules of their own, or they do not end in a linear layer.
    """
    if "text.mlp" not in targets.parts:
        raise ValueError(f"adapter.method {method} is for models with MLPs, and this one has no part text.mlp")
    blocks, mlps = blocks_of(network, targets), defaultdict(list)
    for path in match_modules(network, targets.select(["text.mlp"])):
        mlps[path.rpartition(".")[0]].append(path)
    found = {}
    for mlp, paths in mlps.items():
        layers: list[Any] = [network.get_submodule(path) for path in paths]
        if mlp in blocks or not all(isinstance(layer, nn.Linear) for layer in layers):
            raise ValueError(f"adapter.method {method}: {paths[0]} is not a linear layer of an MLP of its own")
        if method == "series":
            found[mlp] = (layers[-1].out_features, layers[-1].out_features, layers[-1].weight.device)
        else:
            sizes = [(layer.in_features, layer.out_features, layer.weight.device) for layer in layers[-2:]]
            found |= dict(zip(paths[-2:], sizes, strict=True))
    return found


# --- files -----------------------------------------------------------------------------------------------------------


def save(network: nn.Module, method: str, size: int, about: Mapping[str, str], folder: Path) -> None:
    """Writes the bottlenecks of a model to a folder, by the names of their parameters."""
    tensors = {name: parameter for name, parameter in network.named_parameters() if f".{NAME}." in name}
    save_tensors(folder / FILE_NAME, tensors, {**about, KEY: method, SIZE_KEY: str(size)})


def header_in(path: Path) -> dict[str, str] | None:
    """The header of a file of bottlenecks, of its folder or run directory; None: it is that of another adapter."""
    header = TensorFile(find_file(path)).metadata
    return dict(header) if KEY in header else None


def load(network: nn.Module, targets: TargetMap, path: Path) -> None:
    """Adds the bottlenecks of a file to a model.

    Raises:
        ValueError: The file is damaged, or does not fit the model.
    """
    file = find_file(path)
    opened = TensorFile(file)
    method, size = opened.metadata[KEY], opened.metadata.get(SIZE_KEY, "")
    if method not in ("series", "parallel") or not size.isdecimal() or not int(size):
        raise ValueError(f"{file} has a header that names no bottlenecks: {method}, {size}")
    parameters = attach(network, targets, method, int(size), 0)
    shapes = {name: tuple(entry.shape) for name, entry in opened.entries.items()}
    if shapes != {name: tuple(parameter.shape) for name, parameter in parameters.items()}:
        raise ValueError(f"{file} does not fit this model: its bottlenecks have other names or sizes")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(opened.read(name))
            parameter.requires_grad_(False)
