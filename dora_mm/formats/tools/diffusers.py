"""diffusers' LoRA file, `pytorch_lora_weights.safetensors`, which `StableDiffusionXLPipeline.load_lora_weights` reads.

    unet.<path>.lora_A.weight             (R, I), of a convolution (R, I, *K)
    unet.<path>.lora_B.weight             (O, R), of a convolution (O, R, 1, ...)
    unet.<path>.lora_magnitude_vector     (O,),   of a convolution (1, O, 1, ...)

and the same for transformer.*, and for text_encoder.text_model.* and text_encoder_2.text_model.*, where the last key is
`lora_magnitude_vector.weight`: transformers 5, which loads the adapters of its own models, takes the other one for
missing. PEFT computes it. The header key `lora_adapter_metadata` holds PEFT's configuration as JSON with the same
prefixes: without it diffusers takes alpha = rank. Of kohya's files it reads A, B and alpha, and drops `.dora_scale`.
"""

from __future__ import annotations

import functools
import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from dora_mm.core.spec import DoRASpec
from dora_mm.core.wrappers.experts import DoRAExperts
from dora_mm.formats.models import saved_layers
from dora_mm.formats.naming.names import TEXT_PREFIX, Name, canonical
from dora_mm.formats.naming.spellings import DIFFUSERS, without_processor
from dora_mm.formats.state import joined
from dora_mm.formats.tools import peft, peft_config, products
from dora_mm.formats.tools.parts import OLD_PARTS
from dora_mm.formats.tools.tool import Contents, Export, Format, Header, HeaderReader, Holds, Modules, Tool
from dora_mm.utils.json_text import parse_json

FILE_NAME = "pytorch_lora_weights.safetensors"
PEFT_METADATA = "lora_adapter_metadata"
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
LOST = re.compile(r"text_encoder(_[23])?(\..+)?\.lora_magnitude_vector")
_OLD_PARTS = {ending: role for ending, role in OLD_PARTS.items() if "default" not in ending}
_KOHYA = re.compile(r"lora_(unet|te[12]?|transformer)_")
OWN_NAMES = re.compile(r"(unet|transformer|text_encoder(_[23])?)(\.|$)")


# --- reading ---------------------------------------------------------------------------------------------------------


def named(module: str) -> Name | None:
    component, _, path = without_processor(module).partition(".")
    return Name(component, path) if OWN_NAMES.match(module) else None


def alpha(header: Header, module: str, rank: int) -> float | None:
    if PEFT_METADATA not in header or not OWN_NAMES.match(module):
        return None
    component, _, path = module.partition(".")
    return peft_config.alpha_in(_configs(header)[component], path, rank)


def settings(header: Header, module: str) -> Mapping[str, Any]:
    component = module.partition(".")[0]
    return peft_config.settings_in(_configs(header)[component], peft_config.own_header(header).get(component, {}))


def listed(header: Header) -> Iterator[Name]:
    for component in peft_config.own_header(header):  # the headers of others may list patterns
        for path in peft_config.listed_names(_configs(header)[component].get("target_modules", [])):
            yield canonical(component, path)


def _configs(header: Header) -> Mapping[str, dict[str, Any]]:
    return _parsed(header.get(PEFT_METADATA, "{}"))


@functools.lru_cache(maxsize=2)
def _parsed(text: str) -> Mapping[str, dict[str, Any]]:
    """PEFT's configuration by component."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in parse_json(text, f"its header key {PEFT_METADATA}").items():
        component, _, name = key.partition(".")
        found[component][name] = value
    for component, config in found.items():
        peft_config.check_config(f"{PEFT_METADATA} of {component}", config)
    return found


def refuses(modules: Modules, others: Collection[str], header: Header) -> str:
    """Its loaders raise an error at a name without `lora`, and at what they cannot convert of kohya's names."""
    bad = [key for key in TOOL.unread(modules, ()) if "lora" not in key or _KOHYA.match(key)]
    bad += [key for key in others if not re.search("lora|lokr", key) or (modules and _KOHYA.match(key))]
    if unknown := next((key for key in bad if "dora_scale" not in key), None):
        return f"raises an error at {unknown:.100}, and loads nothing"
    for text in (r"lora_te1?_", r"lora_te2_"):
        own = [module for module in modules if re.match(text, module)]
        if own and not any(module.endswith(("out_proj", "_fc1", "_fc2")) for module in own):
            return f"raises an error, since it knows kohya's text encoders by out_proj or an MLP, and {own[0]} has none"
    return ""


# --- writing ---------------------------------------------------------------------------------------------------------


def why_not(components: Mapping[str, nn.Module]) -> str | None:
    for component, model in components.items():
        if component not in COMPONENTS:
            return f"the diffusers format has no component {component!r}: it has {', '.join(COMPONENTS)}"
        if reason := peft_config.unsupported_reason(component, model):
            return reason
        if path := next((path for path, layer in saved_layers(model).items() if isinstance(layer, DoRAExperts)), None):
            return f"{joined(component, path)} is a layer of stacked experts, which files of diffusers do not have"
    return None


def ending(module: str, name: str) -> str:
    return f"{name}.weight" if LOST.fullmatch(f"{module}.{name}") else name


def header(contents: Contents) -> dict[str, str]:
    layers: dict[str, dict[str, DoRASpec]] = defaultdict(dict)
    for name, spec in contents.specs.items():
        layers[name.component][name.path.removeprefix(TEXT_PREFIX)] = spec
    configs = {
        f"{component}.{key}": value
        for component, specs in layers.items()
        for key, value in peft_config.lora_config(specs, transposed=component in contents.transposed).items()
    }
    ours = {component: peft_config.our_config(specs) for component, specs in layers.items()}
    return {
        "format": "pt",
        PEFT_METADATA: json.dumps(configs, sort_keys=True),
        peft_config.OUR_METADATA: json.dumps(ours),
    }


TOOL = Tool(
    table="diffusers",
    parts={
        **peft.PARTS,
        **_OLD_PARTS,
        **products.LOKR,
        "lora_down.weight": "A",
        "lora_up.weight": "B",
        "alpha": "alpha",
    },
    computes=peft.COMPUTES,
    wrote_key=re.compile(
        rf"(?:{OWN_NAMES.pattern}).*(lora_(A\.weight|B\.weight|embedding_|magnitude_vector)|lora(_linear_layer)?\.(down|up)\.)"
    ),
    read=peft.read,
    in_header=HeaderReader(alpha, settings, listed),
    named=named,
    loses=LOST,
    refuses=refuses,
    cautions=peft.CAUTIONS,
)
EXPORT = Export(
    peft.write,
    DIFFUSERS,
    read_by=("diffusers",),
    # tokens are beside it, since its loader raises an error at a key without `lora`
    holds=Holds(columns=False, diffs=False, both_methods=False, tokens="separate"),
    header=header,
    file_name=FILE_NAME,
    ending=ending,
)
FORMAT = Format(EXPORT, why_not, lambda name: joined(*canonical(*name)), components=COMPONENTS)
