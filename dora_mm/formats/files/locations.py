"""The locations of a model's weights: the file, tensor and rows that hold the weight of each module."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dora_mm.core.wrappers.experts import projections_of
from dora_mm.formats.files.header import TensorEntry
from dora_mm.formats.files.model_class import Converter, empty_model, weights_in_class
from dora_mm.formats.files.model_folder import ModelFolder
from dora_mm.formats.files.tensor_file import PICKLES, TensorFile
from dora_mm.formats.naming.layouts import LAYOUTS
from dora_mm.formats.naming.names import NETWORKS, ModuleGroup, Name, canonical, own_table
from dora_mm.utils.json_text import read_json

COMPONENTS = (*NETWORKS, "text_encoder", "text_encoder_2", "text_encoder_3")
STEMS = ("diffusion_pytorch_model", "model")  # how the names of weight files begin in diffusers and transformers


class TensorLocation(NamedTuple):
    """The location of a weight in a checkpoint.

    Attributes:
        file: The file.
        key: The tensor.
        ranges: The ranges of rows (start, stop) of it that the weight consists of, in its order; None for all.
        transposed: Whether it is (I, O) there, or (E, I, O) of stacked experts.
        has_module: Whether it is the weight of a module of the class; else it is stacked with others in a parameter.
    """

    file: TensorFile
    key: str
    ranges: tuple[tuple[int, int], ...] | None = None
    transposed: bool = False
    has_module: bool = True

    @property
    def entry(self) -> TensorEntry:
        """The tensor that holds the weight."""
        return self.file.entries[self.key]

    @property
    def pieces(self) -> list[TensorEntry]:
        """The parts of the tensor that are the weight, in the order of its rows."""
        return [self.entry] if self.ranges is None else [self.entry.rows(*rows) for rows in self.ranges]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        shape = self.entry.shape
        if self.ranges is not None:
            shape = (sum(stop - start for start, stop in self.ranges), *shape[1:])
        return swapped(shape) if self.transposed else shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in the file."""
        return self.entry.dtype

    def read(self) -> Tensor:
        """The weight."""
        pieces = [self.file.read_entry(entry) for entry in self.pieces]
        weight = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return weight.mT.contiguous() if self.transposed else weight


def swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape whose last two dimensions are swapped."""
    return (*shape[:-2], shape[-1], shape[-2])


@dataclass(frozen=True, eq=False)
class Converted:
    """A weight that transformers makes from tensors of a checkpoint: it is read, and not written.

    Attributes:
        name: The name of the weight in the class.
        stored_shape: Its shape there.
        converter: What makes it.
        files: The files of the tensors, by key.
        transposed: Whether the class has stacked experts as (E, I, O), which are (E, O, I) here.
    """

    name: str
    stored_shape: tuple[int, ...]
    converter: Converter
    files: Mapping[str, TensorFile]
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return swapped(self.stored_shape) if self.transposed else self.stored_shape

    @property
    def file(self) -> TensorFile:
        """The file of the first tensor."""
        return self.files[self.converter.keys[0][1]]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in the file."""
        return self.file.entries[self.converter.keys[0][1]].dtype

    def read(self) -> Tensor:
        """The weight.

        Raises:
            ValueError: Its tensors do not fit the class.
        """
        weight = self.converter.weight(self.name, lambda key: self.files[key].read(key))
        if tuple(weight.shape) != self.stored_shape:
            found = tuple(weight.shape)
            raise ValueError(f"{self.file.path} gives {self.name} the shape {found} instead of {self.stored_shape}")
        return weight.mT.contiguous() if self.transposed else weight


_WEIGHT = ".weight"  # how the name of the weight of a module ends
_NETWORK = "model.diffusion_model."
_TEXT_ENCODERS = {  # what the keys of a part of a checkpoint begin with, its component, and the layout of its names
    "conditioner.embedders.0.transformer.": ("text_encoder", "clip-l"),
    "conditioner.embedders.1.model.": ("text_encoder_2", "clip-g"),
    "cond_stage_model.transformer.": ("text_encoder", "clip-l"),
    "text_encoders.clip_l.transformer.": ("text_encoder", "clip-l"),
    "text_encoders.clip_g.transformer.": ("text_encoder_2", "clip-l"),
}


def in_file(file: TensorFile) -> Found:
    """The weights of a checkpoint that is one file.

    Raises:
        ValueError: A fused weight cannot be divided.
    """
    prefixed = ((p, name, layout) for p in (_NETWORK, "") for name, layout in LAYOUTS.items() if layout.mark)
    found = ((p, n) for p, n, it in prefixed if p + it.mark in file.entries and p + it.without not in file.entries)
    prefix, network = next(found, (None, ""))
    if prefix is None:  # the only file of one network of diffusers or transformers
        return _of_network(file.path.parent, [file], [file.path])
    parts = {**_TEXT_ENCODERS, prefix: (LAYOUTS[network].component, network)}
    locations: dict[Name, TensorLocation | Converted] = {}
    for key in file.entries:
        if (begin := next((part for part in parts if key.startswith(part)), None)) is not None:
            locations |= _placed(file, key, key.removeprefix(begin), *parts[begin])
    return Found(locations, [file.path])


def _placed(file: TensorFile, key: str, own: str, component: str, layout: str) -> dict[Name, TensorLocation]:
    """The weights that a tensor of a single-file checkpoint holds; none if it is not the weight of a known module."""
    path = re.sub(r"[._]weight$", "", own)
    is_weight = path != own or own in ("text_projection", "positional_embedding")  # open_clip has no modules for them
    group = own_table(layout).get(path) if is_weight else None
    if group is None:
        return {}
    group = ModuleGroup(tuple(Name(component, name.path) for name in group.names), group.modulation)
    return _rows_of(file, key, group, transposed=own == "text_projection")


def _rows_of(file: TensorFile, key: str, group: ModuleGroup, transposed: bool) -> dict[Name, TensorLocation]:
    shape = file.entries[key].shape
    first, *others = group.names
    if len(shape) != 2 or not (group.modulation or others):
        return {first: TensorLocation(file, key, transposed=transposed)}
    try:
        pieces = group.pieces(*shape)
    except ValueError as error:
        raise ValueError(f"{file.path} does not fit its architecture at {key}: {error}") from error
    return {name: TensorLocation(file, key, tuple(ranges)) for name, ranges in zip(group.names, pieces, strict=True)}


class Found(NamedTuple):
    """The weights of a model.

    Attributes:
        locations: Where each is.
        files: The files that they are in, with the indexes of sharded ones.
        model: Of a model of transformers, its class on the meta device, by whose names the weights go; else None.
        experts: Those of stacked experts.
    """

    locations: dict[Name, TensorLocation | Converted]
    files: list[Path]
    model: nn.Module | None = None
    experts: frozenset[Name] = frozenset()


def in_folder(folder: Path) -> Found:
    """The weights of a folder.

    Raises:
        NoWeightsError: There are none, or a part of a pipeline has none.
        ValueError: A file is damaged or missing, or a pickle.
    """
    model = ModelFolder(folder)
    parts = model.components if model.index is not None else [c for c in COMPONENTS if (folder / c).is_dir()]
    components = [c for c in COMPONENTS if c in parts]
    if not components:
        tensors, files = _weight_files(folder)
        return _of_network(folder, tensors, files)
    locations: dict[Name, TensorLocation | Converted] = {}
    files: list[Path] = []
    for component in components:
        tensors, found = _weight_files(folder / component)
        locations |= _modules(component, tensors)
        files += found
    return Found(locations, files)


def _of_network(folder: Path, files: Iterable[TensorFile], paths: list[Path]) -> Found:
    """The weights of a folder of one network."""
    model_folder = ModelFolder(folder)
    component = _component_of(model_folder)
    model = empty_model(model_folder) if component == "model" else None
    if model is None:
        return Found({**_modules(component, files)}, paths)
    by_key = {key: file for file in files for key in file.entries}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    weights, experts = weights_in_class(model, by_key)
    found: dict[str, TensorLocation | Converted] = {
        name: TensorLocation(by_key[key], key, has_module=False) for name, key in experts.items()
    }
    for name, source in weights.items():
        if not isinstance(source, str):
            found |= {name: Converted(name, shapes[name], source, by_key)} if name.endswith(_WEIGHT) else {}
        elif name.endswith(_WEIGHT) or len(shapes[name]) > 1:  # stacked experts and projections have other names
            found[name] = TensorLocation(by_key[source], source, has_module=name.endswith(_WEIGHT))
    stacks = {
        f"{path}.{name}" if path else name: projection
        for path, module in model.named_modules()
        for name, projection in projections_of(module).items()
    }
    for path, projection in stacks.items():
        parameter = f"{path.rpartition('.')[0]}.{projection.parameter}".removeprefix(".")
        source, transposed = weights.get(parameter), projection.transposed
        if isinstance(source, str):
            found[path] = TensorLocation(by_key[source], source, transposed=transposed)
        elif source is not None:
            found[path] = Converted(parameter, shapes[parameter], source, by_key, transposed)
        found.pop(parameter, None)
    locations = {canonical(component, name.removesuffix(_WEIGHT)): location for name, location in found.items()}
    experts = frozenset(canonical(component, path) for path in stacks if path in found)
    return Found(locations, paths, model, experts)


def _modules(component: str, files: Iterable[TensorFile]) -> dict[Name, TensorLocation]:
    return {
        canonical(component, key.removesuffix(".weight")): TensorLocation(file, key)
        for file in files
        for key in file.entries
        if key.endswith(".weight")
    }


def _component_of(folder: ModelFolder) -> str:
    """The component of a folder of one network: `unet` or `transformer` of diffusers, else `model`."""
    kind = str(folder.config().get("_class_name", "")) if folder.has_config() else ""
    return "unet" if kind.startswith("UNet") else "transformer" if "Transformer" in kind else "model"


class NoWeightsError(ValueError):
    """A folder without weights."""


def _weight_files(folder: Path) -> tuple[list[TensorFile], list[Path]]:
    """The weights of one network, one file or shards, and the paths of the files, with the index of shards.

    Of several variants it takes the one without a name, which has the full precision.
    """
    found = next((path for stem in STEMS for path in _candidates(folder, stem)), None)
    if found is None:
        pickles = any(path.suffix in PICKLES for path in folder.glob("*"))
        reason = "only pickles, which can run code when they are loaded" if pickles else "no weights"
        raise NoWeightsError(f"{folder} has {reason}: it needs {' or '.join(f'{stem}.safetensors' for stem in STEMS)}")
    if found.suffix != ".json":
        return [TensorFile(found)], [found]
    listed = read_json(found).get("weight_map")
    shards = {key: str(name) for key, name in listed.items()} if isinstance(listed, dict) else {}
    names = sorted(set(shards.values()))
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"{found} does not list the files of a sharded model")
    files = {name: TensorFile(folder / name) for name in names}
    if missing := [key for key, name in shards.items() if key not in files[name].entries]:
        raise ValueError(f"{folder} is incomplete: {missing[0]}, which {found.name} lists, is missing")
    return list(files.values()), [found, *(file.path for file in files.values())]


def _candidates(folder: Path, stem: str) -> list[Path]:
    standard = [folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"]
    indexes, files = folder.glob(f"{stem}.safetensors.index.*.json"), folder.glob(f"{stem}.*.safetensors")
    return [path for path in standard if path.is_file()] + sorted(indexes) + sorted(files)  # an index before its shards
