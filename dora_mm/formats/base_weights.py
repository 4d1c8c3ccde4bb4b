"""The weights W0 of a base model by module, read one at a time, and copies of the model with some of them replaced."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dora_mm.formats.layouts import LAYOUTS
from dora_mm.formats.names import NETWORKS, Name, Target, canonical, own_target, resolve
from dora_mm.formats.tensor_file import MAX_HEADER, PICKLES, Entry, TensorFile, overwrite
from dora_mm.utils.atomic import write_atomically
from dora_mm.utils.folders import written_at_once
from dora_mm.utils.messages import first_line

_STEMS = ("diffusion_pytorch_model", "model")
COMPONENTS = (*NETWORKS, "text_encoder", "text_encoder_2", "text_encoder_3")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_OTHER_WEIGHTS = (*PICKLES, ".safetensors", ".msgpack", ".h5", ".onnx", ".onnx_data", ".gguf", ".xml")


class _Place(NamedTuple):
    """Where a weight is: the ranges of rows (start, stop) of a tensor that it consists of, in its order; or all."""

    file: TensorFile
    key: str
    ranges: tuple[tuple[int, int], ...] | None = None
    transposed: bool = False

    @property
    def entry(self) -> Entry:
        return self.file.entries[self.key]

    @property
    def pieces(self) -> list[Entry]:
        return [self.entry] if self.ranges is None else [self.entry.rows(*rows) for rows in self.ranges]

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.entry.shape
        if self.ranges is not None:
            shape = (sum(stop - start for start, stop in self.ranges), *shape[1:])
        return shape[::-1] if self.transposed else shape


class BaseWeights(Mapping[Name, Tensor]):
    """The weights of the modules of a model that is not loaded: `weights[name]` reads W0 from the file.

    It holds every module that has a `weight`, (O, I) or (O, I / groups, *K), in the dtype and layout of the file.
    `Names(weights)` knows its modules.

    Attributes:
        source: The folder or file.
        files: The files of the weights in it, with the indexes of sharded ones.
    """

    def __init__(self, source: Path, places: Mapping[Name, _Place], files: Iterable[Path]):
        self.source = source
        self.files = frozenset(files)
        self._places = dict(places)
        self._uses = Counter(self._places.values())

    @classmethod
    def open(cls, path: str | Path, revision: str | None = None) -> BaseWeights:
        """Opens a model; only headers are read.

        Args:
            path: A diffusers pipeline folder; a folder of one network of diffusers or transformers, sharded or not; a
                single-file checkpoint (`.safetensors`) of SDXL in SGM's names, or of Stable Diffusion 1, Flux, SD3,
                Z-Image or Qwen-Image in their own; or a hub name, which is downloaded where it is not in the cache.
            revision: A commit, branch or tag, for a hub name.

        Raises:
            ValueError: There is no such model, it cannot be downloaded, it is a pickle, or its files are damaged.
        """
        local = Path(path)
        if local.is_dir():
            return cls(local, *_in_folder(local))
        if local.is_file():
            return cls(local, _in_file(TensorFile(local)), [local])
        if local.suffix in (*PICKLES, ".safetensors") or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            raise ValueError(f"there is no model at {path}: give a folder, a .safetensors file or a hub name")
        folder = _from_hub(str(path), revision)
        return cls(folder, *_in_folder(folder))

    def __getitem__(self, name: Name) -> Tensor:
        """W0, in the dtype of the file.

        Raises:
            KeyError: There is no such module; `find` has a message for people.
            ValueError: The weight is quantised, or the file cannot be read.
        """
        place = self._places[name]
        _check_dtype(name, place)
        pieces = [place.file.read_entry(entry) for entry in place.pieces]
        weight = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return weight.T.contiguous() if place.transposed else weight

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[Name]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: Name) -> tuple[int, ...]:
        """The shape of W0, from the header."""
        return self._places[name].shape

    def dtype(self, name: Name) -> torch.dtype:
        """The dtype of W0, from the header."""
        return self._places[name].entry.dtype

    def find(self, name: Name) -> Name:
        """The name under which these weights have a module.

        The component `model` stands for the only component; the first part of the path, such as `model.`, may be
        missing on either side, where only one module fits.

        Raises:
            ValueError: There is no such module, or there are several; the message has the nearest names.
        """
        return resolve(name, self._places)

    def place(self, name: Name) -> _Place:
        """Where a weight is stored that can be replaced.

        Raises:
            ValueError: There is no such module, it is quantised, or another module shares its weight.
        """
        place = self._places[self.find(name)]
        _check_dtype(name, place)
        if self._uses[place] > 1:
            names = " and ".join(str(other) for other, shared in self._places.items() if shared == place)
            raise ValueError(f"{self.source} cannot be merged: {names} share one weight")
        return place


def _check_dtype(name: Name, place: _Place) -> None:
    if place.entry.dtype not in _FLOATS:
        raise ValueError(
            f"{place.file.path} stores {name} as {place.entry.dtype}: use the model in 16 or 32 bits, not quantised"
        )


# --- reading ---------------------------------------------------------------------------------------------------------

_NETWORK = "model.diffusion_model."
_TEXT_ENCODERS = {  # what the keys of a part of a checkpoint begin with, its component, and the layout of its names
    "conditioner.embedders.0.transformer.": ("text_encoder", "clip-l"),
    "conditioner.embedders.1.model.": ("text_encoder_2", "clip-g"),
    "cond_stage_model.transformer.": ("text_encoder", "clip-l"),
    "text_encoders.clip_l.transformer.": ("text_encoder", "clip-l"),
    "text_encoders.clip_g.transformer.": ("text_encoder_2", "clip-l"),
}
_MARKS = {  # a key of each layout that is in none of the layouts after it
    "sdxl": "label_emb.0.0.weight",
    "sd1": "input_blocks.0.0.weight",
    "flux2": "double_stream_modulation_img.lin.weight",
    "flux": "double_blocks.0.img_attn.qkv.weight",
    "sd3": "joint_blocks.0.x_block.attn.qkv.weight",
    "z-image": "noise_refiner.0.attention.qkv.weight",
    "qwen-image": "transformer_blocks.0.img_mod.1.weight",
}


def _in_file(file: TensorFile) -> dict[Name, _Place]:
    found = ((p, layout) for p in (_NETWORK, "") for layout, mark in _MARKS.items() if p + mark in file.entries)
    prefix, network = next(found, (None, ""))
    if prefix is None:  # the only file of one network of diffusers or transformers
        return _modules(_component_of(file.path.parent), [file])
    parts = {**_TEXT_ENCODERS, prefix: (LAYOUTS[network][0], network)}
    places: dict[Name, _Place] = {}
    for key in file.entries:
        if (begin := next((part for part in parts if key.startswith(part)), None)) is not None:
            places |= _placed(file, key, key.removeprefix(begin), *parts[begin])
    return places


def _placed(file: TensorFile, key: str, own: str, component: str, layout: str) -> dict[Name, _Place]:
    """The weights that a tensor of a single-file checkpoint holds; none if it is not the weight of a known module."""
    path = re.sub(r"[._]weight$", "", own)
    is_weight = path != own or own in ("text_projection", "positional_embedding")  # open_clip has no modules for them
    target = own_target(layout, path) if is_weight else None
    if target is None:
        return {}
    target = Target(tuple(Name(component, name.path) for name in target.names), target.modulation)
    return _rows_of(file, key, target, transposed=own == "text_projection")


def _rows_of(file: TensorFile, key: str, target: Target, transposed: bool) -> dict[Name, _Place]:
    shape = file.entries[key].shape
    if len(shape) != 2 or not (target.modulation or len(target.names) > 1):
        return {target.names[0]: _Place(file, key, transposed=transposed)}
    try:
        pieces = target.pieces(*shape)
    except ValueError as error:
        raise ValueError(f"{file.path} does not fit its architecture at {key}: {error}") from error
    return {name: _Place(file, key, tuple(ranges)) for name, ranges in zip(target.names, pieces, strict=True)}


def _in_folder(folder: Path) -> tuple[dict[Name, _Place], list[Path]]:
    """The weights of a folder, and the files that they are in."""
    index = folder / "model_index.json"
    parts = _json(index) if index.is_file() else {c: True for c in COMPONENTS if (folder / c).is_dir()}
    components = [c for c in COMPONENTS if parts.get(c) not in (None, [None, None])]
    if not components:
        tensors, files = _weight_files(folder)
        return _with_tied(_modules(_component_of(folder), tensors), folder), files
    places: dict[Name, _Place] = {}
    files: list[Path] = []
    for component in components:
        tensors, found = _weight_files(folder / component)
        places |= _modules(component, tensors)
        files += found
    return places, files


def _modules(component: str, files: Iterable[TensorFile]) -> dict[Name, _Place]:
    return {
        canonical(component, key.removesuffix(".weight")): _Place(file, key)
        for file in files
        for key in file.entries
        if key.endswith(".weight")
    }


def _component_of(folder: Path) -> str:
    """The component of a folder of one network: `unet` or `transformer` of diffusers, else `model`."""
    config = folder / "config.json"
    kind = str(_json(config).get("_class_name", "")) if config.is_file() else ""
    return "unet" if kind.startswith("UNet") else "transformer" if "Transformer" in kind else "model"


def _with_tied(places: dict[Name, _Place], folder: Path) -> dict[Name, _Place]:
    """Adds the output layer of a language model that shares the weight of its input embedding, which is stored once."""
    config = folder / "config.json"
    kinds = str(_json(config).get("architectures", "")) if config.is_file() else ""
    head = Name("model", "lm_head")
    embeddings = [n for n in places if re.search(r"(^|\.)(embed_tokens|shared|wte|word_embeddings)$", n.path)]
    generative = re.search("ForCausalLM|ForConditionalGeneration|LMHead", kinds)
    if generative and len(embeddings) == 1 and not any(name.path.endswith("lm_head") for name in places):
        return {**places, head: places[embeddings[0]]}
    return places


class _NoWeightsError(ValueError):
    """A folder without weights."""


def _weight_files(folder: Path) -> tuple[list[TensorFile], list[Path]]:
    """The weights of one network, one file or shards, and the paths of the files, with the index of shards.

    Of several variants it takes the one without a name, which has the full precision.
    """
    found = next((path for stem in _STEMS for path in _candidates(folder, stem)), None)
    if found is None:
        pickles = any(path.suffix in PICKLES for path in folder.glob("*"))
        reason = "only pickles, which can run code when they are loaded" if pickles else "no weights"
        raise _NoWeightsError(
            f"{folder} has {reason}: it needs {' or '.join(f'{stem}.safetensors' for stem in _STEMS)}"
        )
    if found.suffix != ".json":
        return [TensorFile(found)], [found]
    shards = _json(found).get("weight_map")
    names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"{found} does not list the files of a sharded model")
    files = {name: TensorFile(folder / name) for name in names}
    if missing := [key for key, name in shards.items() if key not in files[str(name)].entries]:
        raise ValueError(f"{folder} is incomplete: {missing[0]}, which {found.name} lists, is missing")
    return list(files.values()), [found, *(file.path for file in files.values())]


def _candidates(folder: Path, stem: str) -> list[Path]:
    plain = [folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"]
    variants = [*folder.glob(f"{stem}.*.safetensors"), *folder.glob(f"{stem}.safetensors.index.*.json")]
    return [p for p in plain if p.is_file()] + sorted(variants)


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_HEADER:
            raise ValueError(f"it has more than {MAX_HEADER} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} cannot be read: it is not a table")
    return found


# --- the hub ---------------------------------------------------------------------------------------------------------


_WANTED = [f"{folder}{stem}*.safetensors*" for folder in ("", "*/") for stem in _STEMS]
_WANTED += ["*.json", "*.txt", "*.model"]  # configs and tokenizers
_VARIANTS = ["*model.fp16*", "*model.bf16*", "*model.non_ema*", "*.index.*.json"]


def _from_hub(name: str, revision: str | None) -> Path:
    """The folder of a hub repository in the cache, downloaded where its weights are missing there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    reason = ""
    for how in ({"local_files_only": True}, {"ignore_patterns": _VARIANTS}, {}):
        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED, **how))
            _in_folder(folder)
            return folder
        except (LocalEntryNotFoundError, _NoWeightsError, HfHubHTTPError, HFValidationError, OSError) as error:
            reason = first_line(error)
    raise ValueError(
        f"{name} is neither a local folder or file nor complete in the cache, and cannot be downloaded ({reason}): name "
        "a local folder, or go online once"
    )


# --- writing ---------------------------------------------------------------------------------------------------------


def write_merged(base: BaseWeights, target: Path, update: Mapping[Name, Tensor]) -> None:
    """Writes a copy of a model in which some weights are replaced, atomically; it reads and writes one at a time.

    Everything else is copied: other tensors bit for bit, headers, configs, tokenizers. Weights in another precision or
    format (`.fp16`, `.bin`) than those that `base` reads are left out, as they would not be updated.

    Args:
        base: The model.
        target: A file where `base` is a file, else a folder, which must not exist.
        update: The new weights by name, in the shape of W0; each is rounded to the dtype of the file. `update[name]` is
            called once per weight, so a mapping that computes them on demand holds one in memory.

    Raises:
        ValueError: `target` exists or is of the wrong kind, or a weight is unknown, not finite, has another shape, or
            is tied to another one that would change with it.
        OSError: It cannot be written.
    """
    _check_target(base, target)
    changes: dict[Path, list[tuple[Name, _Place]]] = defaultdict(list)
    for name in update:
        place = base.place(name)
        changes[place.file.path].append((name, place))
    if base.source.is_file():
        write_atomically(target, lambda partial: _copy(base.source, partial, changes[base.source], update))
        return
    covered = {base.source, *(file.parent for file in base.files)}
    with written_at_once(target) as partial:
        for path in _files_below(base.source):
            if path in base.files or path.parent not in covered or not _is_weight(path):
                copy = partial / path.relative_to(base.source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                _copy(path, copy, changes.get(path, []), update)


def _check_target(base: BaseWeights, target: Path) -> None:
    if base.source.is_file() and (target.is_dir() or target.suffix != ".safetensors"):
        raise ValueError(f"{base.source} is a file, so its merged copy {target} needs a name that ends in .safetensors")
    if base.source.is_dir() and (target.exists() or target.suffix == ".safetensors"):
        problem = "exists" if target.exists() else "is the name of a file"
        raise ValueError(f"{base.source} is a folder, and its merged copy {target} {problem}: name a new folder")
    if target.resolve().is_relative_to(base.source.resolve()):
        raise ValueError(f"{target} is the model itself or inside it: name another place")


def _files_below(folder: Path) -> Iterator[Path]:
    """The files of a folder and its subfolders, except hidden ones."""
    for path in sorted(folder.iterdir()):
        if not path.name.startswith("."):
            yield from _files_below(path) if path.is_dir() else [path]


def _is_weight(path: Path) -> bool:
    return path.name.endswith(_OTHER_WEIGHTS) or ".safetensors.index." in path.name


def _copy(source: Path, target: Path, changes: list[tuple[Name, _Place]], update: Mapping[Name, Tensor]) -> None:
    shutil.copyfile(source, target)
    for name, place in changes:
        weight = update[name]
        if tuple(weight.shape) != place.shape:
            raise ValueError(f"the new weight of {name} has shape {tuple(weight.shape)} instead of {place.shape}")
        weight = weight.detach().cpu().to(place.entry.dtype)
        if not bool(weight.isfinite().all()):
            raise ValueError(f"the new weight of {name} is not finite in {place.entry.dtype}")
        weight = weight.T if place.transposed else weight
        start = 0
        for piece in place.pieces:
            overwrite(target, piece, weight[start : start + piece.shape[0]] if piece.shape else weight)
            start += piece.shape[0] if piece.shape else 0
