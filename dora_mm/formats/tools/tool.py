"""What a tool is: how it names things in adapter files, and the weight that it computes from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_mm.core.spec import DoRASpec, finite_number
from dora_mm.formats.names import Name
from dora_mm.formats.state import LayerState
from dora_mm.formats.tools.parts import Parts, neutral

Header = Mapping[str, str]
Specs = Mapping[Name, DoRASpec]


def writes_no_files(keys: Collection[str], header: Header) -> bool:
    """For tools that only read."""
    return False


def no_alpha(header: Header, module: str, rank: int) -> float | None:
    """For tools whose headers say nothing about alpha."""
    return None


def no_header(specs: Specs, old: Header) -> dict[str, str]:
    """For formats that need no header."""
    return {}


@dataclass(frozen=True)
class Tool:
    """One tool that loads adapter files.

    Attributes:
        title: What people call it.
        names: Matches the module names that the tool knows, at their beginning; keys of others are ignored by it.
        parts: The key table: the role of each tensor (see `parts.py`) by the end of its key. Others are ignored.
        apply: W(t) as this tool computes it, from the tensors of a module by role, W0 and the strength t. It is plain
            torch, in the dtype of W0, and broadcasts and raises where the tool does.
        differs: What the tool does in another way than the paper, as the end of a sentence that begins with its name.
        axis: Over which axis it takes norms: `out`, `in`, or by the `shape` of the magnitude.
        strengths: The other strengths that people set in it; empty for trainers, which have none.
        matches: Whether the tool wrote a file with these keys and this header.
        read: The neutral form of a module, from its tensors by role and the axis if a person stated it.
        alpha: What the header says about the alpha of a module of a rank.
    """

    title: str
    names: re.Pattern[str]
    parts: Mapping[str, str]
    apply: Callable[[Parts, Tensor, float], Tensor]
    differs: str
    axis: str = "shape"
    strengths: tuple[float, ...] = (0.0, 0.5, 2.0)
    matches: Callable[[Collection[str], Header], bool] = writes_no_files
    read: Callable[[Parts, str | None], LayerState] = neutral
    alpha: Callable[[Header, str, int], float | None] = no_alpha

    def roles(self, module: str, endings: Mapping[str, str]) -> dict[str, str]:
        """The keys that the tool reads of a module, by role; empty where it does not know the module's name."""
        if not self.names.match(module):
            return {}
        return {self.parts[ending]: key for ending, key in endings.items() if ending in self.parts}

    def parts_of(self, module: str, tensors: Mapping[str, Tensor], header: Header) -> dict[str, Tensor]:
        """The tensors of a module by role, from those by the end of their keys; with the alpha of the header."""
        parts = {self.parts[ending]: tensor for ending, tensor in tensors.items() if ending in self.parts}
        if not self.names.match(module):
            return {}
        if "A" in parts and parts["A"].dim() and "alpha" not in parts:
            alpha = self.alpha(header, module, parts["A"].shape[0])
            if alpha is not None:
                parts["alpha"] = torch.tensor(finite_number("alpha", alpha), dtype=torch.float64)
        return parts


@dataclass(frozen=True)
class Export:
    """A form of file that `convert` writes.

    Attributes:
        write: The tensors of a module by the end of their keys, from the neutral form and W0. Raises ValueError where
            the form cannot hold it.
        spelling: How modules are named: one of `spellings.SPELLINGS`.
        judges: The tools whose `apply` must give W' from what is written.
        needs_base: Whether `write` needs W0 (it may be None otherwise).
        header: The entries that the header must have, from the settings of the modules and the source's header.
            One that is named like a file is written beside the weights.
        file_name: The name of the file in a folder; empty for the folder's own name.
        dtype: The usual dtype of the tensors.
        one_method: Whether all modules need a magnitude if one has it.
        keeps_alpha: Whether alpha stays as it is; else B is scaled so that alpha is the rank, which tools that do not
            read it take.
        columns: Whether it holds magnitudes of input columns, too.
        diffs: Whether it holds differences of weights, too.
    """

    write: Callable[[LayerState, Tensor], dict[str, Tensor]]
    spelling: str
    judges: tuple[str, ...]
    needs_base: bool = False
    header: Callable[[Specs, Header], dict[str, str]] = no_header
    file_name: str = ""
    dtype: str = "float32"
    one_method: bool = False
    keeps_alpha: bool = False
    columns: bool = True
    diffs: bool = True
