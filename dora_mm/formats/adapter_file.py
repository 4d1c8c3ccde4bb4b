"""Adapter files of any tool, read one module at a time."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from dora_mm.formats import FORMATS, find_file
from dora_mm.formats.checks import DTYPES, first_not_finite
from dora_mm.formats.json_text import json_header
from dora_mm.formats.names import Target
from dora_mm.formats.peft import CONFIG_NAME, FILE_NAME
from dora_mm.formats.spellings import Names
from dora_mm.formats.state import LayerState
from dora_mm.formats.tensor_file import TensorFile
from dora_mm.formats.tools import TOOLS
from dora_mm.formats.tools.methods import METHODS, other_method
from dora_mm.formats.tools.parts import axes_that_fit
from dora_mm.formats.tools.tool import Tool

EMBEDDINGS = re.compile(r"bundle_emb\.|emb_params$|clip_[lg]$|.*string_to_param")  # of tokens that were trained
_INTEGERS = (torch.int16, torch.int32, torch.int64)
_TOP = 8  # keys that are shown of a file that is not recognised


class AdapterFile:
    """An adapter file of any tool.

    Attributes:
        path: The file.
        header: The metadata of its header, and PEFT's settings under the name of their file.
        tool: The name of the tool that wrote it, or one that writes the same form: a key of `TOOLS`.
        modules: By the name of a module in the file: its keys by their ends, such as `lora_up.weight`.
        embeddings: The keys of the embeddings of trained tokens.
        others: The keys that belong to no module.
    """

    def __init__(self, path: str | Path):
        """Opens a file, or the only one in a folder or run directory; reads only headers.

        Raises:
            ValueError: There is no such file, it is damaged, or it is no adapter of a known tool.
        """
        self.path = adapter_path(Path(path))
        self._file = TensorFile(self.path)
        self.header = dict(self._file.metadata)
        config = self.path.with_name(CONFIG_NAME)
        if self.path.name == FILE_NAME and config.is_file():  # beside a file of another name it is another adapter's
            with located(str(config)):
                self.header[CONFIG_NAME] = config.read_text(encoding="utf-8")
        self.tool = self._detect()
        self.modules: dict[str, dict[str, str]] = defaultdict(dict)
        self.embeddings: list[str] = []
        self.others: list[str] = []
        for key in self._file.entries:
            self._sort_in(key)

    def _detect(self) -> str:
        keys = list(self._file.entries)
        found = next((name for name, tool in TOOLS.items() if tool.matches(keys, self.header)), None)
        if found is None and (method := other_method(keys)):
            raise ValueError(f"{self.path} holds {method}, and only LoRA and DoRA are supported")
        if found is None:
            shown = ", ".join(keys[:_TOP])
            raise ValueError(f"{self.path} is not an adapter of a known tool: its keys are {shown or 'none'}")
        return found

    def _sort_in(self, key: str) -> None:
        if EMBEDDINGS.match(key):
            self.embeddings.append(key)
            return
        for ending in self._endings:
            if key.endswith(f".{ending}"):
                self.modules[key.removesuffix(f".{ending}")][ending] = key
                return
        self.others.append(key)

    @cached_property
    def _endings(self) -> list[str]:
        """The known ends of keys, the longest first; those of our own format belong to its files alone."""
        tools = [TOOLS["dora_mm"]] if self.tool == "dora_mm" else [t for n, t in TOOLS.items() if n != "dora_mm"]
        return sorted({ending for tool in tools for ending in tool.parts} | METHODS.keys(), key=len, reverse=True)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._file.entries[key].shape

    def tensor(self, key: str) -> Tensor:
        """Reads a tensor.

        Raises:
            ValueError: Its dtype is none that adapters have, or the file has become shorter.
        """
        found = self._file.read(key)
        if found.dtype not in DTYPES and not (key.endswith(".alpha") and found.dtype in _INTEGERS):
            kind = str(found.dtype).removeprefix("torch.")
            raise ValueError(f"{self.path}: {key} has values of type {kind}: save it in float32")
        return found

    def parts(self, module: str, tool: Tool) -> dict[str, Tensor]:
        """The tensors of a module by role, as a tool reads them; empty where it does not know the module."""
        endings = self.modules[module]
        return tool.parts_of(
            module, {e: self.tensor(key) for e, key in endings.items() if e in tool.parts}, self.header
        )

    def layer(self, module: str, axis: str | None = None) -> LayerState:
        """The adapter of a module.

        Args:
            module: The name of the module in the file.
            axis: The axis of its magnitude, where the shape does not say it.

        Raises:
            ValueError: Tensors are missing, do not fit each other, belong to another method, or the axis is not clear.
        """
        tool = TOOLS[self.tool]
        if method := other_method(list(self.modules[module].values())):
            raise ValueError(f"it is adapted by {method}, and only LoRA and DoRA are supported")
        unread = self.modules[module].keys() - tool.parts.keys()
        if unread:
            raise ValueError(f"it has {min(unread)}, which {tool.title} does not write")
        layer = tool.read(self.parts(module, tool), axis)
        if name := first_not_finite(layer.tensors.items()):
            raise ValueError(f"its {name} has values that are NaN or infinite")
        return layer

    def axis(self, module: str) -> str:
        """The axis of a magnitude as its shape says it: `out`, `in`, or `?` for both; empty without one that fits."""
        tool, endings = TOOLS[self.tool], self.modules[module]
        shapes = {role: self.shape(key) for role, key in tool.roles(module, endings).items()}
        if "m" not in shapes:
            return ""
        if tool.axis == "out" or "dora_scale" not in endings:  # the other names are those of output rows
            return "out"
        if not {"A", "B"} <= shapes.keys() or len(shapes["A"]) < 2 or not shapes["B"]:
            return ""
        fits = axes_that_fit(shapes["m"], shapes["B"][0], shapes["A"][1])
        return "?" if len(fits) > 1 else "".join(fits)

    def check_axis(self, axis: str | None) -> None:
        """Checks that the axis that a person states has an effect.

        Raises:
            ValueError: The shapes of all magnitudes say theirs.
        """
        if axis is not None and all(self.axis(module) != "?" for module in self.modules):
            raise ValueError(f"{self.path} has no magnitude whose axis is unclear: leave --axis out")

    def targets(self, names: Names) -> tuple[dict[str, Target], dict[str, str]]:
        """What the modules of the file stand for, and for modules that are not among the names the reason.

        Raises:
            ValueError: None is among the names, or there is none.
        """
        if not self.modules:
            raise ValueError(f"{self.path} holds no adapter")
        found: dict[str, Target] = {}
        missing: dict[str, str] = {}
        for module in self.modules:
            try:
                found[module] = names.read(module)
            except ValueError as error:
                missing[module] = str(error)
        if missing and not found:
            raise self.not_found(missing)
        return found, missing

    def not_found(self, missing: Mapping[str, str]) -> ValueError:
        """The error for modules that are not among the names, from the second result of `targets`."""
        total, reason = len(self.modules), next(iter(missing.values()))
        if len(missing) == 1:
            return ValueError(f"{self.path}: {reason}")
        which = " (it is an adapter of another model)" if len(missing) == total else ""
        return ValueError(f"{self.path}: {len(missing)} of its {total} modules were not found{which}: {reason}")

    def transposed(self, module: str) -> bool:
        """Whether the base stores the weight (I, O): PEFT's adapters of embeddings, and of Conv1D in GPT-2."""
        if any(ending.startswith("lora_embedding") for ending in self.modules[module]):
            return True
        return bool(json_header(self.path, self.header, CONFIG_NAME).get("fan_in_fan_out"))


def adapter_path(path: Path) -> Path:
    """The adapter file of a path: itself, or the only one in a folder or run directory.

    Raises:
        ValueError: There is none, or several.
    """
    if path.is_dir():
        files = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("."))
        if len(files) == 1:
            return files[0]
        if len(files) > 1 and not any((path / module.FILE_NAME).is_file() for module in FORMATS.values()):
            names = ", ".join(file.name for file in files[:_TOP])
            raise ValueError(f"the folder {path} contains {len(files)} files, {names}: give the path of one")
    found = find_file(path)
    if found.suffix != ".safetensors":
        raise ValueError(f"{found} is not a .safetensors file, and nothing else is read")
    return found


@contextmanager
def located(where: str) -> Iterator[None]:
    """Puts the place, `path` or `path: module`, in front of the message of a ValueError that does not name the path."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(where.partition(": ")[0]):  # it begins with the path
            raise
        raise ValueError(f"{where}: {error}") from error
