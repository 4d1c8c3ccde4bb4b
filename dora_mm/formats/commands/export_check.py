"""Checks the weights that tools compute from the tensors of `convert`, and that PEFT finds their modules."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dora_mm.core.spec import DoRASpec
from dora_mm.formats.algebra.exact import difference
from dora_mm.formats.commands.weight_errors import ToolLoad, weight_errors
from dora_mm.formats.files.base_weights import BaseWeights
from dora_mm.formats.files.checks import first_not_finite
from dora_mm.formats.naming.names import Name
from dora_mm.formats.state import LayerState
from dora_mm.formats.tools import peft_loading, tool_of
from dora_mm.formats.tools.tool import Export, Header
from dora_mm.registries.tools import TOOLS

DTYPES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}  # the error of most modules that rounding explains
ROUNDING = 0.05  # the error over all modules that is accepted of half precision
STRENGTHS_ON = 16  # modules, spread over the file, on which errors at other strengths than 1 are computed


@dataclass(frozen=True)
class ToolErrors:
    """How far off a tool is with a written file.

    Attributes:
        tool: The tool's name.
        layers: By the module's name in the file: the relative error of W' - W0 at strength 1.
        overall: The same over all modules.
        at: By other strengths that people set: the error of W(t) - W0 relative to W' - W0, over some of the modules.
    """

    tool: str
    layers: Mapping[str, float]
    overall: float
    at: Mapping[float, float]


class ExportCheck:
    """Applies the tools that read a form of file to the tensors that are written in it.

    Args:
        export: The form.
        num_modules: How many modules there will be.
        dtype: The dtype of the file.
        strict: Whether a tool that computes something else at strength 1 is an error.
        advice: What a person can do then.
    """

    def __init__(self, export: Export, num_modules: int, dtype: torch.dtype, *, strict: bool, advice: str):
        self.tools = {name: tool_of(name) for name in export.read_by}
        self.difference, self.dtype = export.difference, dtype
        magnitudes = {end for tool in self.tools.values() for end, role in tool.parts.items() if role == "m"}
        self.kept = {"alpha", *magnitudes}
        self.errors: dict[str, dict[str, float]] = defaultdict(dict)
        self.squares: dict[tuple[str, float], list[tuple[float, float]]] = defaultdict(list)
        self.strict, self.advice = strict, advice
        self.every = max(1, num_modules // STRENGTHS_ON)
        self.count = 0

    def check(
        self,
        module: str,
        unrounded: dict[str, Tensor],
        header: Header,
        W0: Tensor,
        meant: tuple[LayerState, float],
    ) -> dict[str, Tensor]:
        """Checks one module.

        Args:
            module: Its name in the file.
            unrounded: Its tensors by the end of their keys; a difference has no values yet.
            header: The header that a file of this module alone would have.
            W0: The base weight.
            meant: The adapter that is meant, and its strength.

        Returns:
            The tensors in the dtype of the file. Magnitudes stay in fp32: rounding them moves W' by a share of W0, and
            they make such a file 3 % larger.

        Raises:
            ValueError: A tool computes something else, and `strict` is set; or a value is not finite in the dtype.
        """
        written = {
            ending: tensor if ending in self.kept else tensor.to(self.dtype) for ending, tensor in unrounded.items()
        }
        change = next(iter(written.values())) if self.difference else None
        loads = [
            ToolLoad(name, tool.loaded(module, written, header), t)
            for name, tool in self.tools.items()
            for t in (1.0, *(tool.computes.strengths if self.count % self.every == 0 else ()))
        ]
        found = weight_errors(loads, W0, *meant, change)
        if name := first_not_finite(written.items()):
            raise ValueError(f"its {name} would have values that are NaN or infinite in {self.dtype}")
        bound = found.bound(DTYPES[_name(self.dtype)])
        for load, error in zip(loads, found.errors, strict=True):
            if load.strength == 1:
                self.errors[load.tool][module] = found.relative(error)
                if self.strict and not found.relative(error) <= bound:
                    if self.difference:
                        unrounded = dict.fromkeys(written, difference(meant[0], W0, meant[1]))
                    exact = tool_of(load.tool).loaded(module, unrounded, header)
                    self._refuse(load._replace(parts=exact), W0, meant)
            self.squares[load.tool, load.strength].append((error, found.size))
        self.count += 1
        return written

    def _refuse(self, exact: ToolLoad, W0: Tensor, meant: tuple[LayerState, float]) -> None:
        """Raises ValueError where a tool computes something else from tensors that are not rounded, too."""
        found = weight_errors([exact], W0, *meant)
        formula = found.relative(found.errors[0])
        if not formula <= found.bound():
            raise ValueError(f"{refusal(exact.tool, formula)}: nothing was written; {self.advice}")

    def check_rounding(self) -> None:
        """Checks what rounding does to the whole file: that of a module may be large where its update is small.

        Raises:
            ValueError: It changes more than `ROUNDING` of the update, and `strict` is set.
        """
        worst = max((errors.overall for errors in self.result()), default=0.0)
        changes = any(size for _, size in next(iter(self.squares.values()), []))  # else the error is an absolute one
        if self.strict and changes and self.dtype != torch.float32 and not worst <= ROUNDING:
            raise ValueError(
                f"{_name(self.dtype)} puts it off by {worst:.1%} of the update: use --dtype float32, or --allow-lossy"
            )

    def result(self) -> tuple[ToolErrors, ...]:
        """The errors of every tool."""

        def overall(name: str, t: float) -> float:
            off, size = zip(*self.squares[name, t], strict=True)
            return math.hypot(*off) / (math.hypot(*size) or 1.0)

        return tuple(
            ToolErrors(
                TOOLS[name].title,
                self.errors[name],
                overall(name, 1.0),
                {t: overall(name, t) for t in tool.computes.strengths},
            )
            for name, tool in self.tools.items()
            if self.errors[name]
        )


def refusal(tool: str, error: float) -> str:
    """The reason why a file is not written for a tool."""
    title = TOOLS[tool].title
    if math.isinf(error):
        return f"{title} would fail on it"
    if math.isnan(error):
        return f"{title} would compute values that are NaN or infinite"
    return f"{title} {tool_of(tool).computes.differs}, and would be off by {error:.1%} of the update"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_peft_takes(weights: object, names: Sequence[Name], method: Literal["dora", "lora"]) -> None:
    """Checks that PEFT will find the modules of a file of its own in the class of a model, where that is known.

    Raises:
        ValueError: It will not, or refuses such a file; or they are stacked experts, whose names in PEFT's files only
            the model tells.
    """
    if not isinstance(weights, BaseWeights) or weights.model is None or not names:
        return
    if experts := [name for name in names if name in weights.experts]:
        can_hold = method == "lora"
        reason = "" if can_hold else ", and PEFT has no DoRA of those (ParamWrapper does not work with use_dora)"
        remedy = "load it into the model and save_adapter(model, folder, format='peft'), or " if can_hold else ""
        raise ValueError(f"{experts[0]} is a layer of stacked experts{reason}: {remedy}use dora-mm merge")
    specs = {name.path: DoRASpec(1, method=method) for name in names if weights.has_module(name)}
    lost = [name.path for name in names if name.path not in specs]
    if lost := lost or peft_loading.left_out_of(weights.model, specs):
        raise ValueError(
            f"PEFT would leave out {len(lost)} of {len(names)} modules, such as {lost[0]}: use dora-mm merge"
        )
