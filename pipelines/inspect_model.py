"""dora-mm inspect: what an adapter file or a picture says, or which modules of a model a target map selects."""

from collections import Counter
from pathlib import Path
from typing import Any

from dora_mm import DoRASpec, formats, inject
from dora_mm.config import find_path, resolve_model
from dora_mm.formats.diffusers import PEFT_METADATA
from dora_mm.formats.peft_layers import OUR_METADATA
from dora_mm.models.hub import unreachable
from dora_mm.sampling.png import read_description
from dora_mm.targets import find
from dora_mm.utils.tables import aligned_columns

ADAPTERS = [module.FILE_NAME for module in formats.FORMATS.values()]
HIDDEN = ("format", PEFT_METADATA, OUR_METADATA)  # the table shows what is in them
MAP_OF = {"unet": "sdxl-unet", "text_encoder": "clip-text", "text_encoder_2": "clip-text"}
RANK = 8  # parameter counts of target maps are stated at this rank


def main(path: str, *, targets: str | None = None) -> None:
    """Prints what an adapter file holds, how a picture was drawn, or what the target maps select in an SDXL model.

    Args:
        path: An adapter file, its folder or its run directory; a PNG file that `dora-mm sample` drew; or an SDXL model,
            as a folder or a hub name.
        targets: The only target map to show, for a model.

    Raises:
        ValueError: The file is not an adapter or such a picture, the path is not an SDXL model, or there is no such
            target map.
    """
    file = adapter_file(path)
    if file is not None and file.suffix.lower() == ".png":
        print(describe_picture(file))
        return
    if file is None:
        print(describe_model(resolve_model(path, "MODEL"), targets))
    elif targets is not None:
        raise ValueError(f"--targets is for models, but {file} is an adapter file: leave it out")
    else:
        print(describe_adapter(file))


def adapter_file(path: str) -> Path | None:
    """The adapter file of a path: the file itself, or the one in this folder or run directory; None for a model."""
    found = find_path(path)
    if found is None or found.is_file():
        return found
    files = (folder / name for folder in (found, found / "adapter") for name in ADAPTERS)
    return next((file for file in files if file.is_file()), None)


def describe_picture(file: Path) -> str:
    """How a picture was drawn, with a line per setting."""
    description = read_description(file)
    prompt, negative_prompt, seed = description.batch[description.position]
    model = {f"model {name}": value for name, value in vars(description.model).items() if value is not None}
    adapters = {
        f"adapter {number}": f"{adapter.path} at strength {adapter.strength:g}, SHA-256 {adapter.digest}"
        for number, adapter in enumerate(description.adapters, 1)
    }
    first = {"prompt": prompt, "negative prompt": negative_prompt, "seed": seed}
    batch = {"batch": f"picture {description.position + 1} of {len(description.batch)}"}
    software = {f"version of {name}": value for name, value in description.software.items()}
    lines = {**first, **description.settings, **adapters, **model, **batch, **description.environment, **software}
    return aligned_columns([(name, str(value)) for name, value in lines.items() if value is not None], num_text=2)


# --- adapter files ---------------------------------------------------------------------------------------------------


def describe_adapter(file: Path) -> str:
    """A table of the adapted modules, followed by the metadata."""
    state, metadata = formats.read(file)
    rows, parameters = Counter(), Counter()
    for component, layers in state.layers.items():
        for path, layer in layers.items():
            row = (component, leaf(path), *method_rank_alpha(layer.spec))
            rows[row] += 1
            parameters[row] += sum(tensor.numel() for tensor in layer.tensors.values())
    table = [("component", "module", "method", "rank", "alpha", "count", "parameters")]
    table += [(*row, str(count), f"{parameters[row]:,}") for row, count in rows.items()]
    table += [("all", "", "", "", "", str(rows.total()), f"{parameters.total():,}")]
    notes = [f"  {key}: {value}" for key, value in metadata.items() if key not in HIDDEN]
    title = f"{file}: {file.stat().st_size / 1e6:.1f} MB"
    return "\n".join([title, aligned_columns(table, num_text=3), *(["metadata", *notes] if notes else [])])


def method_rank_alpha(spec: DoRASpec) -> tuple[str, str, str]:
    """As text, with `-` for the rank and alpha of methods without A and B."""
    if spec.method in ("dora", "lora"):
        return spec.method, str(spec.rank), f"{spec.alpha:g}"
    return spec.method, "-", "-"


# --- models ----------------------------------------------------------------------------------------------------------


def describe_model(model: str, only: str | None) -> str:
    """One table per network, with all parts of its target map; with `only`, just the networks of this map.

    Raises:
        ValueError: There is no map `only`, it is not for an SDXL model, or `model` is not one.
    """
    requested = find(only).name if only else None
    chosen = {component: name for component, name in MAP_OF.items() if requested in (None, name)}
    if not chosen:
        raise ValueError(f"--targets: the target map {requested} is not for a network of an SDXL model")
    return "\n\n".join(table_of(model, component, name) for component, name in chosen.items())


def table_of(model: str, component: str, name: str) -> str:
    targets = find(name)
    spec = DoRASpec(rank=RANK, alpha=RANK)
    report = inject(network(model, component), targets, spec, parts=tuple(targets.parts))
    default = targets.select().parts
    selected = [module for module in report.modules if module.part in default]
    total = sum(module.num_parameters for module in selected)
    return (
        f"{model} {component}: {name} at rank {RANK}\n{report}\n"
        f"by default ({', '.join(default)}): {len(selected)} modules, {total:,} parameters"
    )


def network(model: str, component: str) -> Any:
    """A network of an SDXL model, built from its config on the meta device, without weights."""
    import torch
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    try:
        with torch.device("meta"):
            if component == "unet":
                config: Any = UNet2DConditionModel.load_config(model, subfolder=component)
                return UNet2DConditionModel.from_config(config)
            kind = CLIPTextModel if component == "text_encoder" else CLIPTextModelWithProjection
            return kind(CLIPTextConfig.from_pretrained(model, subfolder=component))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            unreachable(model, error) or f"{model} has no config of an SDXL model's {component}: {reason}"
        ) from error


# --- tables ----------------------------------------------------------------------------------------------------------


def leaf(path: str) -> str:
    """The last name of a path, such as to_q; the last two, such as to_out.0, where the last one is a number."""
    parts = path.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])
