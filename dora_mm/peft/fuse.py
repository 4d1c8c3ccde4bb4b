"""The line: which adapters of a model run fused, which stay PEFT's, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import peft
from peft.tuners.lora import variants
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn

from dora_mm import backend
from dora_mm.peft.layers import (
    FusedConv1d,
    FusedConv2d,
    FusedConv3d,
    FusedDoRA,
    FusedEmbedding,
    FusedLinear,
    PassTensors,
    drops,
    has_zero_rows,
    read,
    small_passes,
)

TESTED = (0, 18), (0, 21)  # the oldest and the newest release of PEFT whose variants are known to be the same
FUSED = {
    variants.DoraLinearVariant: FusedLinear,
    variants.DoraEmbeddingVariant: FusedEmbedding,
    variants.DoraConv1dVariant: FusedConv1d,
    variants.DoraConv2dVariant: FusedConv2d,
    variants.DoraConv3dVariant: FusedConv3d,
}
KNOWN = {f"peft.tuners.lora.layer.{name}" for name in ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d")} | {
    f"peft.tuners.lora.{name}" for name in ("bnb.Linear4bit", "bnb.Linear8bitLt", "torchao.TorchaoLoraLinear")
}
NO_DORA = "LoRA without DoRA costs as little already (DoRA is use_dora=True in LoraConfig)"
PARAMETER = "LoRA of parameters, for which PEFT has no DoRA (dora_mm.inject has one for stacked experts)"
DROPOUT = "lora_dropout, which about doubles the cost of a training step: set it to 0 if you can"
Adapters = list[tuple[str, str]]


@dataclass
class FuseReport:
    """The result of `fuse_peft`; `str()` is a summary. An adapter is the path of its layer and its name.

    Attributes:
        fused: The adapters that run fused.
        with_dropout: Those of them that drop entries of their inputs in training.
        at_times: Adapters among these that run PEFT's own code in some passes, by the current reason.
        stock: The other adapters, which stay PEFT's, by the reason.
    """

    fused: Adapters = field(default_factory=list)
    with_dropout: Adapters = field(default_factory=list)
    at_times: dict[str, Adapters] = field(default_factory=dict)
    stock: dict[str, Adapters] = field(default_factory=dict)

    def __str__(self) -> str:
        stock = [
            f"{shown(some)} {'stays' if len(some) == 1 else 'stay'} PEFT's: {why}" for why, some in self.stock.items()
        ]
        if not self.fused:
            return "\n".join(f"nothing to fuse: {line}" for line in stock)
        lines = [f"DoRA runs fused in {shown(self.fused)}"]
        lines += [f"  {shown(some)} of these: PEFT's own code runs {why}" for why, some in self.at_times.items()]
        if self.with_dropout:
            lines.append(f"  {shown(self.with_dropout)} of these have {DROPOUT}")
        return "\n".join([*lines, *stock, "Adapters that are added later stay PEFT's until fuse_peft is called again."])


def shown(adapters: Sequence[tuple[str, str]]) -> str:
    """How many layers, and by the last names of their paths; by the last two where one name has several parents."""
    last = [tuple(path.split(".")[-2:]) for path, _ in adapters]
    parents = {name: {each[0] for each in last if each[-1] == name} for *_, name in last}
    ambiguous = {name for name, own in parents.items() if name.isdigit() or len(own) > 1}
    names = Counter(".".join(each) if each[-1] in ambiguous else each[-1] for each in last)
    text = ", ".join(f"{count} {name}" for name, count in names.items())
    return f"{len(adapters)} layer{'s' * (len(adapters) != 1)}" + (f" ({text})" if text else "")


def fuse_peft(model: nn.Module) -> FuseReport:
    """Makes DoRA in the layers of PEFT cost nearly what LoRA does, in any model that PEFT has adapted, in place.

    Outputs and gradients are PEFT's up to rounding, and rows of zeros stay finite. Parameters, state dicts, files and
    all that PEFT does with its layers stay as they are. To call it again is harmless, and forgets the norms that
    passes in eval mode have kept.

    Args:
        model: A PeftModel, or a model with adapters of `add_adapter` of transformers or diffusers.

    Returns:
        Which adapters run fused, and why others do not; `print` shows it.

    Raises:
        ValueError: PEFT is older or newer than what this was tested with, or has adapted no layer of the model. The
            model is then unchanged.
    """
    check_version(peft.__version__)
    report, adapters = FuseReport(), list(adapters_of(model))
    if not adapters:
        raise ValueError("fuse_peft found no layer with a LoRA of PEFT in this model: add the adapter before")
    backend.select("auto")
    for path, layer, name in adapters:
        variant = layer.lora_variant.get(name)
        if why := why_stock(layer, name, variant):
            report.stock.setdefault(why, []).append((path, name))
            continue
        if not isinstance(variant, FusedDoRA):
            layer.lora_variant[name] = variant = FUSED[type(variant)]()
        variant.kept = None
        report.fused.append((path, name))
        now = read(layer, name)
        if isinstance(now, PassTensors) and (passes := small_passes(now)):
            variant.has_zero_rows = has_zero_rows(now)
            now = now if variant.has_zero_rows else passes
        if drops(layer, name):
            report.with_dropout.append((path, name))
        if isinstance(now, str):
            report.at_times.setdefault(now, []).append((path, name))
    return report


def unfuse_peft(model: nn.Module) -> int:
    """Gives the layers of PEFT its own passes back: what `fuse_peft` did is undone.

    Args:
        model: The model.

    Returns:
        The number of adapters that ran fused.
    """
    stock, found = {ours: theirs for theirs, ours in FUSED.items()}, list(fused_of(model))
    for layer, name in found:
        layer.lora_variant[name] = stock[type(layer.lora_variant[name])]()
    return len(found)


def adapters_of(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """The path, the layer and the name of every adapter of PEFT's LoRA in a model.

    Of parameters the path is their own. PEFT nests the layers of several parameters of a module: `experts` is outside
    of `experts.base_layer`.
    """
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            if isinstance(layer, ParamWrapper):
                path = f"{path.replace('.base_layer', '')}.{layer.parameter_name}"
            for name in (*layer.lora_A, *layer.lora_embedding_A):
                yield path, layer, name


def fused_of(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """The layer and the name of every adapter that runs fused."""
    for _, layer, name in adapters_of(model):
        if isinstance(layer.lora_variant.get(name), FusedDoRA):
            yield layer, name


def why_stock(layer: Any, name: str, variant: Any) -> str | None:
    """The reason why an adapter with this variant stays PEFT's, or None."""
    kind = type(layer)
    if isinstance(layer, ParamWrapper):
        return PARAMETER
    if variant is None:
        return NO_DORA
    if type(variant) not in FUSED and not isinstance(variant, FusedDoRA):
        return f"{type(variant).__name__} is another method"
    if f"{kind.__module__}.{kind.__name__}" not in KNOWN:
        return f"the class {kind.__name__} is not known here"
    if getattr(layer.get_base_layer(), "groups", 1) > 1:
        return "PEFT's norm of a convolution with groups is not that of its weight"
    return None


def check_version(version: str) -> None:
    """Raises ValueError for a release of PEFT whose variants may be others."""
    if not TESTED[0] <= tuple(map(int, version.split(".")[:2])) <= TESTED[1]:
        oldest, newest = (".".join(map(str, release)) for release in TESTED)
        raise ValueError(
            f"fuse_peft works with PEFT {oldest} to {newest}, and this is {version}: install one of these, or train "
            "with PEFT's own layers"
        )
