"""PEFT's folder, which `PeftModel.from_pretrained` reads: `adapter_model.safetensors` and `adapter_config.json`.

    base_model.model.<path>.lora_A.weight             (R, I), of a convolution (R, I, *K)
    base_model.model.<path>.lora_B.weight             (O, R), of a convolution (O, R, 1, ...)
    base_model.model.<path>.lora_magnitude_vector     (O,),   of a convolution (1, O, 1, ...)
    base_model.model.<name>     extra trainable parameters; PEFT loads them by their names, and those of an adapted
                                layer (its bias) are called `<path>.base_layer.<name>`

and of an embedding lora_embedding_A (R, num), lora_embedding_B (dim, R). LoHa and LoKr have the keys of LyCORIS, with
alpha / r in the settings alone: also a LoKr of two whole factors is scaled by it. A folder holds the adapter of one
model, and can be loaded into any component. It is written for the methods `dora` and `lora`; `magnitude` becomes DoRA
of rank 1 with A = B = 0, which is the same function; `full` is not possible (see native.py). Of stacked experts it has
plain LoRA alone (see peft_experts.py). `scale_layer` scales s
inside the norm: t = 0 is not W0.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dora_mm.core.wrappers.experts import ENDING
from dora_mm.formats.algebra.exact import along, norms, paper_form
from dora_mm.formats.naming import spellings
from dora_mm.formats.naming.names import Name
from dora_mm.formats.state import LayerState, joined
from dora_mm.formats.tools import peft_config, peft_experts, products
from dora_mm.formats.tools.formulas import AFTER_ANOTHER, Computation, Update
from dora_mm.formats.tools.methods import Method, method_of_type
from dora_mm.formats.tools.parts import Parts, neutral
from dora_mm.formats.tools.peft_experts import is_experts, parameter_of
from dora_mm.formats.tools.tool import Contents, Export, Format, Header, HeaderReader, Holds, Modules, Tool
from dora_mm.utils.json_text import parse_json

FILE_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
PREFIX = "base_model.model"
NAMES = re.compile(r"base_model\.model(\.|$)")
PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
    **products.LOHA,
    **products.LOKR,
}


# --- what it computes ------------------------------------------------------------------------------------------------


def dora(update: Update, m: Tensor | None, strength: float) -> Tensor:
    """A magnitude that is missing is the norm of W0, with which PEFT initialises it."""
    W0 = update.W0
    m = norms(W0, "out") if m is None else along(m.flatten(), W0, "out")
    if strength == 1:
        return update.scaled(m / update.norms("out"))
    V = lora(update, m, strength)
    return m / norms(V, "out") * V


def lora(update: Update, m: Tensor | None, strength: float) -> Tensor:
    return update.V if strength == 1 else update.plus(strength * update.scaling)


# --- reading ---------------------------------------------------------------------------------------------------------


def named(module: str) -> Name | None:
    return Name("", module.removeprefix(PREFIX).removeprefix(".")) if NAMES.match(module) else None


def alpha(header: Header, module: str, rank: int) -> float | None:
    config, path = config_next_to(header, "LORA"), NAMES.sub("", module)
    return peft_config.alpha_in(config, parameter_of(path) if is_experts(config, path) else path, rank)


def scaling(header: Header, module: str) -> float:
    return peft_config.scaling_in(config_next_to(header, "LOHA", "LOKR"), NAMES.sub("", module))


def settings(header: Header, module: str) -> Mapping[str, Any]:
    return peft_config.settings_in(config_next_to(header), peft_config.own_header(header))


def listed(header: Header) -> Iterator[Name]:
    if ours := peft_config.own_header(header):  # the target_modules of others may be patterns
        config = config_next_to(header)
        lists = (config.get("target_modules") or [], ours.get("parameters", []))
        yield from (Name("", name) for names in lists for name in peft_config.listed_names(names))
        experts = peft_config.listed_names(config.get("target_parameters") or [])
        yield from (Name("", name.removesuffix(ENDING)) for name in experts)


def renamed(modules: Collection[str], header: Header) -> Mapping[str, str]:
    if not _has_experts(header):
        return {}
    paths = {module: own.path for module in modules if (own := named(module))}
    found = peft_experts.in_model(config_next_to(header), paths.values())
    return {module: joined(PREFIX, found[path]) for module, path in paths.items() if path in found}


def prepared(parts: dict[str, Tensor], module: str, header: Header) -> dict[str, Tensor]:
    path = NAMES.sub("", module)
    if not {"A", "B"} <= parts.keys() or not _has_experts(header) or not is_experts(config_next_to(header), path):
        return parts
    if "m" in parts:
        raise ValueError("it has a magnitude of stacked experts, which PEFT does not write")
    rank = peft_config.rank_in(config_next_to(header), parameter_of(path))
    found = peft_experts.stacked(parts, rank)
    return {**found, "experts": torch.tensor(len(found["A"]))}


def _has_experts(header: Header) -> bool:
    return CONFIG_NAME in header and bool(config_next_to(header).get("target_parameters"))


def parameter(header: Header, key: str) -> Name | None:
    is_adapter = key.endswith(tuple(f".{ending}" for ending in PARTS))
    if is_adapter or not key.startswith(f"{PREFIX}."):
        return None
    return Name("", key.removeprefix(f"{PREFIX}.").replace(".base_layer.", "."))


def unties(header: Header, name: Name) -> bool:
    """Whether it is in one of the `modules_to_save`, of which PEFT trains copies: the end of a module's path is enough.

    A head that the base ties to a copied embedding keeps the old weight.
    """
    copied = tuple(peft_config.listed_names(config_next_to(header).get("modules_to_save") or []))
    parts = name.path.split(".")
    return any(".".join(parts[:count]).endswith(copied) for count in range(1, len(parts)))


def refuses(modules: Modules, others: Collection[str], header: Header) -> str:
    if CONFIG_NAME not in header and any(map(NAMES.match, modules)):
        return f"raises an error, since {CONFIG_NAME} is missing beside the file, and loads nothing"
    return ""


def companion_method(header: Header) -> Method | None:
    """The method that PEFT's config file names; None where there is no such file, or where the method is read."""
    if CONFIG_NAME not in header:
        return None
    return method_of_type(str(parse_json(header[CONFIG_NAME], CONFIG_NAME).get("peft_type")))


def config_next_to(header: Header, *types: str) -> dict[str, Any]:
    """PEFT's config, a file in the folder of the weights.

    Args:
        header: The header, with the file.
        types: The types of adapters that have the tensors for which the config is used; empty for any.

    Raises:
        ValueError: There are none, they are for other tensors, or PEFT computes something else with them.
    """
    if CONFIG_NAME not in header:
        raise ValueError(f"{CONFIG_NAME} is missing beside the file: PEFT's format is a folder of two files")
    config = _parsed(header[CONFIG_NAME])
    if types and config["peft_type"] not in types:
        raise ValueError(f"its tensors are not those of {config['peft_type']}, which {CONFIG_NAME} says")
    return config


@functools.lru_cache(maxsize=2)
def _parsed(text: str) -> dict[str, Any]:
    config = parse_json(text, CONFIG_NAME)
    if config["peft_type"] == "LORA":
        peft_config.check_config(CONFIG_NAME, config, reads_experts=True)
    return config


def read(parts: Parts, axis: str | None) -> LayerState:
    if "lokr_w2" in parts and parts["lokr_w2"].dim() == 3:
        raise ValueError("it is the LoKr of a one-dimensional convolution, whose factors PEFT puts in another order")
    if "m" in parts:
        parts = {**parts, "m": parts["m"].flatten()}
    return neutral(parts, "out")


# --- writing ---------------------------------------------------------------------------------------------------------


def why_not(components: Mapping[str, nn.Module]) -> str | None:
    if len(components) != 1:
        return f"PEFT's format holds the adapter of one model, and {', '.join(components)} were given"
    return peft_config.unsupported_reason(*next(iter(components.items())))


def write(layer: LayerState, W0: Tensor) -> dict[str, Tensor]:
    if layer.num_experts is not None:
        if layer.spec.method != "lora":
            raise ValueError(peft_config.NO_MAGNITUDES)
        return {name: tensor.detach().float() for name, tensor in peft_experts.flat(layer).items()}
    tensors = {name: tensor.detach().float() for name, tensor in paper_form(layer, W0).tensors.items()}
    A, B = tensors["lora_A"], tensors["lora_B"]
    ones = (1,) * (A.dim() - 2)
    found = {"lora_A.weight": A, "lora_B.weight": B.view(*B.shape, *ones)}
    if (m := tensors.get("magnitude")) is not None:
        found["lora_magnitude_vector"] = m.view(1, -1, *ones) if ones else m
    return found


def header(contents: Contents) -> dict[str, str]:
    specs = {name.path: spec for name, spec in contents.specs.items()}
    before = parse_json(contents.source.get(CONFIG_NAME, "{}"), CONFIG_NAME)
    config = {"peft_type": "LORA", "task_type": None, "inference_mode": True}
    experts = {name.path: parameter_of(name.path) for name in contents.experts}
    config |= peft_config.lora_config(specs, transposed=bool(contents.transposed), parameters=experts)
    config["base_model_name_or_path"] = before.get("base_model_name_or_path", contents.source.get("base_model"))
    config["revision"] = before.get("revision", contents.source.get("base_revision"))
    ours = {**peft_config.our_config(specs), "parameters": sorted(name.path for name in contents.parameters)}
    return {
        "format": "pt",
        peft_config.OUR_METADATA: json.dumps(ours),
        CONFIG_NAME: json.dumps(config, indent=2, sort_keys=True) + "\n",
    }


def expert_names(modules: Iterable[str]) -> dict[str, str]:
    paths = {module.removeprefix(f"{PREFIX}."): module for module in modules}
    return {paths[path]: joined(PREFIX, found) for path, found in peft_experts.in_file(paths).items()}


def parameter_key(name: Name, adapted: Collection[Name]) -> str:
    path, _, leaf = name.path.rpartition(".")
    return f"{PREFIX}.{f'{path}.base_layer.{leaf}' if Name(name.component, path) in adapted else name.path}"


COMPUTES = Computation(dora, "scales the update inside the norm by the strength", axis="out", lora=lora)
CAUTIONS = (f"{AFTER_ANOTHER}; write a second DoRA as plain LoRA (--to lora)",)
TOOL = Tool(
    names=NAMES,
    table="peft",
    parts=PARTS,
    computes=COMPUTES,
    wrote_key=NAMES,
    read=read,
    in_header=HeaderReader(alpha, settings, listed, parameter, unties, scaling),
    named=named,
    refuses=refuses,
    renamed=renamed,
    prepared=prepared,
    cautions=CAUTIONS,
)
EXPORT = Export(
    write,
    spellings.PEFT,
    read_by=("peft",),
    holds=Holds(columns=False, diffs=False, alpha=True, both_methods=False, tokens=""),
    header=header,
    file_name=FILE_NAME,
    experts=expert_names,
)
FORMAT = Format(EXPORT, why_not, lambda name: joined(PREFIX, name.path), parameter_key, oriented=peft_experts.oriented)
