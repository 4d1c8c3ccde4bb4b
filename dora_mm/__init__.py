"""Fine-tune diffusion and vision-language models with DoRA.

Everything public is loaded when it is first used, so that `import dora_mm` costs next to nothing.
"""

from __future__ import annotations

import importlib
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
        set_strength,
        unmerge,
    )

__version__ = "0.1.0"
__all__ = [
    "DoRASpec",
    "TargetMap",
    "adapter_parameters",
    "fixed_parameters",
    "inject",
    "load_adapter",
    "merge",
    "remove",
    "save_adapter",
    "set_strength",
    "unmerge",
]
_FROM_CORE = frozenset(__all__) - {"inject", "load_adapter", "save_adapter"}


def __getattr__(name: str) -> Any:
    if name not in _FROM_CORE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module("dora_mm.core"), name)
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
    """Adapts the modules of `model` that `targets` takes, in place; `print` the report for a table of them.

    targets: the name of a map ("sdxl-unet"), a TargetMap, or a list of patterns (`to_out.0` is a dotted suffix, `re:`
        marks a regular expression for the whole path). parts: which parts of a map, its default ones if None.
    seed: A is drawn from it and the module's path.
    Raises ValueError, and changes nothing, when a pattern matches nothing or a count differs from the map's.
    """
    from dora_mm import backend as backends
    from dora_mm import core
    from dora_mm import targets as maps

    chosen = maps.find(targets) if isinstance(targets, str) else targets
    if isinstance(chosen, core.TargetMap):
        chosen = chosen.select(parts)
    elif parts is not None:
        raise ValueError("parts choose from a target map, and targets is a list of patterns")
    return core.inject(model, chosen, spec, forward=backends.select(backend), seed=seed)


def save_adapter(
    model: nn.Module | Mapping[str, nn.Module],
    folder: str | Path,
    *,
    format: str = "diffusers",
    metadata: Mapping[str, str] | None = None,
    extra_parameters: Sequence[str] = (),
    strength: float = 1.0,
) -> Path:
    """Writes the adapter of a UNet, or of {"unet": ..., "text_encoder": ..., "text_encoder_2": ...}; returns the file.

    format: "diffusers" (what `load_lora_weights` reads), "peft" (what `PeftModel.from_pretrained` reads, of one model),
        or "full" for weights trained by method full.
    metadata: further entries of the file's header.
    extra_parameters: names of parameters that were trained beside the adapters (biases, norms), for "peft" and "full".
    strength: which strength of the adapter is 1 in the file, for every tool; what is set at the moment plays no role.
    """
    from dora_mm import formats

    components, folder = _components(model), Path(folder)
    return formats.save(
        components, folder, format=format, metadata=metadata or {}, extra_parameters=extra_parameters, strength=strength
    )


def load_adapter(
    model: nn.Module | Mapping[str, nn.Module],
    path: str | Path,
    *,
    strength: float = 1.0,
    name: str = "default",
    backend: str = "auto",
) -> InjectReport:
    """Loads an adapter file (or the folder it is in) into a UNet, or {"unet": ..., "text_encoder": ...}.

    Bare modules are adapted as the file says; modules that are adapted already must match it, unless `name` is a new
    one: then the adapter is stacked upon the others, and their updates add up, each by its own strength. Parameters
    that the file holds beside its adapters (biases, norms) replace the model's own: they have no strength but 1, are
    not stacked, and `remove` does not bring the old ones back. Raises ValueError, and changes nothing, when the file
    was made for another architecture or has missing or surplus keys.
    """
    from dora_mm import backend as backends
    from dora_mm import formats

    return formats.load(_components(model), Path(path), strength=strength, name=name, forward=backends.select(backend))


def _components(model: nn.Module | Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return dict(model) if isinstance(model, Mapping) else {"unet": model}
