"""diffusers: `unet.<path>.lora_A.weight`, computed by PEFT; alpha is in the header, else the rank.

Of kohya's files it reads A, B and alpha, and drops `.dora_scale`.
"""

from __future__ import annotations

import functools
import json
import re
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn

from dora_mm.formats.diffusers import PEFT_METADATA, TEXT_PREFIX
from dora_mm.formats.json_text import parse_json
from dora_mm.formats.peft_layers import alpha_of, check_config, lora_config
from dora_mm.formats.state import LayerState
from dora_mm.formats.tools import peft
from dora_mm.formats.tools.tool import Export, Header, Specs, Tool

OWN_NAMES = re.compile(r"(unet|transformer|text_encoder(_[23])?)\.")
FILE_NAME = "pytorch_lora_weights.safetensors"


def matches(keys: Collection[str], header: Header) -> bool:
    return any(OWN_NAMES.match(key) and ".lora_A." in key for key in keys)


def alpha(header: Header, module: str, rank: int) -> float | None:
    text = header.get(PEFT_METADATA)
    if text is None or not OWN_NAMES.match(module):
        return None
    component, _, path = module.partition(".")
    return alpha_of(_configs(text)[component], path, rank)


@functools.lru_cache(maxsize=2)
def _configs(text: str) -> dict[str, dict[str, Any]]:
    """PEFT's configuration by component."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in parse_json(text, PEFT_METADATA).items():
        component, _, name = key.partition(".")
        found[component][name] = value
    for component, config in found.items():
        check_config(Path(f"{PEFT_METADATA} of {component}"), config)
    return found


def header(specs: Specs, old: Header) -> dict[str, str]:
    found = {}
    for component in dict.fromkeys(name.component for name in specs):
        layers = {
            name.path.removeprefix(TEXT_PREFIX): LayerState(spec, {})
            for name, spec in specs.items()
            if name.component == component
        }
        config = lora_config(layers, nn.Module())
        found |= {f"{component}.{key}": value for key, value in config.items()}
    return {"format": "pt", PEFT_METADATA: json.dumps(found, sort_keys=True)}


TOOL = Tool(
    title="diffusers",
    names=re.compile(rf"{OWN_NAMES.pattern}|lora_(unet|te[12]?|transformer)_"),
    parts={**peft.PARTS, "lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha"},
    apply=peft.apply,
    differs="scales the update inside the norm by the strength",
    axis="out",
    matches=matches,
    read=peft.read,
    alpha=alpha,
)
EXPORT = Export(
    peft.write,
    spelling="diffusers",
    judges=("diffusers",),
    header=header,
    file_name=FILE_NAME,
    one_method=True,
    columns=False,
    diffs=False,
)
