"""Compares the weights that a tool will compute from an adapter file with those that the file means."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_mm.formats.adapter_file import AdapterFile, located
from dora_mm.formats.algebra.exact import fitted
from dora_mm.formats.algebra.fused import stack_rows
from dora_mm.formats.commands.cure import cure
from dora_mm.formats.commands.loading import Load, load_of, without
from dora_mm.formats.commands.weight_errors import ToolLoad, WeightErrors, is_read, weight_errors
from dora_mm.formats.files.base_weights import BaseWeights
from dora_mm.formats.naming.names import ModuleGroup, Name, architecture_of
from dora_mm.formats.naming.spellings import Names
from dora_mm.formats.reader import LayerReader, check_headers
from dora_mm.formats.state import LayerState
from dora_mm.formats.tools import peft_loading, tool_of
from dora_mm.formats.tools.formulas import Computation, axis_of_shape
from dora_mm.formats.tools.parts import Parts
from dora_mm.formats.tools.peft import PREFIX
from dora_mm.registries.tools import TOOLS, no_entry, other_tools, tool_called
from dora_mm.utils.json_text import finite
from dora_mm.utils.progress import tracked

RIGHT, REFUSED, IGNORED, NO_MAGNITUDE = "right", "refused", "not known to this tool", "loses the magnitude"
WRONG_AXIS, FAILS, NOT_FINITE, DIFFERS = "wrong axis", "fails", "not finite", "differs"
NOT_FOUND = "not in the base"
LOADED = (RIGHT, WRONG_AXIS, DIFFERS)  # with the magnitude
TEXT_OF = "sdxl"  # of which text encoders alone are taken to be


@dataclass(frozen=True)
class LayerVerdict:
    """The comparison of one module: the weight that a tool computes with the one that the file means.

    Attributes:
        module: The module's name in the file.
        finding: `right`, `refused` (the tool loads nothing of the file), `not known to this tool` (by its name or its
            tensors, and ignored), `loses the magnitude`, `wrong axis`, `fails` (the tool raises an error at this
            module), `not finite` (W_tool or W' is not, or its norms), `not in the base` (a tool ignores it or raises
            an error), or `differs`.
        error: ||W_tool - W'|| / ||W' - W0||; infinite where the tool raises an error, NaN where there is no number.
        reason: Why it differs or is refused, as the end of a sentence that begins with the tool's name; else empty.
    """

    module: str
    finding: str
    error: float
    reason: str = ""


@dataclass(frozen=True)
class Verdict:
    """The comparison of an adapter file, as a tool computes it, with what the file means.

    Attributes:
        tool: One of `other_tools`.
        title: The tool's name.
        error: The relative error of W' - W0 over all modules that the base has.
        layers: The modules, in the order of the file.
        note: Parts of the file that were not compared, for the reader; empty where there are none.
        version: The version of the tool that is judged.
        usage: The settings to make in the tool; empty where there are none.
        cure: The options of `dora-mm convert` for a file that it computes right; empty where it does that of this file,
            or where there are none.
        cautions: Where it computes something else from the magnitudes than from this file alone, and the way out.
    """

    tool: str
    title: str
    error: float
    layers: tuple[LayerVerdict, ...]
    note: str = ""
    version: str = ""
    usage: str = ""
    cure: str = ""
    cautions: tuple[str, ...] = ()

    @property
    def findings(self) -> Counter[str]:
        """The number of modules by finding."""
        return Counter(layer.finding for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """As JSON types; an error that is no finite number is None."""
        return finite({**asdict(self), "findings": dict(self.findings)})


@torch.no_grad()
def verify(
    file: str | Path,
    tool: str = "all",
    base: str | Path | Mapping[Name, Tensor] | None = None,
    *,
    axis: str | None = None,
) -> list[Verdict]:
    """Computes what a tool will compute from an adapter file, and how far that is from what the file means.

    Args:
        file: The adapter file of any tool, or its folder.
        tool: One of `other_tools`, by any of its names, or "all".
        base: The model: a folder, a single-file checkpoint, a hub name, or weights by name.
        axis: The axis of the magnitudes, `out` or `in`, where their shape does not say it.

    Returns:
        A verdict for each tool.

    Raises:
        ValueError: There is no such tool, or the adapter or the model cannot be read or do not belong together.
    """
    tool = tool_called(tool)
    if tool != "all" and tool not in other_tools():
        raise ValueError(no_entry("tool", tool, f"all or one of {', '.join(other_tools())}"))
    if base is None:
        raise ValueError("verify needs the base model, since norms depend on it: give it with --base")
    adapter = AdapterFile(file)
    if axis is not None:
        adapter.check_axis()
    weights = open_base(base)
    groups, _ = adapter.groups(adapter.modules, Names(weights))
    check_headers(adapter, groups, weights, axis)
    chosen = list(other_tools()) if tool == "all" else [tool]
    architecture = architecture_of(weights) or (TEXT_OF if _is_text(weights) else None)
    loads = {name: load_of(adapter, name, architecture) for name in chosen}
    if "peft" in chosen and not loads["peft"].refusal:
        loads["peft"] = _in_class(adapter, weights, loads["peft"])
    axes: set[str] = set()
    layers: dict[str, list[LayerVerdict]] = {name: [] for name in chosen}
    squares = dict.fromkeys(chosen, 0.0)
    total = 0.0
    for module in tracked(adapter.modules, "verifying", "modules"):
        if module not in groups:
            for found in layers.values():
                found.append(LayerVerdict(module, NOT_FOUND, math.nan))
            continue
        W0 = base_weight(adapter, module, groups[module], weights)
        with located(f"{adapter.path}: {module}"):
            state = fitted(adapter.layer(module, axis), W0)
        axes |= {state.axis} if "magnitude" in state.tensors else set()
        size, verdicts = _verdicts(adapter, module, loads, state, W0)
        total += size**2
        for name, verdict in verdicts.items():
            layers[name].append(verdict)
            squares[name] += (verdict.error * (size or 1)) ** 2
    note = "; ".join(_notes(adapter, groups))
    read = _convertible(adapter, weights, axis) if math.isfinite(total) else None
    names = {name for group in groups.values() for name in group.names}
    return [
        Verdict(
            name,
            TOOLS[name].title,
            math.sqrt(squares[name] / (total or 1)),
            tuple(layers[name]),
            note,
            TOOLS[name].version,
            tool_of(name).usage(axes),
            "" if read is None or _is_right(layers[name]) else cure(adapter, name, names, read),
            tool_of(name).cautions if axes and any(layer.finding in LOADED for layer in layers[name]) else (),
        )
        for name in chosen
    ]


def _is_right(layers: Iterable[LayerVerdict]) -> bool:
    return all(layer.finding == RIGHT for layer in layers)


def _convertible(adapter: AdapterFile, weights: Mapping[Name, Tensor], axis: str | None) -> LayerReader | None:
    """The reader of a file that `convert` would use; None where it refuses the file."""
    try:
        return LayerReader(adapter, weights, axis)
    except ValueError:
        return None


def _notes(adapter: AdapterFile, groups: Mapping[str, ModuleGroup]) -> Iterator[str]:
    if absent := [module for module in adapter.modules if module not in groups]:
        yield f"{len(absent)} modules, such as {absent[0]}, are not in this base: name one that has them to convert"
    if biases := tuple(adapter.biases.values()):
        yield f"{len(biases)} differences of biases, such as {biases[0]}, are not judged"
    if tokens := adapter.embeddings:
        where = "" if tokens[0] in adapter.unnamed else ", in files beside it,"
        yield f"{len(tokens)} embeddings of new tokens, such as {tokens[0]}{where} are not judged"
    if adapter.others:
        yield f"{len(adapter.others)} tensors that belong to no adapter, such as {adapter.others[0]}, are not judged"
    counts = Counter(name for group in groups.values() for name in group.names)
    if twice := [name for name, count in counts.items() if count > 1]:
        yield f"{twice[0]} is adapted twice, and each adapter is judged alone"


def _is_text(weights: Mapping[Name, Tensor]) -> bool:
    return all(name.component.startswith("text_encoder") for name in weights)


def _in_class(adapter: AdapterFile, weights: Mapping[Name, Tensor], load: Load) -> Load:
    """The modules of a file that PEFT loads into the class of the model, by its own code.

    Nothing is known of other files than PEFT's, and of models that are none of transformers'.
    """
    model = weights.model if isinstance(weights, BaseWeights) else None
    if model is None or adapter.tool != "peft":
        return load
    keys = {module: list(endings.values()) for module, endings in adapter.modules.items()}
    shapes = {key: adapter.shape(key) for found in keys.values() for key in found}
    try:
        missing = {f"{PREFIX}.{path}" for path in peft_loading.left_out(model, adapter.path.parent, shapes)}
    except ValueError as error:
        return Load({}, f"raises an error, and loads nothing: {str(error).partition(': ')[2]}")
    return Load({module: lost for module, lost in load.lost.items() if module not in missing})


def open_base(base: str | Path | Mapping[Name, Tensor]) -> Mapping[Name, Tensor]:
    """The weights of a model, which are given by path or as they are."""
    return base if isinstance(base, Mapping) else BaseWeights.open(base)


def base_weight(adapter: AdapterFile, module: str, group: ModuleGroup, weights: Mapping[Name, Tensor]) -> Tensor:
    """W0 of a module in a file, in fp32 with O first; of a fused module the stacked rows."""
    W0 = stacked(group, weights)
    return W0.T if adapter.transposed(module) else W0


def stacked(group: ModuleGroup, weights: Mapping[Name, Tensor]) -> Tensor:
    """W0 of a module as a file has it, in fp32."""
    found = [weights[name].float() for name in group.names]
    return found[0] if group.is_stored_so else stack_rows(group, found)


def _verdicts(
    adapter: AdapterFile, module: str, loads: Mapping[str, Load], state: LayerState, W0: Tensor
) -> tuple[float, dict[str, LayerVerdict]]:
    """||W' - W0||, and the verdicts of tools, by name with what each loads of the file."""
    tensors = adapter.tensors(module)
    readers = [name for name, load in loads.items() if not load.refusal and module in load.lost]
    complete = {name: tool_of(name).loaded(module, tensors, adapter.header) for name in readers}
    parts = {name: without(complete[name], loads[name].lost[module]) for name in readers}
    read = [ToolLoad(name, found) for name, found in parts.items() if is_read(found)]
    found = weight_errors(read, W0, state)
    errors = {load.tool: error for load, error in zip(read, found.errors, strict=True)}

    def verdict(name: str) -> LayerVerdict:
        if name not in errors:
            finding = REFUSED if loads[name].refusal else IGNORED
            return LayerVerdict(module, finding, 1.0 if found.size else 0.0, loads[name].refusal)
        return layer_verdict(module, tool_of(name).computes, parts[name], state, W0, found, errors[name])

    return found.size, {name: verdict(name) for name in loads}


def layer_verdict(
    module: str, computes: Computation, parts: Parts, state: LayerState, W0: Tensor, found: WeightErrors, error: float
) -> LayerVerdict:
    """The verdict on one module, from the error of the tool."""
    relative = found.relative(error)
    if relative <= found.bound():
        return LayerVerdict(module, RIGHT, relative)
    if not math.isfinite(relative):
        return LayerVerdict(module, FAILS if math.isinf(relative) else NOT_FINITE, relative)
    if "magnitude" in state.tensors and "m" not in parts:
        return LayerVerdict(module, NO_MAGNITUDE, relative)
    if "m" in parts and _other_axis(computes, parts["m"], state.axis, W0):
        return LayerVerdict(module, WRONG_AXIS, relative)
    return LayerVerdict(module, DIFFERS, relative, why(computes, parts, state))


def _other_axis(computes: Computation, m: Tensor, axis: str, W0: Tensor) -> bool:
    used = axis_of_shape(m, W0) if computes.axis == "shape" else computes.axis
    broadcasts_along = "in" if m.dim() == 1 and computes.axis != "out" else used
    return axis not in (used, broadcasts_along) or used != broadcasts_along


def why(computes: Computation, parts: Parts, state: LayerState) -> str:
    """The reason why a tool computes another weight, as the end of a sentence that begins with the tool's name."""
    if state.spec.scaling != 1 and "alpha" not in parts:
        return "does not read alpha"
    written_for = {"base": "the norm of W0", "unscaled": "the norm of W0 + B A without alpha"}
    if "magnitude" in state.tensors and state.norm in written_for:
        return f"divides by another norm; the magnitudes of this file need {written_for[state.norm]}"
    return computes.differs
