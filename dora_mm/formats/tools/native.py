"""Our own file, `trained_weights.safetensors`, for what no other tool has a format for.

    <component>.<path>.lora_A      (R, I), of a convolution (R, I / groups, *K)
    <component>.<path>.lora_B      (O, R)
    <component>.<path>.magnitude   (O,)
    <component>.<path>.lora_A      (E, R, I), of stacked experts, with lora_B (E, O, R) and magnitude (E, O)
    <component>.<path>.weight      the whole weight, of method `full`
    <component>.<name>             an extra parameter, such as a bias or a norm
    bundle_emb.<word>.<table>      the rows of a new token

It holds adapters of any method on any layer, in the dtype they were trained in. The header has the settings of every
layer and the names of the extra parameters.
"""

from __future__ import annotations

import functools
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from dora_mm.core.spec import DoRASpec
from dora_mm.formats.algebra.exact import new_weight
from dora_mm.formats.files.tensor_file import FORMAT_KEY
from dora_mm.formats.models import saved_layers
from dora_mm.formats.naming.names import Name
from dora_mm.formats.naming.spellings import Spelling
from dora_mm.formats.state import LayerState, joined
from dora_mm.formats.tokens import BUNDLE
from dora_mm.formats.tools.formulas import Computation, Update
from dora_mm.formats.tools.parts import Parts, neutral, of_experts
from dora_mm.formats.tools.tool import Contents, Export, Format, Header, HeaderReader, Tool
from dora_mm.utils.json_text import parse_json

FILE_NAME = "trained_weights.safetensors"
FORMAT_VALUE = "native-1"
SPECS_KEY = "dora_mm_specs"
EXTRA_KEY = "dora_mm_parameters"
SETTINGS = ("rank", "alpha", "dropout", "method", "norm_grad")


# --- reading ---------------------------------------------------------------------------------------------------------


def named(module: str) -> Name:
    component, _, path = module.partition(".")
    return Name(component, path)


def alpha(header: Header, module: str, rank: int) -> float | None:
    return settings(header, module).get("alpha")


def settings(header: Header, module: str) -> Mapping[str, Any]:
    name = named(module)
    found = _specs(header).get(name.component, {})
    spec = found.get(name.path) if isinstance(found, dict) else None
    if not isinstance(spec, dict) or not set(spec) <= set(SETTINGS):
        raise ValueError(f"its header key {SPECS_KEY} has no settings of {name}")
    return spec


def listed(header: Header) -> Iterator[Name]:
    for component, layers in _specs(header).items():
        if not isinstance(layers, dict):
            raise ValueError(f"its header key {SPECS_KEY} has no modules of {component}")
        yield from (Name(component, path) for path in layers)
    yield from (named(key) for key in _extra(header))


def parameter(header: Header, key: str) -> Name | None:
    return named(key) if key in _extra(header) else None


def _specs(header: Header) -> dict[str, Any]:
    if header.get(FORMAT_KEY) != FORMAT_VALUE:
        raise ValueError(f"its header key {FORMAT_KEY} is not {FORMAT_VALUE}")
    return _parsed(header.get(SPECS_KEY, "{}"), SPECS_KEY, dict)


def _extra(header: Header) -> dict[str, None]:
    return _parsed(header.get(EXTRA_KEY, "[]"), EXTRA_KEY, list)


@functools.lru_cache(maxsize=4)
def _parsed(text: str, key: str, kind: type[dict | list]) -> Any:
    """A JSON object; or the names in a list, to be looked up."""
    found = parse_json(text, f"its header key {key}", kind)
    return (
        found if kind is dict else dict.fromkeys(name if isinstance(name, str) else f"{name!s:.200}" for name in found)
    )


def read(parts: Parts, axis: str | None) -> LayerState:
    if "weight" in parts:
        return LayerState(DoRASpec(method="full"), {"weight": parts["weight"]})
    if "A" not in parts and "B" not in parts and "m" in parts:
        return LayerState(DoRASpec(method="magnitude"), {"magnitude": parts["m"]})
    if {"A", "B"} <= parts.keys() and parts["B"].dim() == 3:
        return of_experts(parts)
    return neutral(parts, "out")


def computed(update: Update, m: Tensor | None, strength: float) -> Tensor:
    parts = update.parts if m is None else {**update.parts, "m": m}
    return new_weight(read(parts, None), update.W0, strength)


# --- writing ---------------------------------------------------------------------------------------------------------


def header_of(components: Mapping[str, nn.Module], names: Iterable[str]) -> dict[str, str]:
    """The header of a file of trained parameters, with which it is read as an adapter.

    Args:
        components: The adapted models by component.
        names: The names of all trained parameters, each with its component in front.
    """
    layers = {Name(c, path): layer for c, model in components.items() for path, layer in saved_layers(model).items()}
    own = {joined(*name, tensor) for name, layer in layers.items() for tensor in layer.adapter_tensors()}
    specs = {name: layer.adaptation.spec for name, layer in layers.items()}
    others = [named(name) for name in names if name not in own and not name.startswith(BUNDLE)]
    return header(Contents(specs, {}, others))


def header(contents: Contents) -> dict[str, str]:
    specs: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for name, spec in contents.specs.items():
        specs[name.component][name.path] = {key: getattr(spec, key) for key in SETTINGS}
    extra = [joined(*name) for name in contents.parameters]
    return {FORMAT_KEY: FORMAT_VALUE, SPECS_KEY: json.dumps(specs), EXTRA_KEY: json.dumps(extra)}


TOOL = Tool(
    names=re.compile(r"\w+(\.|$)"),
    parts={"lora_A": "A", "lora_B": "B", "magnitude": "m", "weight": "weight"},
    computes=Computation(computed, "computes what the paper does", axis="out", lora=computed),
    wrote_header=re.compile(FORMAT_KEY),
    read=read,
    in_header=HeaderReader(alpha, settings, listed, parameter),
    named=named,
)
FORMAT = Format(
    Export(lambda layer, W0: dict(layer.tensors), Spelling("native", {}), header=header, file_name=FILE_NAME),
    why_not=lambda components: None,
    module=lambda name: joined(*name),
    parameter=lambda name, adapted: joined(*name),
)
