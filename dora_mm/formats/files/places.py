"""Where the weights of a model are: which file, tensor and rows hold the weight of each module."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from dora_mm.formats.files.header import TensorEntry
from dora_mm.formats.files.json_text import read_json
from dora_mm.formats.files.tensor_file import PICKLES, TensorFile
from dora_mm.formats.naming.layouts import LAYOUTS
from dora_mm.formats.naming.names import NETWORKS, ModuleGroup, Name, canonical, own_table

COMPONENTS = (*NETWORKS, "text_encoder", "text_encoder_2", "text_encoder_3")
STEMS = ("diffusion_pytorch_model", "model")  # how the names of weight files begin in diffusers and transformers


class Place(NamedTuple):
    """Where a weight is: the ranges of rows (start, stop) of a tensor that it consists of, in its order; or all."""

    file: TensorFile
    key: str
    ranges: tuple[tuple[int, int], ...] | None = None
    transposed: bool = False

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
        return shape[::-1] if self.transposed else shape


_NETWORK = "model.diffusion_model."
_TEXT_ENCODERS = {  # what the keys of a part of a checkpoint begin with, its component, and the layout of its names
    "conditioner.embedders.0.transformer.": ("text_encoder", "clip-l"),
    "conditioner.embedders.1.model.": ("text_encoder_2", "clip-g"),
    "cond_stage_model.transformer.": ("text_encoder", "clip-l"),
    "text_encoders.clip_l.transformer.": ("text_encoder", "clip-l"),
    "text_encoders.clip_g.transformer.": ("text_encoder_2", "clip-l"),
}


def in_file(file: TensorFile) -> dict[Name, Place]:
    """The weights of a checkpoint that is one file.

    Raises:
        ValueError: A fused weight cannot be divided.
    """
    prefixed = ((p, name, layout) for p in (_NETWORK, "") for name, layout in LAYOUTS.items() if layout.mark)
    found = ((p, n) for p, n, it in prefixed if p + it.mark in file.entries and p + it.without not in file.entries)
    prefix, network = next(found, (None, ""))
    if prefix is None:  # the only file of one network of diffusers or transformers
        return _modules(_component_of(file.path.parent), [file])
    parts = {**_TEXT_ENCODERS, prefix: (LAYOUTS[network].component, network)}
    places: dict[Name, Place] = {}
    for key in file.entries:
        if (begin := next((part for part in parts if key.startswith(part)), None)) is not None:
            places |= _placed(file, key, key.removeprefix(begin), *parts[begin])
    return places


def _placed(file: TensorFile, key: str, own: str, component: str, layout: str) -> dict[Name, Place]:
    """The weights that a tensor of a single-file checkpoint holds; none if it is not the weight of a known module."""
    path = re.sub(r"[._]weight$", "", own)
    is_weight = path != own or own in ("text_projection", "positional_embedding")  # open_clip has no modules for them
    group = own_table(layout).get(path) if is_weight else None
    if group is None:
        return {}
    group = ModuleGroup(tuple(Name(component, name.path) for name in group.names), group.modulation)
    return _rows_of(file, key, group, transposed=own == "text_projection")


def _rows_of(file: TensorFile, key: str, group: ModuleGroup, transposed: bool) -> dict[Name, Place]:
    shape = file.entries[key].shape
    first, *others = group.names
    if len(shape) != 2 or not (group.modulation or others):
        return {first: Place(file, key, transposed=transposed)}
    try:
        pieces = group.pieces(*shape)
    except ValueError as error:
        raise ValueError(f"{file.path} does not fit its architecture at {key}: {error}") from error
    return {name: Place(file, key, tuple(ranges)) for name, ranges in zip(group.names, pieces, strict=True)}


def in_folder(folder: Path) -> tuple[dict[Name, Place], list[Path]]:
    """The weights of a folder, and the files that they are in, with the indexes of sharded ones.

    Raises:
        NoWeightsError: There are none, or a part of a pipeline has none.
        ValueError: A file is damaged or missing, or a pickle.
    """
    index = folder / "model_index.json"
    parts = read_json(index) if index.is_file() else {c: True for c in COMPONENTS if (folder / c).is_dir()}
    components = [c for c in COMPONENTS if parts.get(c) not in (None, [None, None])]
    if not components:
        tensors, files = _weight_files(folder)
        return _with_tied(_modules(_component_of(folder), tensors), folder), files
    places: dict[Name, Place] = {}
    files: list[Path] = []
    for component in components:
        tensors, found = _weight_files(folder / component)
        places |= _modules(component, tensors)
        files += found
    return places, files


def _modules(component: str, files: Iterable[TensorFile]) -> dict[Name, Place]:
    return {
        canonical(component, key.removesuffix(".weight")): Place(file, key)
        for file in files
        for key in file.entries
        if key.endswith(".weight")
    }


def _component_of(folder: Path) -> str:
    """The component of a folder of one network: `unet` or `transformer` of diffusers, else `model`."""
    config = folder / "config.json"
    kind = str(read_json(config).get("_class_name", "")) if config.is_file() else ""
    return "unet" if kind.startswith("UNet") else "transformer" if "Transformer" in kind else "model"


def _with_tied(places: dict[Name, Place], folder: Path) -> dict[Name, Place]:
    """Adds the output layer of a language model that shares the weight of its input embedding, which is stored once."""
    config = folder / "config.json"
    kinds = str(read_json(config).get("architectures", "")) if config.is_file() else ""
    head = Name("model", "lm_head")
    embeddings = [n for n in places if re.search(r"(^|\.)(embed_tokens|shared|wte|word_embeddings)$", n.path)]
    generative = re.search("ForCausalLM|ForConditionalGeneration|LMHead", kinds)
    if generative and len(embeddings) == 1 and not any(name.path.endswith("lm_head") for name in places):
        return {**places, head: places[embeddings[0]]}
    return places


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
    plain = [folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"]
    indexes, files = folder.glob(f"{stem}.safetensors.index.*.json"), folder.glob(f"{stem}.*.safetensors")
    return [path for path in plain if path.is_file()] + sorted(indexes) + sorted(files)  # an index before its shards
