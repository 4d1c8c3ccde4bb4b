"""The weights W0 of a base model by module, read one at a time, and copies of the model with some of them replaced."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dora_mm.formats.files.checks import DTYPES
from dora_mm.formats.files.header import TensorEntry
from dora_mm.formats.files.locations import STEMS, Converted, Found, NoWeightsError, TensorLocation, in_file, in_folder
from dora_mm.formats.files.tensor_file import FORMAT_KEY, PICKLES, TensorFile, copy_around
from dora_mm.formats.naming.names import Name, resolve
from dora_mm.utils.atomic import write_atomically
from dora_mm.utils.folders import check_entry, written_at_once
from dora_mm.utils.messages import first_line
from dora_mm.utils.progress import tracked

_OTHER_WEIGHTS = (*PICKLES, ".safetensors", ".msgpack", ".h5", ".onnx", ".onnx_data", ".gguf", ".xml")
_OF_ADAPTERS = re.compile(r"\.(lora_(A|B|down|up|mid|magnitude_vector)|dora_scale|magnitude|diff|weight_m_wdecomp)\b")


class BaseWeights(Mapping[Name, Tensor]):
    """The weights of the modules of a model that is not loaded: `weights[name]` reads W0 from the file.

    It holds every module that has a `weight`, (O, I) or (O, I / groups, *K), in the dtype and layout of the file.
    `Names(weights)` knows its modules.

    Attributes:
        source: The folder or file.
        files: The files of the weights in it, with the indexes of sharded ones.
        model: Of a model of transformers, its class on the meta device: modules have their names in it, not those of
            the files. None for others.
        experts: The layers of stacked experts, whose weights are (E, O, I).
    """

    def __init__(self, source: Path, found: Found):
        self.source, self.model, self.experts = source, found.model, found.experts
        self.files = frozenset(found.files)
        self._spans = found.locations
        self._uses = Counter(self._spans.values())

    @classmethod
    def open(cls, path: str | Path, revision: str | None = None) -> BaseWeights:
        """Opens a model; only headers are read.

        Args:
            path: A diffusers pipeline folder; a folder of one network of diffusers or transformers, sharded or not; a
                single-file checkpoint (`.safetensors`) in the names of an architecture of `naming/layouts.py`; or a hub
                name, which is downloaded where it is not in the cache.
            revision: A commit, branch or tag, for a hub name.

        Raises:
            ValueError: There is no such model, it cannot be downloaded, it is a pickle, or its files are damaged.
        """
        local = Path(path)
        if local.is_dir():
            return cls(local, in_folder(local))
        if local.is_file():
            return cls(local, _of_file(TensorFile(local)))
        if local.suffix in (*PICKLES, ".safetensors") or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            raise ValueError(f"there is no model at {path}: give a folder, a .safetensors file or a hub name")
        folder = _from_hub(str(path), revision)
        return cls(folder, in_folder(folder))

    def __getitem__(self, name: Name) -> Tensor:
        """W0, in the dtype of the file.

        Raises:
            KeyError: There is no such module; `find` has a message for people.
            ValueError: The weight is quantised, or the file cannot be read.
        """
        span = self._spans[name]
        _check_dtype(name, span)
        return span.read()

    def __contains__(self, name: object) -> bool:
        return name in self._spans

    def __iter__(self) -> Iterator[Name]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)

    def shape(self, name: Name) -> tuple[int, ...]:
        """The shape of W0, from the header."""
        return self._spans[name].shape

    def dtype(self, name: Name) -> torch.dtype:
        """The dtype of W0, from the header."""
        return self._spans[name].dtype

    def has_module(self, name: Name) -> bool:
        """Whether a weight is that of a module: some classes stack experts, or the rows of projections."""
        span = self._spans[name]
        return isinstance(span, Converted) or span.has_module

    def find(self, name: Name) -> Name:
        """The name under which these weights have a module.

        See `names.resolve`: the parts of a path that wrap a network may differ, and component `model` stands for any.

        Raises:
            ValueError: There is no such module, or there are several; the message has the nearest names.
        """
        return resolve(name, self._spans)

    def span(self, name: Name) -> TensorLocation:
        """The location of a weight that can be replaced.

        Raises:
            ValueError: There is no such module, it is quantised, transformers makes it from other tensors, or another
                module shares its weight.
        """
        span = self._spans[self.find(name)]
        _check_dtype(name, span)
        if isinstance(span, Converted):
            kind = type(span.converter.model).__name__
            problem = f"{self.source} stores {name} in another form than {kind} has it"
            raise ValueError(f"{problem}: use dora-mm merge, which loads the model")
        if self._uses[span] > 1:
            names = " and ".join(str(other) for other, shared in self._spans.items() if shared == span)
            raise ValueError(f"{self.source} cannot be merged: {names} share one weight")
        return span


def _of_file(file: TensorFile) -> Found:
    key = next(filter(_OF_ADAPTERS.search, file.entries), None)
    if key or FORMAT_KEY in file.metadata:
        raise ValueError(f"{file.path} is not a model but an adapter: it has {key or FORMAT_KEY}")
    if not (found := in_file(file)).locations:
        raise NoWeightsError(f"{file.path} has no weights of a model")
    return found


def _check_dtype(name: Name, span: TensorLocation | Converted) -> None:
    if span.dtype not in DTYPES:
        raise ValueError(
            f"{span.file.path} stores {name} as {span.dtype}: use the model in 16 or 32 bits, not quantised"
        )


# --- the hub ---------------------------------------------------------------------------------------------------------


_WANTED = [f"{folder}{stem}*.safetensors*" for folder in ("", "*/") for stem in STEMS]
_WANTED += ["*.json", "*.txt", "*.model"]  # configs and tokenizers
_VARIANTS = ["*model.fp16*", "*model.bf16*", "*model.non_ema*", "*.index.*.json"]


def _from_hub(name: str, revision: str | None) -> Path:
    """The folder of a hub repository in the cache, downloaded where its weights are missing there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    reason = ""
    for only_cached, ignored in ((True, None), (False, _VARIANTS), (False, None)):
        try:
            folder = snapshot_download(
                name, revision=revision, allow_patterns=_WANTED, ignore_patterns=ignored, local_files_only=only_cached
            )
            in_folder(Path(folder))
            return Path(folder)
        except (LocalEntryNotFoundError, NoWeightsError, HfHubHTTPError, HFValidationError, OSError) as error:
            reason = first_line(error)
    raise ValueError(
        f"{name} is neither a local folder or file nor complete in the cache, and cannot be downloaded: {reason}"
    )


# --- writing ---------------------------------------------------------------------------------------------------------


def write_merged(base: BaseWeights, target: Path, update: Mapping[Name, Tensor]) -> None:
    """Writes a copy of a model in which some weights are replaced, atomically; it reads and writes one at a time.

    Everything else is copied: other tensors bit for bit, headers, configs, tokenizers. Weights in another precision or
    format (`.fp16`, `.bin`) than those that `base` reads are left out, as they would not be updated.

    Args:
        base: The model.
        target: A file where `base` is a file, else a folder, which must not exist.
        update: The new weights by name, finite and in the shape of W0; each is rounded to the dtype of the file.
            `update[name]` is called once per weight, in the order of the file, so a mapping that computes them on
            demand holds one in memory, or those of one fused tensor.

    Raises:
        ValueError: `target` exists or is of the wrong kind, or a weight is unknown, has another shape, or is tied
            to another one that would change with it; or a file is a link that leads out of the model.
        OSError: It cannot be written.
    """
    _check_target(base, target)
    changes: dict[Path, list[tuple[Name, TensorLocation]]] = defaultdict(list)
    for name in update:
        span = base.span(name)
        changes[span.file.path].append((name, span))
    if base.source.is_file():
        write_atomically(target, lambda partial: _copy(base.source, partial, changes[base.source], update), is_new=True)
        return
    covered = {base.source, *(file.parent for file in base.files)}
    with written_at_once(target) as partial:
        for path in _files_below(base.source):
            if path in base.files or path.parent not in covered or not _is_weight(path):
                if path not in base.files:
                    check_entry(path, base.source)
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


def _copy(
    source: Path, target: Path, changes: list[tuple[Name, TensorLocation]], update: Mapping[Name, Tensor]
) -> None:
    """A copy of a file with other weights; each byte is written once."""
    order = [(piece, name, span) for name, span in changes for piece in span.pieces]
    copy_around(source, target, _in_order(sorted(order, key=lambda one: (one[0].offset, one[0].num_bytes)), update))


def _in_order(
    order: list[tuple[TensorEntry, Name, TensorLocation]], update: Mapping[Name, Tensor]
) -> Iterator[tuple[TensorEntry, Tensor]]:
    """The new values in the order of a file; the rows of a weight may lie between those of others."""
    waiting: dict[TensorEntry, Tensor] = {}
    for piece, name, span in tracked(order, "merging", "modules"):
        if piece not in waiting:
            waiting |= _pieces(name, span, update[name])
        yield piece, waiting.pop(piece)


def _pieces(name: Name, span: TensorLocation, weight: Tensor) -> dict[TensorEntry, Tensor]:
    """The parts of a new weight as they are in the file."""
    if tuple(weight.shape) != span.shape:
        raise ValueError(f"the new weight of {name} has shape {tuple(weight.shape)} instead of {span.shape}")
    weight = weight.detach().cpu().to(span.entry.dtype)
    weight = weight.mT if span.transposed else weight
    parts = [weight] if span.ranges is None else weight.split([piece.shape[0] for piece in span.pieces])
    return dict(zip(span.pieces, parts, strict=True))
