"""The definition of a tool: its names of modules and tensors in adapter files, and the weight it computes from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from dora_mm.core.spec import DoRASpec, finite_number
from dora_mm.formats.metadata import without_local_paths
from dora_mm.formats.naming.names import Name
from dora_mm.formats.naming.spellings import Spelling
from dora_mm.formats.state import LayerState
from dora_mm.formats.tools import products
from dora_mm.formats.tools.formulas import Computation
from dora_mm.formats.tools.parts import Parts, neutral, rank_of
from dora_mm.utils.atomic import write_text
from dora_mm.utils.tensor_writer import TensorWriter, write_tensors

Header = Mapping[str, str]
Modules = Mapping[str, Mapping[str, str]]
T = TypeVar("T")
_DROPPED = ("dora_mm", "lora_adapter_metadata", "adapter_config.json", "format", "ot_", "sshs_")  # of the old header


class Contents(NamedTuple):
    """The sources of the header of a new file.

    Attributes:
        specs: The settings of the adapted modules.
        source: The header of the file that was converted, or the metadata of a training run.
        parameters: The extra parameters.
        transposed: The components in which weights are stored (I, O).
        experts: The adapted modules that are layers of stacked experts.
    """

    specs: Mapping[Name, DoRASpec]
    source: Header
    parameters: Sequence[Name] = ()
    transposed: Collection[str] = ()
    experts: Collection[Name] = ()


@dataclass(frozen=True)
class HeaderReader:
    """The functions by which a tool reads a header; by default they read nothing.

    Attributes:
        alpha: The alpha of a module of a rank.
        settings: The other settings of a module: see `state.with_settings`.
        listed: The modules and extra parameters that are in the file.
        parameter: The name of an extra parameter, by its key; None for other keys.
        unties: Whether the tool trains an extra parameter as a copy, apart from what the base ties to it.
        scaling: The factor of the change of a module whose method has no rank of A and B (see `products.py`).
    """

    alpha: Callable[[Header, str, int], float | None] = lambda header, module, rank: None
    settings: Callable[[Header, str], Mapping[str, Any]] = lambda header, module: {}
    listed: Callable[[Header], Iterable[Name]] = lambda header: ()
    parameter: Callable[[Header, str], Name | None] = lambda header, key: None
    unties: Callable[[Header, Name], bool] = lambda header, name: False
    scaling: Callable[[Header, str], float | None] = lambda header, module: None


@dataclass(frozen=True)
class Tool:
    """One tool that loads adapter files.

    Attributes:
        names: Matches the module names that the tool knows, at their beginning, where the table does not say it; keys
            of others are ignored by it.
        table: Its name in the table of what tools read by the architecture of the model, `naming/known.csv`.
        parts: The key table: the role of each tensor (see `parts.py`) by the end of its key. Others are ignored.
        computes: The weight that it computes from them.
        wrote_key: Matches a key that only the files have which it wrote, at its beginning.
        wrote_header: The same for an entry of the header, as `key=value`. Without the two it writes none.
        read: The neutral form of a module, from its tensors by role and the axis if a person stated it.
        in_header: What it reads of the header.
        named: The name of a module in a model, where names in files are the model's own; without a component where the
            file is for any. None where `spellings.py` has to say it.
        loses: Matches keys of magnitudes that the tool takes for missing, although they have a name of its parts.
        refuses: Why the tool loads nothing of a file, as the end of a sentence that begins with its name, from the
            modules (see `AdapterFile.modules`), the keys that belong to none and the header; empty where it loads the
            file.
        usage: What a person has to set in the tool, from the axes of the magnitudes; empty where there is nothing.
        renamed: The names here of modules that it calls otherwise, by their names in a file, from all of these and the
            header.
        prepared: The tensors of a module by role, from those in a file, the module and the header.
        cautions: Where it computes something else from a magnitude than from the file alone on a model that is not
            quantised, and the way out, as the ends of sentences that begin with its name.
    """

    parts: Mapping[str, str]
    computes: Computation
    names: re.Pattern[str] = re.compile("")
    table: str = ""
    wrote_key: re.Pattern[str] | None = None
    wrote_header: re.Pattern[str] | None = None
    read: Callable[[Parts, str | None], LayerState] = neutral
    in_header: HeaderReader = HeaderReader()
    named: Callable[[str], Name | None] = lambda module: None
    loses: re.Pattern[str] | None = None
    refuses: Callable[[Modules, Collection[str], Header], str] = lambda modules, others, header: ""
    usage: Callable[[Collection[str]], str] = lambda axes: ""
    renamed: Callable[[Collection[str], Header], Mapping[str, str]] = lambda modules, header: {}
    prepared: Callable[[dict[str, Tensor], str, Header], dict[str, Tensor]] = lambda parts, module, header: parts
    cautions: tuple[str, ...] = ()

    def wrote(self, keys: Collection[str], header: Header) -> bool:
        """Whether it wrote a file with these keys and this header."""
        entries = [f"{key}={value:.100}" for key, value in header.items()]
        found = ((self.wrote_key, keys), (self.wrote_header, entries))
        return any(pattern is not None and any(map(pattern.match, texts)) for pattern, texts in found)

    def roles(self, module: str, endings: Mapping[str, T]) -> dict[str, T]:
        """By role the keys, or the tensors, that the tool reads of a module; none where it does not know its name."""
        if not self.names.match(module):
            return {}
        return {self.parts[ending]: found for ending, found in endings.items() if ending in self.parts}

    def unread(self, modules: Modules, others: Collection[str]) -> list[str]:
        """The keys of a file that it does not read, from what `refuses` gets."""
        unread = [
            key
            for module, endings in modules.items()
            for ending, key in endings.items()
            if ending not in self.parts or not self.names.match(module)
        ]
        return [*unread, *others]

    def parts_of(self, module: str, tensors: Mapping[str, Tensor], header: Header) -> dict[str, Tensor]:
        """The tensors of a module by role, from those by the end of their keys; with the alpha of the header."""
        parts = self.prepared(self.roles(module, tensors), module, header)
        if "A" in parts and parts["A"].dim() and "alpha" not in parts:
            alpha = self.in_header.alpha(header, module, rank_of(parts))
            if alpha is not None:
                parts["alpha"] = torch.tensor(finite_number("alpha", alpha), dtype=torch.float64)
        elif products.method_of(parts) and (scaling := self.in_header.scaling(header, module)) is not None:
            parts["scaling"] = torch.tensor(scaling, dtype=torch.float64)
        return parts

    def loaded(self, module: str, tensors: Mapping[str, Tensor], header: Header) -> dict[str, Tensor]:
        """The tensors by role that the tool loads: those of `parts_of`, with a lost magnitude as `lost`."""
        return self.without_lost(module, self.parts_of(module, tensors, header), tensors)

    def without_lost(self, module: str, parts: dict[str, T], endings: Collection[str]) -> dict[str, T]:
        """The tensors by role, where a magnitude that the tool takes for missing has the role `lost`."""
        if self.loses and "m" in parts and any(self.loses.fullmatch(f"{module}.{ending}") for ending in endings):
            return {**{role: found for role, found in parts.items() if role != "m"}, "lost": parts["m"]}
        return parts


@dataclass(frozen=True)
class Holds:
    """The parts of an adapter that a form of file can hold.

    Attributes:
        columns: Magnitudes of input columns.
        diffs: Differences of weights.
        convolutions: Convolutions.
        extras: Differences of norms and biases.
        alpha: Any alpha; else B is scaled so that alpha is the rank, which tools that do not read it take.
        both_methods: Modules with and without a magnitude in one file; else all get one.
        tokens: Rows of new tokens: `inside` the file, in `separate` files, or nowhere (empty).
    """

    columns: bool = True
    diffs: bool = True
    convolutions: bool = True
    extras: bool = False
    alpha: bool = False
    both_methods: bool = True
    tokens: Literal["inside", "separate", ""] = "inside"


@dataclass(frozen=True)
class Export:
    """A form of file that `convert` writes.

    Attributes:
        write: The tensors of a module by the end of their keys, from the neutral form and W0. Raises ValueError where
            the form cannot hold it.
        spelling: How modules are named.
        read_by: The tools whose formula must give W' from what is written.
        holds: The parts of an adapter that it can hold.
        header: The entries that the header must have. Those named like a file are written as files in the same folder.
        file_name: The name of the file in a folder; empty for the folder's own name.
        needs_base: Whether `write` needs W0 (else only its shape, if at all).
        difference: Whether it is W' - W0, as large as W0: the check of what is written computes it, block by block.
        experts: The names in the file of all layers of stacked experts that it has, by the paths in the model that
            `spelling` gives them. None where the form cannot hold any.
        ending: The end of a key in a module, from that which `write` gives it: some tools have several.
    """

    write: Callable[[LayerState, Tensor], dict[str, Tensor]]
    spelling: Spelling
    read_by: tuple[str, ...] = ()
    holds: Holds = Holds()
    header: Callable[[Contents], dict[str, str]] = lambda contents: {}
    file_name: str = ""
    needs_base: bool = False
    difference: bool = False
    experts: Callable[[Iterable[str]], Mapping[str, str]] | None = None
    ending: Callable[[str, str], str] = lambda module, ending: ending

    def tensors(self, module: str, layer: LayerState, W0: Tensor) -> dict[str, Tensor]:
        """The tensors of a module in the file, by the end of their keys; of W0 only the shape without `needs_base`."""
        return {self.ending(module, ending): tensor for ending, tensor in self.write(layer, W0).items()}


@dataclass(frozen=True)
class Format:
    """A form of file that `save_adapter` writes.

    Attributes:
        export: The form.
        why_not: Why it cannot hold the adapters of models (by component), as a message with the way out, or None.
        module: The name of a module of a model in the file.
        parameter: The key of an extra parameter, with the adapted modules; None where the form holds only adapters.
        components: The components that it has; empty where it takes any name.
        oriented: An adapter as its tool takes the rows and columns of the weight, from the layer of the model.
    """

    export: Export
    why_not: Callable[[Mapping[str, nn.Module]], str | None]
    module: Callable[[Name], str]
    parameter: Callable[[Name, Collection[Name]], str] | None = None
    components: tuple[str, ...] = ()
    oriented: Callable[[LayerState, nn.Module], LayerState] = lambda layer, module: layer

    @property
    def file_name(self) -> str:
        """The name of the file in a folder."""
        return self.export.file_name


class Written(NamedTuple):
    """A file to be written.

    Attributes:
        export: Its form.
        path: The file.
        more: Further tensors by key.
        header: Further entries of the header.
    """

    export: Export
    path: Path
    more: Iterable[tuple[str, Tensor]] = ()
    header: Header = MappingProxyType({})


def write_file(
    file: Written,
    modules: Iterable[tuple[str, Collection[Name], DoRASpec, Mapping[str, Tensor]]],
    source: Header,
    *,
    room: int,
) -> None:
    """Writes the file of an adapter one module at a time, and the other files of its form.

    Args:
        file: The file; it is not written where a module raises an error.
        modules: The name of each module in the file, the modules of the model that it stands for, their settings, and
            its tensors by the end of their keys.
        source: The header of the file that is converted, or what is known about the adapter, which is kept but for
            local paths.
        room: More bytes than the header can need.
    """

    def fill(writer: TensorWriter) -> dict[str, str]:
        specs: dict[Name, DoRASpec] = {}
        for module, names, spec, tensors in modules:
            specs.update(dict.fromkeys(names, spec))
            for ending, tensor in tensors.items():
                writer.add(f"{module}.{ending}", tensor)
        for key, tensor in file.more:
            writer.add(key, tensor)
        contents = Contents(specs, without_local_paths(source))
        kept = {key: value for key, value in contents.source.items() if not key.startswith(_DROPPED)}
        return {**kept, **file.header, **write_companions(file.export.header(contents), file.path.parent)}

    write_tensors(file.path, room, fill)


def write_companions(header: Header, folder: Path) -> dict[str, str]:
    """Writes the entries of a header that are named like a file as files, and returns the others."""
    for name, text in header.items():
        if name.endswith(".json"):  # before the weights, which are never there alone
            write_text(folder / name, text)
    return {key: text for key, text in header.items() if not key.endswith(".json")}
