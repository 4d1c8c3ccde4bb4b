"""Frozen linear layers in 8 or 4 bits, as `model.quantization` names them: by bitsandbytes, torchao, or our own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dora_mm.core import TargetMap
from dora_mm.core.targets import match_modules
from dora_mm.core.wrappers.float8 import Float8Linear
from dora_mm.core.wrappers.quantized import is_quantized
from dora_mm.core.wrappers.streaming import stream
from dora_mm.models.streaming import repeated_blocks

CPU = torch.device("cpu")
LEAST = {"bitsandbytes": (0, 48), "torchao": (0, 14)}  # 0.46 of the former rounds what is rounded already again


class Quantization(NamedTuple):
    """A kind of quantisation.

    Attributes:
        package: What does it, a key of LEAST; empty: nothing but torch.
        bits: Of a weight, with the scales of its blocks or rows.
    """

    package: str
    bits: float


QUANTIZATIONS = {
    "float8": Quantization("", 8.0),
    "int8": Quantization("bitsandbytes", 8.0),
    "torchao_int8": Quantization("torchao", 8.0),
    "nf4": Quantization("bitsandbytes", 4.13),  # 64 weights have a scale of 8 bits, and 256 of these one of 32
    "fp4": Quantization("bitsandbytes", 4.13),
}


def stored_bytes(weight: Tensor, name: str) -> int:
    """The bytes of a quantised weight, with its scales; `name` is a key of QUANTIZATIONS."""
    return math.ceil(weight.numel() * QUANTIZATIONS[name].bits / 8)


def check_installed(name: str, key: str = "model.quantization") -> None:
    """Checks that what quantises is there.

    Args:
        name: A key of QUANTIZATIONS.
        key: The config key that names it.

    Raises:
        ValueError: The package that does it is not installed, or too old.
    """
    package = QUANTIZATIONS[name].package
    if package and (not find_spec(package) or _version(package) < LEAST[package]):
        least = ".".join(map(str, LEAST[package]))
        raise ValueError(f"{key} {name} needs {package} {least} or newer: pip install 'dora_mm[quant]'")


def _version(package: str) -> tuple[int, ...]:
    return tuple(map(int, version(package).split(".")[:2]))


def config_for_transformers(name: str, dtype: torch.dtype) -> Any:
    """The quantisation as transformers takes it, which applies it to all linear layers while it reads a model.

    Args:
        name: A key of QUANTIZATIONS, but for float8.
        dtype: Of the products.

    Raises:
        ValueError: The package that does it is not installed, or too old.
    """
    import transformers

    check_installed(name)
    if name == "torchao_int8":
        return transformers.TorchAoConfig(_torchao().Int8WeightOnlyConfig())
    if name == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=name, bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
    )


def quantize_layers(
    network: nn.Module,
    targets: TargetMap | None,
    name: str,
    device: torch.device = CPU,
    streamed: Sequence[nn.Module] = (),
) -> None:
    """Quantises all Linear layers that a target map knows, or those of blocks, one by one; others stay as they are.

    diffusers' own quantisation needs a GPU, and would take layers that no adapter reaches, such as those at both ends.

    Args:
        network: The network, frozen and not adapted. On the meta device its layers get the sizes that they will have.
        targets: Its target map; None: see `layers_of_blocks`.
        name: A key of QUANTIZATIONS.
        device: Where it will be: packages round a weight there, since not all can move what they have rounded.
        streamed: Its blocks that wait in main memory: each is moved there before the next is quantised.
    """
    chosen = match_modules(network, targets.select(list(targets.parts))) if targets else layers_of_blocks(network)
    paths = list(chosen)
    for block in (*streamed, network):
        inside = {id(module) for module in block.modules()}
        for path in paths:
            layer = network.get_submodule(path)
            if type(layer) is nn.Linear and id(layer) in inside:
                network.set_submodule(path, _quantized(layer, name, device))
        if block is not network:
            stream([block], device)
    kept = {id(layer.weight) for layer in network.modules() if is_quantized(layer)}
    kept |= {id(t) for block in streamed for t in (*block.parameters(), *block.buffers())}
    for tensor in (*network.parameters(), *network.buffers()):
        if id(tensor) not in kept:  # a view of the file, all of which would stay mapped
            tensor.data = tensor.data.clone()


def layers_of_blocks(network: nn.Module) -> Iterator[str]:
    """The paths of the layers in the repeated blocks of a network, such as a text encoder, which often has no map.

    Without those that its class keeps in float32: T5 casts activations to the dtype of their weight.
    """
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    inside = {id(module) for block in repeated_blocks(network) for module in block.modules()}
    for path, module in network.named_modules():
        if id(module) in inside and kept.isdisjoint(path.split(".")):
            yield path


def _quantized(layer: nn.Linear, name: str, device: torch.device) -> nn.Module:
    if name == "float8":
        return Float8Linear.of(layer)
    if layer.weight.is_meta:
        return PlannedLinear.planned(layer, name)
    if name == "torchao_int8":
        _torchao().quantize_(holder := nn.Sequential(layer.to(device)), _torchao().Int8WeightOnlyConfig())
        return holder[0].requires_grad_(False)
    return _of_bitsandbytes(layer, name).to(device).train(layer.training)


def _of_bitsandbytes(layer: nn.Linear, name: str) -> nn.Module:
    """A layer of bitsandbytes, which rounds its weight when it is moved, also to where it is."""
    modules = import_module("bitsandbytes.nn")
    size, bias, W = (layer.in_features, layer.out_features), layer.bias is not None, layer.weight.detach()
    with torch.device("meta"):
        if name == "int8":
            found = modules.Linear8bitLt(*size, bias=bias, has_fp16_weights=False)
        else:
            found = modules.Linear4bit(*size, bias=bias, quant_type=name, compute_dtype=W.dtype)
    if name == "int8":
        found.weight = modules.Int8Params(W, requires_grad=False, has_fp16_weights=False)
    else:
        found.weight = modules.Params4bit(W, quant_type=name, module=found)  # which keeps the scales, too
        found.support_avx512bf16_for_cpu = False  # evaluated on a CPU it would round its scales for good
    found.bias = layer.bias
    return found


def _torchao() -> Any:
    return import_module("torchao.quantization")


class PlannedLinear(Float8Linear):
    """A Linear on the meta device that a package will quantise: its weight (O, I) has a byte for each number.

    Attributes:
        num_bytes: Those that its weight will take.
        restored: The dtype in which its weight will be made dense.
    """

    num_bytes: int
    restored: torch.dtype

    @classmethod
    def planned(cls, layer: nn.Linear, name: str) -> PlannedLinear:
        """A placeholder for a Linear with this quantisation."""
        W = layer.weight
        stored, scale = torch.empty_like(W, dtype=torch.int8), W.new_empty(len(W), 1, dtype=torch.float32)
        found: Any = cls.stored(layer, stored, scale)
        found.num_bytes = stored_bytes(W, name)
        found.restored = torch.float32 if name == "int8" else W.dtype
        return found

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.weight.to(self.restored) if dtype is None else self.weight.to(dtype)


def planned_bytes(network: nn.Module) -> dict[int, int]:
    """The bytes of the weights of layers that will be quantised, by `id` of what stands for them now."""
    layers = (layer for layer in network.modules() if isinstance(layer, PlannedLinear))
    return {id(layer.weight): layer.num_bytes for layer in layers}
