"""PEFT: `base_model.model.<path>.lora_A.weight`, and the settings in adapter_config.json.

The magnitude is (O,), of a convolution (1, O, 1, 1). `scale_layer` scales s inside the norm: t = 0 is not W0.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dora_mm.formats import peft as folder
from dora_mm.formats.exact import along, norms
from dora_mm.formats.json_text import parse_json
from dora_mm.formats.peft_layers import alpha_of, check_config, lora_config
from dora_mm.formats.state import LayerState
from dora_mm.formats.tools.parts import Parts, neutral, product, scaling
from dora_mm.formats.tools.tool import Export, Header, Specs, Tool

NAMES = re.compile(r"base_model\.model\.")
PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
}


def matches(keys: Collection[str], header: Header) -> bool:
    return any(NAMES.match(key) for key in keys)


def alpha(header: Header, module: str, rank: int) -> float | None:
    if folder.CONFIG_NAME not in header:
        raise ValueError(f"{folder.CONFIG_NAME}, which says alpha, is missing beside the file")
    return alpha_of(_config(header[folder.CONFIG_NAME]), NAMES.sub("", module), rank)


@functools.lru_cache(maxsize=2)
def _config(text: str) -> dict[str, Any]:
    config = parse_json(text, folder.CONFIG_NAME)
    check_config(Path(folder.CONFIG_NAME), config)
    return config


def read(parts: Parts, axis: str | None) -> LayerState:
    if "m" in parts:
        parts = {**parts, "m": parts["m"].flatten()}
    return neutral(parts, "out")


def write(layer: LayerState, W0: Tensor) -> dict[str, Tensor]:
    A, B = (layer.tensors[name].float() for name in ("lora_A", "lora_B"))
    ones = (1,) * (A.dim() - 2)
    found = {"lora_A.weight": A, "lora_B.weight": B.view(*B.shape, *ones)}
    if (m := layer.tensors.get("magnitude")) is not None:
        found["lora_magnitude_vector"] = m.float().view(1, -1, *ones) if ones else m.float()
    return found


def header(specs: Specs, old: Header) -> dict[str, str]:
    layers = {name.path: LayerState(spec, {}) for name, spec in specs.items()}
    config = {"peft_type": "LORA", "task_type": None, "inference_mode": True, **lora_config(layers, nn.Module())}
    before = _config(old[folder.CONFIG_NAME]) if folder.CONFIG_NAME in old else {}
    config["base_model_name_or_path"] = before.get("base_model_name_or_path", old.get("base_model"))
    return {"format": "pt", folder.CONFIG_NAME: json.dumps(config, indent=2, sort_keys=True) + "\n"}


def apply(parts: Parts, W0: Tensor, strength: float) -> Tensor:
    V = W0 + strength * scaling(parts) * product(parts, W0)
    if "m" not in parts:
        return V
    return along(parts["m"].flatten(), W0, "out") / norms(V, "out") * V


TOOL = Tool(
    title="PEFT",
    names=NAMES,
    parts=PARTS,
    apply=apply,
    differs="scales the update inside the norm by the strength",
    axis="out",
    matches=matches,
    read=read,
    alpha=alpha,
)
EXPORT = Export(
    write,
    spelling="peft",
    judges=("peft",),
    header=header,
    file_name=folder.FILE_NAME,
    one_method=True,
    keeps_alpha=True,
    columns=False,
    diffs=False,
)
