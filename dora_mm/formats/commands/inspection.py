"""Inspects an adapter file: its header and shapes, and then whether its values are finite."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_mm.formats.adapter_file import AdapterFile, located
from dora_mm.formats.algebra.exact import norms
from dora_mm.formats.base_samples import KEY as BASE_SAMPLES
from dora_mm.formats.commands.support import misread_by, works_in
from dora_mm.formats.commands.verify import open_base, stacked
from dora_mm.formats.naming.names import NETWORKS, Name, architecture_of
from dora_mm.formats.naming.spellings import COMFY, KOHYA, Names, architecture_of_keys
from dora_mm.formats.reader import opened
from dora_mm.formats.tools import all_exports, products, tool_of
from dora_mm.formats.tools.diffusers import PEFT_METADATA
from dora_mm.formats.tools.native import SPECS_KEY
from dora_mm.formats.tools.peft import CONFIG_NAME
from dora_mm.formats.tools.peft_config import OUR_METADATA
from dora_mm.registries.tools import TOOLS
from dora_mm.utils.json_text import finite, parse_json

BASE_KEYS = ("base_model", "ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")
HIDDEN = (
    "format",
    PEFT_METADATA,
    OUR_METADATA,
    CONFIG_NAME,
    SPECS_KEY,
    BASE_SAMPLES,
)  # what the modules show already, and numbers
KINDS = {  # of models without a table of names, by what the paths of their modules have; the first that one has
    r"vision_(tower|model)\.|visual\.|multi_modal_projector": "vision-language model",
    r"(^|\.)text_model\.encoder\.layers\.": "CLIP",
    r"(^|\.)(encoder|decoder)\.layers\.\d": "encoder-decoder (BART)",
    r"(^|\.)(encoder|decoder)\.block\.\d": "encoder-decoder (T5)",
    r"(^|\.)(layers\.\d+\.(self_attn|mlp|linear_attn)|h\.\d+\.)": "LLM",
}
PROGRAMS = {  # by the beginning of a header's key
    "dora_mm": "dora_mm",
    "ot_": "OneTrainer",
    "ss_|sshs_": "sd-scripts",
    "software$": "ai-toolkit",
}
MORE = " (+ "  # after the first of the modules whose rows a file stacks
SHOWN = 8  # ambiguous modules of which the evidence is computed


@dataclass(frozen=True)
class ModuleInfo:
    """The adapter of one module.

    Attributes:
        key: Its name in the file.
        component: Its component; empty where the name is not known.
        path: Its path, or `key` where the name is not known.
        method: dora, lora, magnitude, diff or full; incomplete without A or B; or the name of another method.
        rank: The rank of A and B; None where there are none.
        alpha: Alpha; None where the file does not say it.
        axis: `out`, `in`, `?` where the shape does not say it, or empty without a magnitude that fits.
        num_parameters: The number of trained values.
    """

    key: str
    component: str
    path: str
    method: str
    rank: int | None
    alpha: float | None
    axis: str
    num_parameters: int


@dataclass(frozen=True)
class Inspection:
    """The result of inspecting an adapter file.

    Attributes:
        path: The file.
        tool: The key of the tool that writes this form: see `TOOLS`.
        title: The tool's name.
        architecture: The architecture, such as `sdxl`, or the kind of model; None where the modules do not tell.
        names: How modules are named: `SGM`, `diffusers`, `transformers` or `own`.
        base_model: The base model, as the header names it.
        modules: The adapted modules.
        ambiguous: The properties that the file leaves open, with the evidence.
        tokens: The keys of embeddings of trained tokens.
        biases: The keys of differences of biases.
        others: Keys that belong to no adapter.
        settings: The other entries of the header.
        made_with: The program that made it, where the header tells; else None.
        damage: The damage that its header and its shapes show.
        works_in: The tools that compute from it what it means, at strength 1: keys of `TOOLS`.
        not_finite: Keys of tensors with values that are NaN or infinite; None where the values were not read.
    """

    path: str
    tool: str
    title: str
    architecture: str | None
    names: str
    base_model: str | None
    modules: tuple[ModuleInfo, ...]
    ambiguous: tuple[str, ...]
    tokens: tuple[str, ...]
    others: tuple[str, ...]
    settings: dict[str, str]
    made_with: str | None = None
    damage: tuple[str, ...] = ()
    works_in: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    not_finite: tuple[str, ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON types; a number that is not finite is None."""
        return finite(asdict(self))


def inspect_file(
    source: str | Path | AdapterFile,
    base: str | Path | Mapping[Name, Tensor] | None = None,
    *,
    values: bool = True,
) -> Inspection:
    """Reads what an adapter file says.

    Args:
        source: The file of any tool, or its folder.
        base: The model, for evidence about what the shapes do not say.
        values: Whether all values are read, to find those that are NaN or infinite; else the header alone.

    Raises:
        ValueError: The file cannot be read, or is no adapter of a known tool.
    """
    file = opened(source)
    weights = None if base is None else open_base(base)
    namer = Names(weights or ())
    modules = tuple(_module(file, module, namer) for module in file.modules)
    architecture = architecture_of_keys(file.modules) or _architecture(modules)
    damage = tuple(_damage(file, modules))
    scalings = {m.key: m.alpha / m.rank for m in modules if m.rank and m.alpha}
    return Inspection(
        path=str(file.path),
        tool=file.tool,
        title=TOOLS[file.tool].title,
        architecture=architecture,
        names="transformers" if architecture in KINDS.values() else _spelling(file),
        base_model=_base_model(file.header),
        modules=modules,
        ambiguous=tuple(_ambiguous(file, modules, weights, namer)),
        tokens=tuple(file.embeddings),
        others=tuple(file.others),
        settings={key: value for key, value in file.header.items() if key not in HIDDEN},
        made_with=_program(file.header),
        biases=tuple(file.biases.values()),
        damage=damage,
        works_in=() if damage else works_in(file, scalings, architecture),
        not_finite=tuple(file.not_finite()) if values else None,
    )


def misreaders(path: Path, to: str) -> str:
    """The tools that load a file of a format for web UIs and misread it, each with the format that it needs instead.

    Args:
        path: The file that was written.
        to: The export format.

    Returns:
        The end of a sentence that begins with "not for"; empty where there are none.
    """
    if to not in all_exports() or all_exports()[to].spelling not in (KOHYA, COMFY):
        return ""
    file = AdapterFile(path)
    found = inspect_file(file, values=False)
    others = misread_by(file, found.works_in, found.architecture)
    named = {options: ", ".join(TOOLS[name].title for name in names) for options, names in others.items()}
    tools = "; ".join(f"{titles} ({options})" if options else titles for options, titles in named.items())
    return f"{tools}: they load it, and compute something else" if tools else ""


def _program(header: Mapping[str, str]) -> str | None:
    if header.get("config", "").startswith("pipeline: "):  # of a training here, also where it is converted
        return "dora_mm"
    return next((program for start, program in PROGRAMS.items() if any(re.match(start, key) for key in header)), None)


def _damage(file: AdapterFile, modules: Sequence[ModuleInfo]) -> Iterator[str]:
    if zero := [m for m in modules if m.alpha is not None and not m.alpha > 0]:
        yield f"alpha of {_named(zero)} is {zero[0].alpha:g}, and not a positive number"
    if bad := [m for m in modules if m.alpha is None and m.rank is not None and "alpha" in file.modules[m.key]]:
        yield f"alpha of {_named(bad)} is not one number"
    if half := [m for m in modules if m.method == "incomplete"]:
        yield f"A or B of {_named(half)} is missing"
    if unfit := [m for m in modules if m.method == "dora" and not m.axis]:
        yield f"the magnitude of {_named(unfit)} fits neither the rows nor the columns of the weight"


def _named(modules: Sequence[ModuleInfo]) -> str:
    return modules[0].key[:200] + (f" and {len(modules) - 1} other modules" if modules[1:] else "")


def _architecture(modules: Sequence[ModuleInfo]) -> str | None:
    """From the names of the modules; where the file names no component, from those of each network."""
    anonymous = any(module.component == "model" for module in modules)
    for component in (None, *(NETWORKS if anonymous else ())):
        names = [
            Name(m.component if component is None or m.component != "model" else component, m.path.partition(MORE)[0])
            for m in modules
        ]
        if found := architecture_of(names):
            return found
    if any(module.component != "model" for module in modules):
        return None
    paths = [module.path for module in modules]
    return next((kind for part, kind in KINDS.items() if any(re.search(part, path) for path in paths)), None)


def _module(file: AdapterFile, module: str, namer: Names) -> ModuleInfo:
    endings = file.modules[module]
    keys = tool_of(file.tool).roles(module, endings)
    shapes = {role: file.shape(key) for role, key in keys.items()}
    component, path = _name(namer, module)
    method = _method(file, module, shapes)
    stored = ["m"] if method == "magnitude" else [role for role in shapes if role != "alpha"]
    rank = shapes["A"][0] if "A" in shapes and shapes["A"] and method != "magnitude" else None
    size = sum(math.prod(shapes[role]) for role in stored)
    alpha, axis = _alpha(file, module, rank, keys.get("alpha")), file.axis(module) if "m" in shapes else ""
    return ModuleInfo(module, component, path, method, rank, alpha, axis, size)


def _name(namer: Names, module: str) -> tuple[str, str]:
    """The component and path; empty and the key itself where the name is not known."""
    try:
        group = namer.read(module)
    except ValueError:
        return "", module
    first, *more = group.names
    return first.component, f"{first.path}{MORE}{len(more)})" if more else first.path


def _method(file: AdapterFile, module: str, shapes: Mapping[str, Any]) -> str:
    """Of our own files of method `magnitude` the header says it: they hold zeros for A and B."""
    if method := products.method_of(shapes):
        return method
    if "diff" in shapes or "weight" in shapes:
        return "diff" if "diff" in shapes else "full"
    if "m" in shapes and ("A" not in shapes or file.settings(module).get("method") == "magnitude"):
        return "magnitude"
    if not {"A", "B"} <= shapes.keys():
        return "incomplete"
    return "dora" if "m" in shapes else "lora"


def _alpha(file: AdapterFile, module: str, rank: int | None, key: str | None) -> float | None:
    """Alpha, from its key or from what the header says; None where it is neither, or not one number."""
    if rank is None:
        return None
    if key is not None:
        return file.alphas.get(key)
    with located(str(file.path)):
        return tool_of(file.tool).in_header.alpha(file.header, module, rank)


def _spelling(file: AdapterFile) -> str:
    if any("input_blocks" in key or "output_blocks" in key for key in file.modules):
        return "SGM"
    return "own" if any(key.startswith("diffusion_model.") for key in file.modules) else "diffusers"


def _base_model(header: Mapping[str, str]) -> str | None:
    config = parse_json(header.get(CONFIG_NAME, "{}"), CONFIG_NAME)
    found = [config.get("base_model_name_or_path"), *(header.get(key) for key in BASE_KEYS)]
    return ", ".join(dict.fromkeys(str(value) for value in found if value)) or None


def _ambiguous(
    file: AdapterFile, modules: tuple[ModuleInfo, ...], weights: Mapping[Name, Tensor] | None, namer: Names
) -> list[str]:
    found = []
    without = [m for m in modules if m.alpha is None and m.rank is not None]
    if [m for m in without if "alpha" not in file.modules[m.key]]:
        found.append("alpha is not in the file: that of the rank is taken, as the tool does")
    unclear = [m for m in modules if m.axis == "?"]
    if unclear:
        found.append(f"the axis of {len(unclear)} magnitudes, such as {unclear[0].key}: say it with --axis")
    if unclear and weights is None:
        found.append("with --base MODEL the magnitudes are compared with the norms of its rows and columns")
    for module in unclear[:SHOWN]:
        if weights is None:
            break
        m = file.tensor(tool_of(file.tool).roles(module.key, file.modules[module.key])["m"])
        W0 = stacked(namer.read(module.key), weights)
        if (m.numel(),) * 2 != W0.shape[:2]:
            raise ValueError(f"{file.path}: {module.key}: its magnitude is for another model")
        rows, columns = correlations(m, W0)
        found.append(f"{module.key}: correlation with the norms of rows {rows:.3f}, of columns {columns:.3f}")
    return found


def correlations(magnitude: Tensor, W0: Tensor) -> tuple[float, float]:
    """How magnitudes correlate with the norms of the rows and of the columns of a square weight (N, N)."""
    both = (torch.stack([magnitude.flatten().float(), norms(W0, axis).flatten()]) for axis in ("out", "in"))
    rows, columns = (float(torch.corrcoef(pair)[0, 1]) for pair in both)
    return rows, columns
