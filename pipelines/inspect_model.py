"""dora-mm inspect: what an adapter file or an image says, or which modules of a model a target map selects."""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from dora_mm import formats
from dora_mm.config import find_path, resolve_model
from dora_mm.config.adapter import REGEX
from dora_mm.config.models import ModelConfig
from dora_mm.config.paths import CONFIG, INDEX, is_adapter
from dora_mm.core import DoRASpec, InjectReport, TargetMap, inject
from dora_mm.core.targets import match_modules, parts_in
from dora_mm.formats.commands.inspection import Inspection, inspect_file
from dora_mm.formats.commands.set_metadata import Edited, parse_entries, set_metadata
from dora_mm.formats.files.locations import STEMS
from dora_mm.formats.files.tensor_file import PICKLES
from dora_mm.models.architectures import Network, networks_of
from dora_mm.registries.tools import TOOLS
from dora_mm.sampling.png import read_metadata
from dora_mm.sampling.strengths import strength_text
from dora_mm.targets import DERIVED, find, map_of
from dora_mm.targets.derived import NAME, about_experts, about_left_out
from dora_mm.utils.home import expanded
from dora_mm.utils.messages import shown
from dora_mm.utils.tables import aligned_columns

ADAPTERS = [form.file_name for form in formats.FORMATS.values()]
INSPECTED = (".safetensors", ".png", *PICKLES)  # of pickles it is said why they are not read
METHODS = {"dora": "DoRA", "lora": "LoRA", "diff": "differences of weights", "full": "whole weights"}
RANK = 8  # parameter counts of target maps are stated at this rank


def main(
    path: str,
    *,
    targets: str | None = None,
    base: str | None = None,
    as_json: bool = False,
    header: bool = False,
    metadata: Sequence[str] | None = None,
    out: str | None = None,
) -> None:
    """Prints what an adapter file holds, how an image was generated, or what the target maps select in a model.

    Args:
        path: An adapter file, its folder or its run directory; a PNG file that `dora-mm sample` drew; or a model of
            transformers or diffusers, as a folder or a hub name.
        targets: For a model, the target map to show; for a pipeline of diffusers, the only one. Or `re:` and a regular
            expression for the paths of modules, as `adapter.parts` takes it.
        base: For an adapter, its model: it shows what shapes do not say.
        as_json: For an adapter, whether to print JSON, with every module.
        header: For an adapter, whether its values are left unread.
        metadata: For an adapter, entries of its header to write, KEY=VALUE each; nothing else is done then.
        out: The new file with these entries; None: the file itself.

    Raises:
        ValueError: The file is not an adapter or such an image, the path is not a model, or there is no such target
            map, or none for it.
    """
    file = adapter_file(path)
    if file is not None and file.is_file() and file.suffix.lower() not in INSPECTED:
        raise ValueError(
            f"{path} is none of what inspect reads: adapters and models in files of safetensors or in folders, and PNG "
            "files that dora-mm sample drew"
        )
    if out is not None and metadata is None:
        raise ValueError("--out belongs to --set-metadata: leave it out")
    if metadata is not None:
        if file is None or targets or base or as_json or header:
            raise ValueError("--set-metadata is for an adapter file, and goes with no other option but --out")
        print(describe_edit(set_metadata(file, parse_entries(metadata), expanded(out) if out else None)))
        return
    if (base or as_json or header) and (file is None or file.suffix.lower() == ".png"):
        raise ValueError(f"--base, --json and --header are for adapter files, and {path} is none: leave them out")
    if file is not None and file.suffix.lower() == ".png":
        print(describe_generated_image(file))
        return
    if file is not None and (text_of := describe_single_file(file, targets)):
        print(text_of)
    elif file is None:
        print(describe_model(resolve_model(path, "MODEL"), targets))
    elif targets is not None:
        raise ValueError(f"--targets is for models, but {file} is an adapter file: leave it out")
    elif as_json:
        print(json.dumps(inspect_file(file, base, values=not header).as_dict(), indent=2))
    else:
        adapter = formats.AdapterFile(file)
        print(describe_adapter(adapter, base), flush=True)  # before the values of a large file are read
        print("values: not read (--header)" if header else describe_values(adapter))


def adapter_file(path: str) -> Path | None:
    """The adapter file of a path: the file itself, or the one in this folder or run directory; None for a model."""
    found = find_path(path)
    if found is None or not found.is_dir():
        return found
    files = (folder / name for folder in (found, found / "adapter") for name in ADAPTERS)
    if file := next((file for file in files if file.is_file()), None):
        return file
    others = any(not file.name.startswith(STEMS) for file in found.glob("*.safetensors"))
    has_model = any((found / name).is_file() for name in (CONFIG, INDEX))
    return formats.find_file(found) if others and not has_model else None


def describe_generated_image(file: Path) -> str:
    """The metadata of a generated image, a line per setting."""
    metadata = read_metadata(file)
    prompt, negative_prompt, seed = metadata.batch[metadata.position]
    model = {f"model {name}": value for name, value in vars(metadata.model).items() if value is not None}
    adapters = {
        f"adapter {number}": f"{adapter.path} at strength {strength_text(adapter.strength)}, SHA-256 {adapter.digest}"
        for number, adapter in enumerate(metadata.adapters, 1)
    }
    first = {"prompt": prompt, "negative prompt": negative_prompt, "seed": seed}
    batch = {"batch": f"image {metadata.position + 1} of {len(metadata.batch)}"}
    groups = (first, metadata.settings, adapters, model, batch, metadata.environment, metadata.circumstances)
    lines = [line for group in groups for line in group.items()]
    return aligned_columns([(name, str(value)) for name, value in lines if value is not None], num_text=2)


# --- adapter files ---------------------------------------------------------------------------------------------------


def describe_adapter(file: formats.AdapterFile, base: str | None = None) -> str:
    """Report on an adapter file: summary, table of adapted modules, ambiguous points, other tensors, metadata."""
    found = inspect_file(file, base, values=False)
    rows, parameters = Counter(), Counter()
    for module in found.modules:
        numbers = ("-" if value is None else f"{value:g}" for value in (module.rank, module.alpha))
        name = leaf(module.path) if module.component else re.sub(r"\d+", "#", module.key)
        row = (module.component or "?", name, module.method, module.axis or "-", *numbers)
        rows[row] += 1
        parameters[row] += module.num_parameters
    table = [("component", "module", "method", "axis", "rank", "alpha", "count", "parameters")]
    table += [(*row, str(count), f"{parameters[row]:,}") for row, count in rows.items()]
    table += [("all", "", "", "", "", "", str(rows.total()), f"{parameters.total():,}")]
    size = file.path.stat().st_size / 1e6
    lines = [f"{shown(file.path, 1000)}: {size:.1f} MB", aligned_columns(summary(found), num_text=2), ""]
    lines += [aligned_columns(table, num_text=4)]
    lines += [f"not clear: {point}" for point in found.ambiguous]
    lines += [f"{len(found.biases)} differences of biases, such as {found.biases[0]}"] if found.biases else []
    lines += [f"embedding of a token: {key} {' x '.join(map(str, file.shape(key)))}" for key in found.tokens]
    lines += [f"beside adapters: {len(found.others)} tensors, such as {found.others[0]}"] if found.others else []
    notes = [f"  {shown(key)}: {shown(value)}" for key, value in found.settings.items()]
    return "\n".join([*lines, *(["metadata", *notes] if notes else [])])


def summary(found: Inspection) -> list[tuple[str, str]]:
    """Summary rows of a file: content, model, tool that made it, damage, and tools that load it."""
    methods = Counter(METHODS.get(module.method, module.method) for module in found.modules)
    ranks = sorted({module.rank for module in found.modules if module.rank is not None})
    components = Counter(module.component or "an unknown network" for module in found.modules)
    what = " and ".join(methods if len(methods) == 1 else (f"{name} ({count})" for name, count in methods.items()))
    size = f" of rank {ranks[0]}" + (f" to {ranks[-1]}" if ranks[1:] else "") if ranks else ""
    where = ", ".join(f"{count} of {name}" for name, count in components.items())
    model = [found.architecture or "unknown: its names are in no table", f"names as in {found.names}"]
    model += [f"base model {shown(found.base_model)}"] if found.base_model else []
    tools = "; ".join(TOOLS[name].title for name in found.works_in)
    return [
        ("what", f"{what}{size}, {len(found.modules)} modules: {where}"),
        ("model", "; ".join(model if found.architecture else model[:1] + model[2:])),
        ("made with", f"{found.made_with or 'unknown'}, in the form of {found.title}"),
        ("damage", "; ".join(found.damage) or "none in the header"),
        ("works in", f"{tools or 'no tool'} as it is; dora-mm verify says what others make of it, and the cure"),
    ]


def describe_edit(done: Edited) -> str:
    """The file, and each entry of its header that is another one now."""
    rows = [("entry", "before", "now")]
    rows += [(key, *(shown(text) if text else "-" for text in both)) for key, both in done.changes.items()]
    return f"written  {shown(done.file, 1000)}\n\n{aligned_columns(rows, num_text=3)}"


def describe_values(file: formats.AdapterFile) -> str:
    """Whether all values are numbers; reads the whole file, with a bar."""
    if damaged := file.not_finite():
        return f"values: {len(damaged)} tensors have some that are NaN or infinite, such as {damaged[0]}"
    return "values: all are finite"


# --- models ----------------------------------------------------------------------------------------------------------


def describe_single_file(file: Path, only: str | None) -> str | None:
    """As `describe_model`, and what it predicts, of a whole image model in one file; None for other files."""
    if file.suffix != ".safetensors" or not file.is_file() or is_adapter(file):  # a pipe would never end
        return None
    from dora_mm.models.images.families import about_prediction, family_of_file  # loads diffusers

    family = family_of_file(file)
    if family is None or family.single_file is None:
        return None
    networks = describe_model(str(family.single_file.configs), only, str(file))
    return f"{about_prediction(ModelConfig(path=str(file)))}\n\n{networks}"


def describe_model(path: str, only: str | None, name: str | None = None) -> str:
    """A section for each network of a model that has a target map, and the names of those that have none.

    Args:
        path: The folder or hub name of the model.
        only: The only target map to show, in the networks of a pipeline that it is for, or a pattern; None shows all.
        name: What it is called, if not by its path.

    Raises:
        ValueError: There is no map `only`, or it is for no network; or `path` is no model, or one without a map.
    """
    wanted = NAME if only in DERIVED else only
    given = TargetMap(wanted, {wanted: (wanted,)}) if wanted and wanted.startswith(REGEX) else None
    if wanted not in (None, NAME) and not given:
        find(wanted)
    networks = networks_of(path)
    if "" in networks:
        model = networks[""].build()
        targets = given or (find(wanted, model) if wanted else map_of_network(networks[""], model))
        return describe_network(path, networks[""], model, targets)
    sections, without = [], []
    for component, network in networks.items():
        try:
            model = network.build()
            targets = given if given and parts_in(model, given) else map_of(model)
        except ValueError:
            without.append(f"{component} ({network.kind})")
            continue
        if wanted in (None, targets.name):
            sections.append(describe_network(f"{name or path} {component}", network, model, targets))
    if not sections:
        which = f"the target map {only}" if only else "a target map"
        has = ", ".join(networks) or "none"
        raise ValueError(f"no network of {name or path} with a config.json has {which}: it has {has}")
    if without and not only:
        sections.append(f"without a target map: {', '.join(without)}")
    return "\n\n".join(sections)


def map_of_network(network: Network, model: nn.Module) -> TargetMap:
    try:
        return map_of(model)
    except ValueError as error:
        raise ValueError(
            f"{network.path} is a {network.kind}: {error}; to try a map, name it with --targets"
        ) from error


def describe_network(title: str, network: Network, model: nn.Module, targets: TargetMap) -> str:
    """The modules that all parts of a map take together, the parts, and what the default ones would train."""
    num_base = sum(parameter.numel() for parameter in model.parameters())
    others = [about_left_out(model, match_modules(model, targets))] if targets.name == NAME else []
    model.requires_grad_(False)  # or the report has advice on what else is trained
    report = inject(model, targets.select(parts_in(model, targets) or None), DoRASpec(rank=RANK, alpha=RANK))
    others += [line] if (line := about_experts(model)) else []
    default = tuple(targets.select().parts)
    trainable = sum(module.num_parameters for module in report.modules if module.part in default)
    total = num_base + trainable
    share = f"trainable {trainable:,} of {total:,} parameters ({100 * trainable / total:.3f} %)"
    source = "target map derived from its structure," if targets.name == NAME else f"target map {targets.name}"
    head = f"{title}: {network.kind}, {source} at rank {RANK}"
    table = table_of_parts(report, targets)
    return "\n".join([head, str(report), *others, "", table, f"by default ({', '.join(default)}): {share}"])


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
