"""dora-mm inspect: what an adapter file holds, or what a target map takes of a model; no weights are read."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from dora_mm.config import find_path, resolve_model
from dora_mm.targets import MAPS, find

ADAPTER = "pytorch_lora_weights.safetensors"
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
ROLES = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "m"}
METHODS = {"ABm": "dora", "AB": "lora", "m": "magnitude", "w": "full"}
RANK = 8  # parameter counts of target maps are stated at this rank


class Module(NamedTuple):
    """One adapted module of a file."""

    component: str
    path: str
    method: str
    rank: int | None
    num_parameters: int


def main(path: str, *, targets: str | None = None) -> None:
    """Prints the content of an adapter file (or of the folder or run it lies in), or the target maps on a model."""
    file = adapter_file(path)
    if file is None:
        print(describe_model(resolve_model(path, "MODEL"), [targets] if targets else list(MAPS)))
    elif targets is not None:
        raise ValueError(f"--targets is for models, and {file} is an adapter file")
    else:
        print(describe_adapter(file))


def adapter_file(path: str) -> Path | None:
    found = find_path(path)
    if found is None or found.is_file():
        return found
    return next((file for file in (found / ADAPTER, found / "adapter" / ADAPTER) if file.is_file()), None)


# --- adapter files ---------------------------------------------------------------------------------------------------


def describe_adapter(file: Path) -> str:
    """A table of what the file adapts, then its metadata."""
    shapes, metadata = read_header(file)
    modules = adapted_modules(file, shapes)
    alphas = stored_alphas(file, metadata)
    rows = Counter()
    parameters = Counter()
    for module in modules:
        rank = "-" if module.rank is None else str(module.rank)
        row = (module.component, leaf(module.path), module.method, rank, alphas.get(module.component, "-"))
        rows[row] += 1
        parameters[row] += module.num_parameters
    table = [("component", "module", "method", "rank", "alpha", "count", "parameters")]
    table += [(*row, str(count), f"{parameters[row]:,}") for row, count in rows.items()]
    total = sum(module.num_parameters for module in modules)
    table += [("all", "", "", "", "", str(len(modules)), f"{total:,}")]
    notes = [f"  {key}: {value}" for key, value in metadata.items() if key not in ("format", "lora_adapter_metadata")]
    title = f"{file}: {len(shapes)} tensors, {file.stat().st_size / 1e6:.1f} MB"
    return "\n".join([title, columns(table), *(["metadata", *notes] if notes else [])])


def read_header(file: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The tensors' shapes by key, and the metadata."""
    try:
        with safe_open(file, framework="np") as tensors:
            shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
            return shapes, tensors.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from None


def adapted_modules(file: Path, shapes: dict[str, tuple[int, ...]]) -> list[Module]:
    """The file's modules, put together from their tensors."""
    tensors: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        component, _, rest = key.partition(".")
        if component not in COMPONENTS:
            raise ValueError(
                f"{file} is no adapter in the format of diffusers: it holds {key}, and keys start with one of "
                f"{', '.join(COMPONENTS)}; of a whole model, inspect its folder or its hub name"
            )
        path, role = split_role(rest)
        tensors.setdefault((component, path), {})[role] = shape
    return [module_of(file, component, path, parts) for (component, path), parts in tensors.items()]


def split_role(key: str) -> tuple[str, str]:
    """The module's path and which of its tensors this is; `w` for a weight itself."""
    for suffix, role in ROLES.items():
        if key.endswith(f".{suffix}"):
            return key.removesuffix(f".{suffix}"), role
    return key.removesuffix(".weight"), "w"


def module_of(file: Path, component: str, path: str, parts: dict[str, tuple[int, ...]]) -> Module:
    method = METHODS.get("".join(sorted(parts)))
    if method is None:
        raise ValueError(f"{file} is damaged: of {component}.{path} it holds only {', '.join(sorted(parts))}")
    num_parameters = sum(math.prod(shape) for shape in parts.values())
    return Module(component, path, method, parts["A"][0] if "A" in parts else None, num_parameters)


def stored_alphas(file: Path, metadata: dict[str, str]) -> dict[str, str]:
    """alpha by component, from the header that diffusers reads."""
    try:
        stored = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        found = {name: stored.get(f"{name}.lora_alpha") for name in COMPONENTS}
        return {name: f"{float(alpha):g}" for name, alpha in found.items() if alpha is not None}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} has a header lora_adapter_metadata that cannot be read: {error}") from None


# --- models ----------------------------------------------------------------------------------------------------------


def describe_model(model: str, names: list[str]) -> str:
    """One table per network that the maps are for, with all parts of the map; the networks have no weights."""
    from dora_mm import DoRASpec, inject

    blocks = []
    for name in names:
        targets = find(name)
        default = targets.select().parts
        for component, network in networks(model, name).items():
            spec = DoRASpec(rank=RANK, alpha=RANK)
            report = inject(network, name, spec, parts=tuple(targets.parts))
            taken = [module for module in report.modules if module.part in default]
            total = sum(module.num_parameters for module in taken)
            blocks += [
                f"{model} {component}: {name} at rank {RANK}",
                str(report),
                f"by default ({', '.join(default)}): {len(taken)} modules, {total:,} parameters\n",
            ]
    return "\n".join(blocks).rstrip("\n")


def networks(model: str, targets: str) -> dict[str, Any]:
    """The networks of an SDXL model that a target map is for, built from their configs on the meta device."""
    import torch
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    try:
        with torch.device("meta"):
            if targets == "sdxl-unet":
                config: Any = UNet2DConditionModel.load_config(model, subfolder="unet")
                return {"unet": UNet2DConditionModel.from_config(config)}
            classes = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
            return {
                component: network(CLIPTextConfig.from_pretrained(model, subfolder=component))
                for component, network in classes.items()
            }
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{model} has no configs of an SDXL model: {reason}") from error


# --- tables ----------------------------------------------------------------------------------------------------------


def leaf(path: str) -> str:
    """to_q, or to_out.0 where the last name is a number."""
    parts = path.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def columns(table: list[tuple[str, ...]]) -> str:
    """Text columns to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    align = [str.ljust] * 3 + [str.rjust] * (len(widths) - 3)
    return "\n".join(
        "  ".join(pad(cell, width) for pad, cell, width in zip(align, row, widths, strict=True)) for row in table
    )
