"""Fine-tune diffusion and vision-language models with DoRA.

Public names are loaded on first use, so that `import dora_mm` costs next to nothing.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from dora_mm.core import (
        DoRASpec,
        InjectReport,
        TargetMap,
        adapter_parameters,
        fixed_parameters,
        merge,
        remove,
        unmerge,
    )
    from dora_mm.formats.commands.combine import combine
    from dora_mm.formats.commands.convert import convert
    from dora_mm.formats.commands.extract import extract
    from dora_mm.formats.commands.verify import verify
    from dora_mm.peft import FusePeft, fuse_peft, unfuse_peft

__version__ = "0.1.0"
__all__ = [
    "DoRASpec",
    "FusePeft",
    "TargetMap",
    "adapter_parameters",
    "combine",
    "convert",
    "extract",
    "fixed_parameters",
    "fuse_peft",
    "inject",
    "load_adapter",
    "merge",
    "remove",
    "save_adapter",
    "set_strength",
    "unfuse_peft",
    "unmerge",
    "verify",
]
_COMMANDS = ("combine", "convert", "extract", "verify")
_ELSEWHERE = {name: f"dora_mm.formats.commands.{name}" for name in _COMMANDS}
_ELSEWHERE |= dict.fromkeys(("FusePeft", "fuse_peft", "unfuse_peft"), "dora_mm.peft")
_FROM_CORE = frozenset(__all__) - {"inject", "load_adapter", "save_adapter", "set_strength"} - _ELSEWHERE.keys()


def __getattr__(name: str) -> Any:
    if name not in _FROM_CORE and name not in _ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_ELSEWHERE.get(name, "dora_mm.core")), name)
    globals()[name] = value
    return value


def inject(
    model: nn.Module,
    targets: str | TargetMap | Sequence[str],
    spec: DoRASpec,
    *,
    parts: Sequence[str] | None = None,
    backend: str = "auto",
    seed: int = 0,
) -> InjectReport:
    """Adapts the modules of `model` that `targets` selects, in place.

    The weights of the adapted modules are frozen (trained, with method `full`); every other `requires_grad` is left as
    it is. A fresh adapter does not change the output: B is 0 and the magnitude is the row norm of the weight.

    Args:
        model: The model. Linear layers, convolutions, embeddings, transformers' Conv1D, the projections of
            nn.MultiheadAttention and quantised Linear layers can be adapted.
        targets: The name of a target map ("sdxl-unet"), a TargetMap, or a list of patterns. A plain pattern is a dotted
            suffix of the module's path (`to_out.0`); `re:` marks a regular expression that matches the full path.
        spec: Rank, alpha, method and the other settings of the adapters.
        parts: The parts of the target map to adapt; None selects its default parts.
        backend: "auto", "torch" or "triton": which implementation the adapted layers run.
        seed: A is sampled from this seed and the path of the module.

    Returns:
        The adapted modules and their numbers of parameters; `print` shows them as a table.

    Raises:
        ValueError: There is no such target map, part or backend; a pattern matches nothing, or a module that cannot be
            adapted or is adapted already; or a block holds a different number of modules than the map expects. The
            model is then unchanged.
    """
    from dora_mm import backend as backends
    from dora_mm import core
    from dora_mm import targets as maps

    chosen = maps.find(targets, model) if isinstance(targets, str) else targets
    if isinstance(chosen, core.TargetMap):
        chosen = chosen.select(parts)
    elif parts is not None:
        raise ValueError("parts select from a target map, but targets is a list of patterns: leave parts out")
    return core.inject(model, chosen, spec, forward=backends.select(backend), seed=seed)


def save_adapter(
    model: nn.Module | Mapping[str, nn.Module],
    folder: str | Path,
    *,
    format: str | None = None,
    metadata: Mapping[str, str] | None = None,
    extra_parameters: Sequence[str] = (),
    strength: float = 1.0,
) -> Path:
    """Saves the adapter of a model as a safetensors file, with a model card (README.md) next to it.

    A README.md that a person has written or changed is kept. Trainable parameters that are neither in the adapter nor
    named in `extra_parameters` are not saved: a warning names them.

    Where FSDP2 has sharded the model, every process has to call this, and the first one writes.

    Args:
        model: The adapted model, or a mapping of components such as {"unet": ..., "text_encoder": ...,
            "text_encoder_2": ...} or {"transformer": ...}. The component of a single model follows from its class where
            it is a network of a diffusers pipeline; of other classes, "diffusers" needs the name.
        folder: The folder to write to; it is created where it does not exist.
        format: "diffusers" (read by diffusers' `load_lora_weights`), "peft" (read by `PeftModel.from_pretrained`, for a
            single model), or "native", our own, which holds any method on any layer. None: "diffusers" for networks of
            its pipelines and for a mapping of components; for other models "peft", or "native" where PEFT cannot hold
            the adapter.
        metadata: Additional entries for the header of the file. The model card has those that are called `base_model`,
            `base_revision`, `instance_prompt`, `license`, `pipeline_tag`, `day` and `config`.
        extra_parameters: Names of parameters that were trained in addition to the adapters (biases, norms), for "peft"
            and "native" and a single model.
        strength: The strength of the adapter that becomes strength 1 in the file, for every tool that reads it. The
            strength set by `set_strength` has no effect on the file.

    Returns:
        The path of the file.

    Raises:
        ValueError: There is no such format, the component of a single model is unknown, no layer is adapted, a layer
            holds several adapters, a key of `metadata` is reserved, or the format cannot hold what was trained.
    """
    from dora_mm import formats

    return formats.save(
        model,
        Path(folder),
        format=format,
        metadata=metadata or {},
        extra_parameters=extra_parameters,
        strength=strength,
    )


def load_adapter(
    model: nn.Module | Mapping[str, nn.Module],
    path: str | Path,
    *,
    strength: float | Mapping[str, float] = 1.0,
    name: str = "default",
    backend: str = "auto",
) -> InjectReport:
    """Loads an adapter file into a model.

    The model must have the base weights that the adapter was trained on. A file of `save_adapter` has some of them, and
    a warning says if those of the model are far from them; those of a model that was trained further are not.

    New tokens of a file belong to a pipeline with its tokenizers, not to a network: a warning says that they are left.
    Base modules are adapted as the file specifies. Modules that are adapted already must match the file, unless `name`
    is new: the adapter is then stacked on the existing ones, and their updates add up, each with its own strength.
    Extra trainable parameters in the file (biases, norms) replace those of the model: they have no strength other than
    1, cannot be stacked, and `remove` does not restore the previous values.

    Args:
        model: The model, or a mapping of components such as {"unet": ..., "text_encoder": ...}. A single model takes
            the component that its class tells, or else the only one in the file.
        path: The adapter file, or the folder that holds it. The format is detected.
        strength: The strength of the loaded adapter: 0 is the base model, 1 the adapter as it was saved. Or numbers by
            part and block, such as {"unet.down": 0.5, "text_encoder": 0}: the first pieces of the modules' names, of
            which the longest counts; the other modules get 1. `down`, `mid` and `up` stand for `down_blocks`,
            `mid_block` and `up_blocks`. With a single model the component may be left out.
        name: The name of the adapter, by which `set_strength` selects it.
        backend: "auto", "torch" or "triton": which implementation the adapted layers run.

    Returns:
        The adapted modules and their numbers of parameters; `print` shows them as a table.

    Raises:
        ValueError: There is no adapter file, it is damaged, it was made for a different architecture, or it has missing
            or surplus keys. The model is then unchanged.
    """
    from dora_mm import backend as backends
    from dora_mm import formats

    file = formats.AdapterFile(Path(path))
    report = formats.load(model, file, strength=strength, name=name, forward=backends.select(backend))
    if file.tokens:
        logging.getLogger(__name__).warning("%s: its new tokens (%s) are not loaded", path, ", ".join(file.tokens))
    return report


def set_strength(model: nn.Module, strength: float | Mapping[str, float], *, name: str | None = None) -> None:
    """Sets the strength t of the adapters: the weight of a layer is then W0 + t (W' - W0).

    Args:
        model: The adapted model.
        strength: t, any finite number: 0 is exactly the base model, 1 the trained one. Or numbers by part and block,
            such as {"down": 0.5, "up.1": 0}: see `load_adapter`.
        name: The adapter whose strength is set, where several are loaded; None sets the strength of all.

    Raises:
        ValueError: The strength is not a finite number, or names a part without adapted modules; or the model has no
            adapted layer or no adapter of that name, is merged, or was trained with method `full`, which has no
            strength. It is then unchanged.
    """
    from dora_mm import core
    from dora_mm import targets as maps

    core.set_strength(model, strength, name=name, short=maps.SHORT_NAMES)
