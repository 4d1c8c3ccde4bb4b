"""A DoRA from two checkpoints: the adapter that brings a base model closest to a model that was fine-tuned from it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dora_mm import formats
from dora_mm.core.spec import DoRASpec
from dora_mm.formats.adapter_file import located
from dora_mm.formats.algebra.fit import distance, fitted_adapter
from dora_mm.formats.commands.convert import convert
from dora_mm.formats.commands.export_check import check_peft_takes
from dora_mm.formats.files.base_weights import BaseWeights
from dora_mm.formats.files.checks import is_finite
from dora_mm.formats.naming.names import Name
from dora_mm.formats.naming.spellings import Names
from dora_mm.formats.tools import all_exports, export_of
from dora_mm.formats.tools.tool import Written, write_file
from dora_mm.utils.atomic import already_there
from dora_mm.utils.folders import is_free, partial_folder, written_together
from dora_mm.utils.progress import tracked

HEADER_BYTES = 4096  # of a module, more than its keys and settings need
_EMBEDDINGS = re.compile(
    r"(^|\.)(\w*embed_(tokens|positions)|(token|position)_embedding|shared|wte|wpe|\w+_embeddings)$"
)


@dataclass(frozen=True)
class Extraction:
    """The result of `extract`.

    Attributes:
        files: The adapter file, or both of ComfyUI's.
        errors: By module: ||W_adapter - W'|| / ||W' - W0||.
        overall: The same over all these modules.
        num_unchanged: The modules that are the same in both models.
        left_out: The modules that differ and that an adapter cannot hold: norms, embeddings, stacked weights.
        usage: Instructions for loading the files; empty where there are none.
    """

    files: tuple[Path, ...]
    errors: Mapping[Name, float]
    overall: float
    num_unchanged: int
    left_out: tuple[Name, ...]
    usage: str = ""


def extract(
    tuned: str | Path,
    base: str | Path,
    target: str | Path,
    *,
    rank: int,
    to: str | None = None,
) -> Extraction:
    """Writes the DoRA of a rank that comes closest to a fine-tuned model: see `fit.fitted_adapter`.

    Weights are read one at a time. Biases are not looked at.

    Args:
        tuned: The fine-tuned model: a folder of a pipeline or of one network, a single-file checkpoint, or a hub name.
        base: The model that it was fine-tuned from, in any of these forms.
        target: A new file where it ends in `.safetensors`, else a new folder.
        rank: R; modules with fewer rows or columns get a smaller one.
        to: An export format of `convert`; None: diffusers for the networks of a pipeline, else PEFT.

    Returns:
        The file, and how far off the adapter is.

    Raises:
        ValueError: A model cannot be read, the two have different modules or are the same, the rank is below 1, or
            the target exists or cannot hold the adapter. Nothing is written then.
    """
    if rank < 1:
        raise ValueError(f"the rank must be at least 1, not {rank}")
    if to not in (None, *all_exports(), "comfy"):
        raise ValueError(f"there is no export format {to!r}: use one of {', '.join(all_exports())}, comfy")
    target = Path(target)
    if not is_free(target):
        raise already_there(target)
    new, old = BaseWeights.open(tuned), BaseWeights.open(base)
    check_same_architecture(new, old)
    changed, left_out = changed_modules(new, old)
    if not changed:
        raise ValueError(f"{new.source} and {old.source} have the same weights, so there is nothing to extract")
    own = "peft" if all(name.component == "model" for name in changed) else "diffusers"
    if own == "peft":
        with located(str(new.source)):
            check_peft_takes(old, changed, "dora")
    about = {"base_model": str(base), "extracted_from": str(tuned)}
    if to in (None, own):
        file = target if target.suffix == ".safetensors" else target / export_of(own).file_name
        files, usage = (file,), ""
        with written_together(file.parent, last=file.name) as folder:
            errors = _write(folder / file.name, new, old, changed, own, rank, about)
            if file.name == export_of(own).file_name and is_free(file.parent):
                formats.write_model_card(folder)
    else:
        existing = next(parent for parent in target.absolute().parents if parent.is_dir())
        with partial_folder(existing / "extracted") as folder:  # on the disk that has the room
            found = folder / export_of(own).file_name
            errors = _write(found, new, old, changed, own, rank, about)
            try:
                done = convert(found, target, to=to, base=base)
                files, usage = done.files, done.usage
            except ValueError as error:  # it names the file, which nobody has seen
                raise ValueError(str(error).replace(str(found), str(target))) from error
    overall = math.hypot(*(e * s for e, s in errors.values())) / math.hypot(*(s for _, s in errors.values()))
    num_unchanged = len(new) - len(changed) - len(left_out)
    return Extraction(files, {n: e for n, (e, _) in errors.items()}, overall, num_unchanged, tuple(left_out), usage)


def check_same_architecture(tuned: BaseWeights, base: BaseWeights) -> None:
    """Checks that a base model has every module of a tuned one, in the same shape, and no other in these networks.

    Raises:
        ValueError: It does not; the message has the first module.
    """
    components = {name.component for name in tuned}
    for one, other in ((tuned, base), (base, tuned)):
        missing = [name for name in one if name.component in components and name not in other]
        if missing:
            raise ValueError(f"{tuned.source} was not fine-tuned from {base.source}: only one of them has {missing[0]}")
    for name in tuned:
        if tuned.shape(name) != base.shape(name):
            shapes = f"{tuned.shape(name)} and {base.shape(name)}"
            raise ValueError(f"{tuned.source} was not fine-tuned from {base.source}: {name} has the shapes {shapes}")


def changed_modules(tuned: BaseWeights, base: BaseWeights) -> tuple[list[Name], list[Name]]:
    """The modules whose weights differ: those that an adapter can hold, and the others. Rounding is no difference."""
    changed, left_out = [], []
    for name in tracked(tuned, "comparing", "modules"):
        W, W0 = tuned[name], base[name]
        coarser = min(W.dtype, W0.dtype, key=lambda dtype: -torch.finfo(dtype).eps)
        if not torch.equal(W.to(coarser), W0.to(coarser)):
            has_layer = base.has_module(name) and name not in base.experts  # PEFT has no DoRA of stacked experts
            can_hold = W.dim() >= 2 and not _EMBEDDINGS.search(name.path) and has_layer
            (changed if can_hold else left_out).append(name)
    return changed, left_out


def _write(
    file: Path,
    tuned: BaseWeights,
    base: BaseWeights,
    names: list[Name],
    form: str,
    rank: int,
    about: dict[str, str],
) -> dict[Name, tuple[float, float]]:
    """Writes the adapter in a form, and returns for each module the error and ||W' - W0||."""
    export, errors = export_of(form), {}

    def modules() -> Iterator[tuple[str, tuple[Name], DoRASpec, dict[str, Tensor]]]:
        for name in tracked(names, "extracting", "modules"):
            W, W0 = tuned[name].float(), base[name].float()
            for path, tensor in (("tuned", W), ("base", W0)):
                if not is_finite(tensor):
                    raise ValueError(f"{name} of the {path} model has values that are NaN or infinite")
            layer = fitted_adapter(W, W0, rank)
            off, size = distance(layer, W, W0)
            errors[name] = off / size, size
            (module,) = Names().write([name], export.spelling)
            yield module, (name,), layer.spec, export.tensors(module, layer, W0)

    write_file(Written(export, file), modules(), about, room=HEADER_BYTES * (len(base) + 1))
    return errors
