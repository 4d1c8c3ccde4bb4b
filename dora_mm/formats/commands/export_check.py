"""What tools compute from the tensors that `convert` writes for them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dora_mm.formats.algebra.exact import new_weight
from dora_mm.formats.algebra.rows import row_blocks, rows_of
from dora_mm.formats.commands.verify import bound, relative_error
from dora_mm.formats.files.checks import first_not_finite
from dora_mm.formats.state import LayerState
from dora_mm.formats.tools import TOOLS
from dora_mm.formats.tools.parts import Parts, rows_of_parts
from dora_mm.formats.tools.tool import Header, Tool

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
    """Applies tools to the tensors that are written for them.

    Args:
        tools: Their keys in `TOOLS`.
        num_modules: How many modules there will be.
        strict: Whether a tool that computes something else at strength 1 is an error.
        advice: What a person can do then.
    """

    def __init__(self, tools: Sequence[str], num_modules: int, *, strict: bool, advice: str):
        self.tools = {name: TOOLS[name] for name in tools}
        self.errors: dict[str, dict[str, float]] = defaultdict(dict)
        self.squares: dict[tuple[str, float], list[tuple[float, float]]] = defaultdict(list)
        self.strict, self.advice = strict, advice
        self.every = max(1, num_modules // STRENGTHS_ON)
        self.count = 0

    def check(
        self,
        module: str,
        unrounded: list[dict[str, Tensor]],
        header: Header,
        W0: Tensor,
        meant: tuple[LayerState, float],
        dtype: torch.dtype,
    ) -> list[dict[str, Tensor]]:
        """Checks one module.

        Args:
            module: Its name in the file.
            unrounded: For each file that the tools load one after the other, the tensors by the end of their keys.
            header: The header that a file of this module alone would have.
            W0: The base weight in fp32.
            meant: The adapter that is meant, and its strength.
            dtype: The dtype of the file.

        Returns:
            The tensors in the dtype of the file.

        Raises:
            ValueError: A tool computes something else, and `strict` is set; or a value is not finite in the dtype.
        """
        written = [rounded(tensors, dtype) for tensors in unrounded]
        loads = [
            ToolLoad(name, [tool.loaded(module, tensors, header) for tensors in written if tensors], t)
            for name, tool in self.tools.items()
            for t in (1.0, *(tool.strengths if self.count % self.every == 0 else ()))
        ]
        size, norm, off = _errors(loads, W0, *meant)
        for load, error in zip(loads, off, strict=True):
            if load.strength == 1:
                self.errors[load.tool][module] = error / (size or 1)
                if self.strict and not error <= bound(norm, size, DTYPES[_name(dtype)]) * (size or 1):
                    exact = [TOOLS[load.tool].loaded(module, tensors, header) for tensors in unrounded if tensors]
                    self._refuse(load._replace(files=exact), W0, meant)
            self.squares[load.tool, load.strength].append((error, size))
        self.count += 1
        return written

    def _refuse(self, exact: ToolLoad, W0: Tensor, meant: tuple[LayerState, float]) -> None:
        """Raises ValueError where a tool computes something else from tensors that are not rounded, too."""
        size, norm, (off,) = _errors([exact], W0, *meant)
        formula = off / (size or 1)
        if not formula <= bound(norm, size):
            raise ValueError(f"{refusal(TOOLS[exact.tool], formula)}: nothing was written; {self.advice}")

    def check_rounding(self, dtype: torch.dtype) -> None:
        """Checks what rounding does to the whole file: that of a module may be large where its update is small.

        Raises:
            ValueError: It changes more than `ROUNDING` of the update, and `strict` is set.
        """
        worst = max((errors.overall for errors in self.result()), default=0.0)
        changes = any(size for _, size in next(iter(self.squares.values()), []))  # else the error is an absolute one
        if self.strict and changes and dtype != torch.float32 and not worst <= ROUNDING:
            raise ValueError(
                f"{_name(dtype)} puts it off by {worst:.1%} of the update: use --dtype float32, or --allow-lossy"
            )

    def result(self) -> tuple[ToolErrors, ...]:
        """The errors of every tool."""

        def overall(name: str, t: float) -> float:
            off, size = zip(*self.squares[name, t], strict=True)
            return math.hypot(*off) / (math.hypot(*size) or 1.0)

        return tuple(
            ToolErrors(tool.title, self.errors[name], overall(name, 1.0), {t: overall(name, t) for t in tool.strengths})
            for name, tool in self.tools.items()
            if self.errors[name]
        )


class ToolLoad(NamedTuple):
    """What a tool loads of a module: its key in `TOOLS`, the parts of one file after the other, and the strength."""

    tool: str
    files: list[Parts]
    strength: float


def _errors(
    loads: Sequence[ToolLoad], W0: Tensor, layer: LayerState, strength: float
) -> tuple[float, float, list[float]]:
    """||W' - W0||, ||W0||, and ||W_tool(t) - W(t)|| for each load; W' is the weight at a strength of an adapter."""
    by_rows = all(TOOLS[load.tool].is_by_rows(parts, len(W0)) for load in loads for parts in load.files)
    blocks = row_blocks(W0) if by_rows and layer.axis == "out" else [slice(None)]
    sizes, norms, off = [], [], [[] for _ in loads]
    for rows in blocks:
        base = W0[rows]
        W = new_weight(layer if rows == slice(None) else rows_of(layer, rows), base, strength)
        update = W - base
        sizes.append(float(update.norm()))
        norms.append(float(base.norm()))
        for load, found in zip(loads, off, strict=True):
            files = [rows_of_parts(parts, rows) for parts in load.files]
            meant = W if load.strength == 1 else torch.add(base, update, alpha=load.strength)
            found.append(relative_error(TOOLS[load.tool], files, base, meant, 1.0, load.strength))
    return math.hypot(*sizes), math.hypot(*norms), [math.hypot(*found) for found in off]


def refusal(tool: Tool, error: float) -> str:
    """Why a file is not written for a tool."""
    if math.isinf(error):
        return f"{tool.title} would fail on it"
    if math.isnan(error):
        return f"{tool.title} would compute values that are NaN or infinite"
    return f"{tool.title} {tool.differs}, and would be off by {error:.1%} of the update"


def rounded(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a module in the dtype of a file; alpha stays as it is.

    Raises:
        ValueError: A value is not finite in it.
    """
    found = {ending: tensor if ending == "alpha" else tensor.to(dtype) for ending, tensor in tensors.items()}
    if name := first_not_finite(found.items()):
        raise ValueError(f"its {name} would have values that are NaN or infinite in {dtype}")
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
