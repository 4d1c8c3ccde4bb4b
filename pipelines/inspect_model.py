"""dora-mm inspect: what an adapter file or a picture says, or which modules of a model a target map selects."""

import math
from collections import Counter
from pathlib import Path

from dora_mm import formats
from dora_mm.config import find_path, resolve_model
from dora_mm.core import DoRASpec, InjectReport, TargetMap, inject
from dora_mm.core.targets import parts_in
from dora_mm.formats.diffusers import PEFT_METADATA
from dora_mm.formats.peft_layers import OUR_METADATA
from dora_mm.models.architectures import Network, networks_of
from dora_mm.sampling.png import read_description
from dora_mm.sampling.strengths import strength_text
from dora_mm.targets import find, map_of
from dora_mm.utils.tables import aligned_columns

ADAPTERS = [module.FILE_NAME for module in formats.FORMATS.values()]
HIDDEN = ("format", PEFT_METADATA, OUR_METADATA)  # the table shows what is in them
RANK = 8  # parameter counts of target maps are stated at this rank


def main(path: str, *, targets: str | None = None) -> None:
    """Prints what an adapter file holds, how a picture was drawn, or what the target maps select in a model.

    Args:
        path: An adapter file, its folder or its run directory; a PNG file that `dora-mm sample` drew; or a model of
            transformers or diffusers, as a folder or a hub name.
        targets: For a model, the target map to show; for a pipeline of diffusers, the only one.

    Raises:
        ValueError: The file is not an adapter or such a picture, the path is not a model, or there is no such target
            map, or none for it.
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
        f"adapter {number}": f"{adapter.path} at strength {strength_text(adapter.strength)}, SHA-256 {adapter.digest}"
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


def describe_model(path: str, only: str | None) -> str:
    """A section for each network of a model that has a target map, and the names of those that have none.

    Args:
        path: The folder or hub name of the model.
        only: The only target map to show, in the networks of a pipeline that it is for; None shows all.

    Raises:
        ValueError: There is no map `only`, or it is for no network; or `path` is no model, or one without a map.
    """
    requested = find(only) if only else None
    networks = networks_of(path)
    if "" in networks:
        return describe_network(path, networks[""], requested or map_of_network(networks[""]))
    sections, without = [], []
    for name, network in networks.items():
        try:
            targets = map_of(network.config)
        except ValueError:
            without.append(f"{name} ({network.kind})")
            continue
        if requested in (None, targets):
            sections.append(describe_network(f"{path} {name}", network, targets))
    if not sections:
        wanted = f"the target map {only}" if only else "a target map"
        raise ValueError(
            f"no network of {path} with a config.json has {wanted}: it has {', '.join(networks) or 'none'}"
        )
    if without and not only:
        sections.append(f"without a target map: {', '.join(without)}")
    return "\n\n".join(sections)


def map_of_network(network: Network) -> TargetMap:
    try:
        return map_of(network.config)
    except ValueError as error:
        raise ValueError(
            f"{network.path} is a {network.kind}: {error}; to try a map, name it with --targets"
        ) from error


def describe_network(title: str, network: Network, targets: TargetMap) -> str:
    """The modules that all parts of a map take together, the parts, and what the default ones would train."""
    model = network.build()
    num_base = sum(parameter.numel() for parameter in model.parameters())
    report = inject(model, targets.select(parts_in(model, targets) or None), DoRASpec(rank=RANK, alpha=RANK))
    default = tuple(targets.select().parts)
    trainable = sum(module.num_parameters for module in report.modules if module.part in default)
    total = num_base + trainable
    share = f"trainable {trainable:,} of {total:,} parameters ({100 * trainable / total:.3f} %)"
    head = f"{title}: {network.kind}, target map {targets.name} at rank {RANK}"
    return f"{head}\n{report}\n\n{table_of_parts(report, targets)}\nby default ({', '.join(default)}): {share}"


def table_of_parts(report: InjectReport, targets: TargetMap) -> str:
    """A row for each part of a map: whether it is a default one, its modules, their weights, and what they train."""
    table: list[tuple[str, ...]] = [("part", "default", "modules", "weights", "trainable")]
    for part in targets.parts:
        modules = [module for module in report.modules if module.part == part]
        numbers = len(modules), sum(math.prod(m.shape) for m in modules), sum(m.num_parameters for m in modules)
        default = "yes" if part in targets.select().parts else "no"
        table.append((part, default, *(f"{number:,}" for number in numbers)))
    return aligned_columns(table, num_text=2)


# --- tables ----------------------------------------------------------------------------------------------------------


def leaf(path: str) -> str:
    """The last name of a path, such as to_q; the last two, such as to_out.0, where the last one is a number."""
    parts = path.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])
