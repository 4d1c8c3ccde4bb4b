"""Adapter files of any tool: opened once, read one module at a time."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_mm.config.paths import CONFIG, INDEX
from dora_mm.formats.files.checks import check_dtype, first_not_finite
from dora_mm.formats.files.tensor_file import PICKLES, TensorFile, pickle_error
from dora_mm.formats.naming.names import ModuleGroup, Name, canonical
from dora_mm.formats.naming.spellings import Namer
from dora_mm.formats.state import LayerState, with_settings
from dora_mm.formats.tokens import EMBEDDINGS, keys_by_word, read_token_file
from dora_mm.formats.tools import FORMATS, all_tools, tool_of
from dora_mm.formats.tools.methods import Method, other_method
from dora_mm.formats.tools.parts import NO_LOW_RANK, axes_that_fit
from dora_mm.formats.tools.peft import CONFIG_NAME, FILE_NAME, companion_method, config_next_to
from dora_mm.formats.tools.tool import Tool
from dora_mm.registries.tools import TOOLS
from dora_mm.utils.json_text import read_bounded

OLD_LAYER = re.compile(r"(?P<module>.*_lora[12]?)\.(?P<ending>down|up)\.weight")  # of diffusers of 2023, and XLabs
_NETWORK = re.compile(
    r"base_model\.model\.((down|up|(single_)?transformer|joint|double|single)_blocks|mid_block|blocks)\."
)
_INTEGERS = (torch.int16, torch.int32, torch.int64)
MOST_RANK = 2**14  # that is accepted of a weight with fewer rows and columns
_OF_MODELS = (".weight", ".bias", ".running_mean", ".running_var", ".num_batches_tracked", ".position_ids")
_TOP = 8  # keys that are shown of a file that is not recognised


class AdapterFile:
    """An adapter file of any tool.

    Attributes:
        path: The file.
        header: The metadata of its header, and PEFT's settings under the name of their file.
        tool: The name of the tool that wrote it, or one that writes the same form: a name in `registries.tools.TOOLS`.
        modules: By the name of a module in the file: its keys by their ends, such as `lora_up.weight`.
        biases: By the name of a module: the key of the difference of its bias.
        embeddings: The keys of the embeddings of trained tokens, also where these are in separate files.
        others: The keys that belong to no module.
    """

    def __init__(self, path: str | Path):
        """Opens a file, or the only one in a folder or run directory; reads only headers.

        Raises:
            ValueError: There is no such file, it is damaged, or it is no adapter of a known tool.
        """
        self.path = find_file(Path(path))
        self._file = TensorFile(self.path)
        self.header = dict(self._file.metadata)
        config = self.path.with_name(CONFIG_NAME)
        if self.path.name == FILE_NAME and config.is_file():  # beside a file of another name it is another adapter's
            with located(str(config)):
                self.header[CONFIG_NAME] = read_bounded(config).decode()
        self.tool = self._detect()
        self.modules: dict[str, dict[str, str]] = defaultdict(dict)
        self.biases: dict[str, str] = {}
        self.embeddings: list[str] = []
        self.others: list[str] = []
        for key in self._file.entries:
            self._sort_in(key)
        if CONFIG_NAME not in self.header and (method := other_method(self.others)):
            raise self._holds(method)
        with located(str(self.path)):
            self._extras = read_token_file(self.path, self.header)
            renamed = tool_of(self.tool).renamed(self.modules, self.header)
        self.modules = {renamed.get(module, module): keys for module, keys in self.modules.items()}
        self.embeddings += self._extras

    def _detect(self) -> str:
        keys = list(self._file.entries)
        with located(str(self.path)):
            method = companion_method(self.header)
        if method:
            raise self._holds(method)
        found = next((name for name, tool in all_tools().items() if tool.wrote(keys, self.header)), None)
        if found == "peft" and CONFIG_NAME not in self.header and any(map(_NETWORK.match, keys)):
            found = "bare"  # it can only be for a network of images, and its alpha is the rank
        if found is None and (method := other_method(keys)):
            raise self._holds(method)
        if found is None and keys and all(key.endswith(_OF_MODELS) for key in keys):
            raise ValueError(f"{self.path} is a model, or a part of one, and no adapter: it has whole weights alone")
        if found is None:
            shown = ", ".join(keys[:_TOP])
            raise ValueError(f"{self.path} is not an adapter of a known tool: its keys are {shown or 'none'}")
        return found

    def _holds(self, method: Method) -> ValueError:
        return ValueError(f"{self.path} holds {method.title}, not LoRA or DoRA: {method.advice}")

    def _sort_in(self, key: str) -> None:
        if EMBEDDINGS.match(key):
            self.embeddings.append(key)
            return
        module, _, end = key.rpartition(".")
        if end in ("diff_b", "b_norm"):
            self.biases[module] = key
            return
        if found := OLD_LAYER.fullmatch(key):
            self.modules[found["module"]][found["ending"]] = key
            return
        parts = key.rsplit(".", self._most_dots + 1)
        for first in range(1, len(parts)):  # the longest end first
            if (ending := ".".join(parts[first:])) in self._endings:
                self.modules[key[: -len(ending) - 1]][ending] = key
                return
        self.others.append(key)

    @cached_property
    def _endings(self) -> frozenset[str]:
        """The known ends of keys; those of the native format belong to its files alone."""
        ours = self.tool == "native"
        tools = [tool for name, tool in all_tools().items() if (name == "native") == ours]
        return frozenset(ending for tool in tools for ending in tool.parts)

    @cached_property
    def _most_dots(self) -> int:
        return max(ending.count(".") for ending in self._endings)

    @cached_property
    def parameters(self) -> dict[str, Name]:
        """The names of the extra parameters, by key."""
        with located(str(self.path)):
            found = {key: tool_of(self.tool).in_header.parameter(self.header, key) for key in self._file.entries}
        return {key: name for key, name in found.items() if name is not None}

    @property
    def unnamed(self) -> list[str]:
        """The keys of the file itself that belong to no module."""
        return [*(key for key in self.embeddings if key not in self._extras), *self.biases.values(), *self.others]

    @property
    def tokens(self) -> dict[str, dict[str, str]]:
        """The keys of rows of new tokens, by word and then by table: see `tokens.py`."""
        return keys_by_word(self.embeddings)

    def is_norm(self, module: str) -> bool:
        """Whether it is the difference of a norm."""
        endings = self.modules[module]
        return any(len(self.shape(endings[ending])) == 1 for ending in ("w_norm", "diff") if ending in endings)

    def named(self, module: str) -> Name | None:
        """The name of a module in a model, where the file has the model's own names: see `Tool.named`."""
        return tool_of(self.tool).named(module)

    def check_complete(self) -> None:
        """Checks that what the header lists is there.

        Raises:
            ValueError: A module or a parameter is missing.
        """
        adapted = (self.named(module) for module in self.modules)
        known = {canonical(*name) for name in (*adapted, *self.parameters.values()) if name is not None}
        with located(str(self.path)):
            missing = (
                name for name in tool_of(self.tool).in_header.listed(self.header) if canonical(*name) not in known
            )
            if name := next(missing, None):
                which = ".".join(filter(None, name))
                raise ValueError(f"{self.path} is incomplete: {which:.200}, which its header lists, is missing")

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        file, own = self._file_and_key(key)
        return file.entries[own].shape

    def _file_and_key(self, key: str) -> tuple[TensorFile, str]:
        """The file that holds a tensor, and its key there."""
        return self._extras.get(key, (self._file, key))

    def tensor(self, key: str, *, mapped: bool = False) -> Tensor:
        """Reads a tensor.

        Args:
            key: Its key.
            mapped: Whether its values come from the disk when they are used, not before.

        Raises:
            ValueError: Its dtype is none that adapters have, or the file has become shorter.
        """
        file, own = self._file_and_key(key)
        return self._checked(key, file.map(own) if mapped else file.read(own))

    def shape_of(self, key: str) -> Tensor:
        """A tensor as the header describes it, without values; a single number has its value.

        Raises:
            ValueError: Its dtype is none that adapters have, or the file has become shorter.
        """
        dtype, shape, _ = self._file.entries[key]
        is_number = math.prod(shape) == 1
        return self._checked(key, self._file.map(key) if is_number else torch.empty(shape, dtype=dtype, device="meta"))

    def _checked(self, key: str, found: Tensor) -> Tensor:
        if key.endswith(".alpha") and found.dtype in _INTEGERS:
            return found
        return check_dtype(f"{self.path}: {key}", found, parameter=key in self.parameters)

    @cached_property
    def alphas(self) -> dict[str, float]:
        """The alphas that are tensors of the file, by key, as far as they are one number."""
        return self._file.numbers(key for key in self._file.entries if key.endswith(".alpha"))

    def not_finite(self) -> list[str]:
        """The keys of tensors with values that are NaN or infinite; reads the whole file, with a bar."""
        extras = ((key, self.tensor(key)) for key in self._extras)
        return [*self._file.not_finite(), *(key for key, rows in extras if not rows.isfinite().all())]

    def parts(self, module: str, tool: Tool, read: Callable[[str], Tensor] | None = None) -> dict[str, Tensor]:
        """The tensors of a module by role, as a tool's form has them; empty where it does not know the module.

        Args:
            module: The name of the module in the file.
            tool: The tool.
            read: Gives the tensor of a key; None: `tensor`.
        """
        read = read or self.tensor
        tensors = {ending: read(key) for ending, key in self.modules[module].items() if ending in tool.parts}
        return tool.parts_of(module, tensors, self.header)

    def tensors(self, module: str) -> dict[str, Tensor]:
        """The tensors of a module by the end of their keys."""
        return {ending: self.tensor(key) for ending, key in self.modules[module].items()}

    def layer(self, module: str, axis: str | None = None, *, mapped: bool = False) -> LayerState:
        """The adapter of a module. What the header tells is checked before values are read.

        Args:
            module: The name of the module in the file.
            axis: The axis of its magnitude, where the shape does not say it.
            mapped: Whether values are read only when they are used; else they are checked.

        Raises:
            ValueError: Tensors are missing, do not fit each other, belong to another method or contradict the header,
                the axis is not clear, or a value is NaN or infinite.
        """
        self.layer_shapes(module, axis)
        layer = self._layer(module, axis, partial(self.tensor, mapped=mapped))
        if not mapped and (name := first_not_finite(layer.tensors.items())):
            raise ValueError(f"its {name} has values that are NaN or infinite")
        return layer

    def layer_shapes(self, module: str, axis: str | None = None) -> LayerState:
        """The adapter of a module as the header describes it, without values; raises what `layer` does."""
        tool, keys = tool_of(self.tool), self.modules[module]
        unread = [ending for ending, key in keys.items() if ending not in tool.parts and key not in self.parameters]
        if unread:
            raise ValueError(f"it has {min(unread)}, which {TOOLS[self.tool].title} does not write")
        layer = self._layer(module, axis, self.shape_of)
        if "lora_A" in layer.tensors:
            weight, rank = layer.weight_shape, layer.spec.rank
            rows, *inner = weight if layer.num_experts is None else weight[1:]
            if rank > max(MOST_RANK, rows, math.prod(inner)):
                raise ValueError(f"its rank {rank} is that of no adapter of a weight of {weight}")
        return layer

    def _layer(self, module: str, axis: str | None, read: Callable[[str], Tensor]) -> LayerState:
        tool = tool_of(self.tool)
        layer = tool.read(self.parts(module, tool, read), axis)
        return layer if self.is_parameter(module) else with_settings(layer, self.settings(module))

    def settings(self, module: str) -> Mapping[str, Any]:
        """The settings of a module in the header: see `HeaderReader.settings`."""
        with located(str(self.path)):
            return tool_of(self.tool).in_header.settings(self.header, module)

    def is_parameter(self, module: str) -> bool:
        """Whether all tensors of a module are extra parameters, as the weight of a trained norm."""
        return all(key in self.parameters for key in self.modules[module].values())

    def axis(self, module: str) -> str:
        """The axis of a magnitude as its shape says it: `out`, `in`, or `?` for both; empty without one that fits."""
        tool, endings = tool_of(self.tool), self.modules[module]
        shapes = {role: self.shape(key) for role, key in tool.roles(module, endings).items()}
        if "m" not in shapes:
            return ""
        if tool.computes.axis == "out" or "dora_scale" not in endings:  # the other names are those of output rows
            return "out"
        if not {"A", "B"} <= shapes.keys() or len(shapes["A"]) < 2 or not shapes["B"]:
            return ""
        fits = axes_that_fit(shapes["m"], shapes["B"][0], shapes["A"][1])
        return "?" if len(fits) > 1 else "".join(fits)

    def why_not_trainable(self) -> str | None:
        """The reason why training cannot start from this file, as an error message; None where it can.

        It holds differences of weights, or magnitudes of input columns, which load as LoRA
        of full rank.
        """
        if self.biases or any(map(self.is_norm, self.modules)):
            return f"{self.path} also holds differences of norms and biases, which a training here would not go on with"
        for module, endings in self.modules.items():
            if (endings.keys() & NO_LOW_RANK and not self.is_parameter(module)) or self.axis(module) == "in":
                return (
                    f"{self.path} has no low rank at {module}, and can be drawn with but not trained on: fit it with "
                    "dora-mm convert --to diffusers --rank R, or extract"
                )
        return None

    def check_axis(self) -> None:
        """Checks that it has an effect to state the axis.

        Raises:
            ValueError: The shapes of all magnitudes say theirs.
        """
        if all(self.axis(module) != "?" for module in self.modules):
            raise ValueError(f"{self.path} has no magnitude whose axis is unclear: leave --axis out")

    def groups(self, modules: Collection[str], names: Namer) -> tuple[dict[str, ModuleGroup], dict[str, str]]:
        """The module groups of names in the file, and the names that were not found, the first with the reason.

        Raises:
            ValueError: None is among the names, or there is none.
        """
        if not modules:
            raise ValueError(f"{self.path} holds no adapter")
        found: dict[str, ModuleGroup] = {}
        missing: dict[str, str] = {}
        for module in modules:
            try:
                found[module] = names.read(module)
            except ValueError as error:
                missing[module] = "" if missing else str(error)  # it has the nearest names, which take long to find
        if missing and not found:
            raise self.not_found(missing)
        return found, missing

    def not_found(self, missing: Mapping[str, str]) -> ValueError:
        """The error for modules that are not among the names, from the second result of `groups`."""
        total, reason = len(self.modules), next(iter(missing.values()))
        if len(missing) == 1:
            return ValueError(f"{self.path}: {reason}")
        which = " (it is an adapter of another model)" if len(missing) == total else ""
        return ValueError(f"{self.path}: {len(missing)} of its {total} modules were not found{which}: {reason}")

    def transposed(self, module: str) -> bool:
        """Whether the base stores the weight (I, O): PEFT's adapters of embeddings, and of Conv1D in GPT-2."""
        if any(ending.startswith("lora_embedding") for ending in self.modules[module]):
            return True
        with located(str(self.path)):
            return CONFIG_NAME in self.header and bool(config_next_to(self.header).get("fan_in_fan_out"))


def find_file(path: Path) -> Path:
    """Finds the adapter file.

    Args:
        path: The file itself, the folder that contains it, or a run directory, in which that is the folder `adapter`.

    Raises:
        ValueError: `path` does not exist, or is a folder with no adapter file or with several.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"there is no adapter at {path}: give an adapter file or its folder")
    path = adapter_folder(path)
    own = [path / form.file_name for form in FORMATS.values() if (path / form.file_name).is_file()]
    others = [] if (path / CONFIG).is_file() else sorted(path.glob("[!.]*.safetensors"))  # else it is a model's
    found = own or others
    if len(found) == 1:
        return found[0]
    names = " or ".join(form.file_name for form in FORMATS.values())
    pickles = sorted(file for file in path.iterdir() if file.suffix in PICKLES)
    if pickles and not found:
        raise pickle_error(pickles[0])
    if not found and any((path / name).is_file() for name in (INDEX, CONFIG)):
        raise ValueError(f"{path} is the folder of a model, and no adapter")
    raise ValueError(f"the folder {path} contains {len(found) or 'no'} adapter files ({names}): give the path of one")


def adapter_folder(path: Path) -> Path:
    """The folder of an adapter that is given by its run directory, its folder or its file."""
    if path.is_file():
        return path.parent
    return path / "adapter" if (path / "adapter").is_dir() else path


@contextmanager
def located(where: str) -> Iterator[None]:
    """Prefixes the message of a ValueError with `path` or `path: module`, unless it already begins with the path."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(where.partition(": ")[0]):  # it begins with the path
            raise
        raise ValueError(f"{where}: {error}") from error
