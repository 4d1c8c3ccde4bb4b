"""dora-mm merge: an adapter and its base model as one plain folder, for all programs that can load the base model."""

import gc
import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

import dora_mm
from dora_mm import formats
from dora_mm.adapting.files import check_identity, saved_config
from dora_mm.config.models import VLMModelConfig
from dora_mm.config.paths import check_folder, resolve_adapter, resolve_model
from dora_mm.models.folders import saved_dtype, write_copy
from dora_mm.models.probe import Probe, checked_config, largest_difference, load_probe
from dora_mm.models.vl.vlm.saved_limits import write_limits
from dora_mm.utils.digest import module_digest
from dora_mm.utils.folders import written_at_once
from dora_mm.utils.home import expanded
from dora_mm.utils.progress import Progress
from dora_mm.utils.shell import command_line

BOUND = 1e-4  # of the largest logit: how far merging in float32 may move any of them
FRAMES = ("fps", "max_frames")  # of videos, which processors choose in other ways


def main(model: str, adapter: str, out: str, *, dtype: str | None = None, revision: str | None = None) -> None:
    """Merges an adapter into a vision-language or language model of transformers, and writes a new folder.

    The logits of a small input are compared: those of the merged model with those of the adapted one before anything is
    written, and those of the written model, loaded again, before its folder gets its name. All runs on the CPU.

    Args:
        model: A folder of `save_pretrained`, or a hub name.
        adapter: A run directory, or an adapter's folder or file.
        out: The new folder.
        dtype: The dtype of the new weights; None: that of the model's config.
        revision: A commit, branch or tag of a hub model; None: its main branch.

    Raises:
        ValueError: The model or the adapter cannot be used, they do not belong together, the folder exists, or merging
            would change what the model computes. Nothing is written then.
    """
    path, file = resolve_model(model, "MODEL"), formats.find_file(resolve_adapter(adapter, "ADAPTER"))
    formats.AdapterFile(file)  # what is no adapter that is read is said before a model is loaded
    folder = new_folder(out)
    config = checked_config(path, revision)
    dtype = dtype or saved_dtype(path, config)
    base = load_probe(path, revision, dtype)
    logits = merge(base, file, dtype)
    with written_at_once(folder) as partial:
        with Progress(f"writing {out}"):
            write_copy(base.model, base.folder, partial)
        digest = module_digest(base.model)
        del base  # the memory may not hold two models, and modules refer to each other
        gc.collect()
        check_written(partial, dtype, digest, logits)
        run = saved_config(file)
        section = run.model if run and isinstance(run.model, VLMModelConfig) else None
        sizes = write_limits(partial, section) if section else {}
    print(f"written  {folder}, and loaded again: its logits are those of the merged model")
    print(f"serve    {command_line('vllm', 'serve', folder)}, if vLLM supports this model")
    if sizes:
        print(f"images   {listed(sizes)}, as in the training: the processor's files of {folder} have it")
    if section and (frames := {key: found for key in FRAMES if (found := getattr(section, key))}):
        print(f"note     trained with {listed(frames)}, which no file of {folder} says: set it where you ask")


def new_folder(out: str) -> Path:
    """The new folder.

    Raises:
        ValueError: It exists, or cannot be made.
    """
    check_folder(out, "OUT", must_be_new=False)
    folder = expanded(out)
    if folder.exists():
        raise ValueError(f"OUT {folder} exists already: name a new folder")
    return folder


def merge(base: Probe, file: Path, dtype: str) -> Tensor:
    """Merges an adapter file into a model, and leaves no adapter in it.

    Returns:
        The logits of the merged model.

    Raises:
        ValueError: The file belongs to another model, or the merged model computes something else.
    """
    state, metadata = formats.read(file)
    check_identity(file.parent, metadata, base.identity)
    dora_mm.load_adapter(base.model, file, backend="torch")
    with Progress("merging"):
        adapted = base.logits()
        report = dora_mm.merge(base.model, keep_base=False)
        dora_mm.remove(base.model)
        merged = base.logits()
    difference = largest_difference(adapted, merged)
    check_merged(file, difference, dtype)
    num_extra = sum(map(len, state.parameters.values()))
    print(f"merged   {report.num_modules} modules and {num_extra} other parameters of {file} in {dtype}")
    print(f"logits   differ from those of the adapted model by at most {difference:.1e} of the largest one")
    if dtype != "float32":
        print(f"rounding keeps {min(report.surviving_share, 1):.2%} of the update")  # nearly 1 may lie above it
    return merged


def check_merged(file: Path, difference: float, dtype: str) -> None:
    """Raises ValueError where merging changed what a model computes by more than rounding can."""
    if not math.isfinite(difference):
        raise ValueError(f"{file}: logits are not finite in {dtype}, so nothing was written: try --dtype float32")
    if dtype == "float32" and difference > BOUND:
        raise ValueError(
            f"{file}: merging changes the logits by {difference:.1e} of the largest one, and rounding explains no more "
            f"than {BOUND:.0e}, so nothing was written: an adapted module computes in another way than by its weight"
        )


def check_written(folder: Path, dtype: str, digest: str, logits: Tensor) -> None:
    """Raises RuntimeError where a folder does not hold the merged weights, or gives other logits."""
    found = load_probe(str(folder), None, dtype)
    if module_digest(found.model) != digest or not found.logits().equal(logits):
        raise RuntimeError(f"the {type(found.model).__name__} that was written is not the one that was merged")


def listed(values: Mapping[str, float]) -> str:
    """Keys of a config with their values."""
    return ", ".join(f"{key} {value}" for key, value in values.items())
