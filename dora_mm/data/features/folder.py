"""A folder of visual features: shards of one tensor each, and an index that says what made them.

    index.json                       identity of the tower, sizes, and how many rows each shard has
    features-00001.safetensors       "features" (N, S, D); metadata: identity, names and digests of N pictures

A shard counts from the moment the index lists it, so that an interruption loses one shard at most. A picture that was
computed again stands in a later shard, which goes before the earlier ones.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dora_mm.utils.atomic import save_tensors, write_text

log = logging.getLogger(__name__)
INDEX = "index.json"
FORMAT = "dora-mm features 1"
SHARD_BYTES = 64_000_000  # 320 pictures of RN101: two minutes of one CPU core
TENSOR = "features"
AGAIN = "run dora-mm features again"


@dataclass(frozen=True)
class Index:
    """identity: VisionTower's. num_tokens, dim: S and D. shards: number of rows by file name, in order."""

    tower: str
    identity: str
    num_tokens: int
    dim: int
    dtype: str
    format: str = FORMAT
    shards: dict[str, int] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        write_text(folder / INDEX, json.dumps(asdict(self), indent=1) + "\n")


class Shard(NamedTuple):
    names: list[str]
    digests: list[str]
    rows: Any  # a lazy slice of (N, S, D)


def picture_digest(path: Path) -> str:
    """What a picture file holds, for the question whether it has changed. OSError where it cannot be read."""
    with path.open("rb") as file:
        digest = hashlib.blake2b(digest_size=16)
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_index(folder: Path) -> Index:
    """Raises ValueError where it is missing or no index of ours."""
    path = folder / INDEX
    try:
        index = Index(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as the index of a folder of features ({error})") from error
    if index.format != FORMAT:
        raise ValueError(f"{path} is of format {index.format!r}, and this program reads {FORMAT!r}")
    if any(Path(name).name != name for name in index.shards):
        raise ValueError(f"{path} names a file outside its folder")
    return index


def open_shard(folder: Path, index: Index, name: str) -> Shard:
    """Reads the header; rows are read when they are asked for. Raises ValueError for what the index says otherwise."""
    path = folder / name
    try:
        file: Any = safe_open(path, framework="pt").__enter__()  # stays open as long as its slice
        metadata = file.metadata() or {}
        names, digests = (json.loads(metadata[key]) for key in ("names", "digests"))
        rows = file.get_slice(TENSOR)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is missing or no whole file ({error}): {AGAIN}") from error
    if metadata.get("identity") != index.identity:
        raise ValueError(f"{path} was made by another tower than {folder / INDEX} says: delete it and {AGAIN}")
    expected = [index.shards[name], index.num_tokens, index.dim]
    if rows.get_shape() != expected or not len(names) == len(digests) == expected[0]:
        found = f"{len(names)} names and features of {tuple(rows.get_shape())}"
        raise ValueError(f"{path} has {found}, and {INDEX} says {tuple(expected)}: delete it and {AGAIN}")
    return Shard(names, digests, rows)


class FeatureFolder:
    """Reads a folder: name -> (S, D). Shards are memory-mapped, rows are read when asked for."""

    def __init__(self, folder: Path):
        self.path = folder
        self.index = read_index(folder)
        self.dim = self.index.dim
        self._shards: dict[str, Shard] = {}
        self._places: dict[str, tuple[str, int]] = {}
        for shard in self.index.shards:
            for row, name in enumerate(self._open(shard).names):
                self._places[name] = (shard, row)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def read(self, name: str) -> Tensor:
        shard, row = self._places[name]
        return self._open(shard).rows[row]

    def where(self, name: str) -> Path:
        return self.path / self._places[name][0]

    def _open(self, shard: str) -> Shard:
        if shard not in self._shards:
            self._shards[shard] = open_shard(self.path, self.index, shard)
        return self._shards[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}  # a process that gets this by pickling opens the files itself


class FeatureWriter:
    """Adds features to a folder, shard by shard; what is in it already is kept. As a context, it writes what is left.

    Raises ValueError when the folder holds features of another tower, size or dtype. A damaged shard is left out of
    the index, with a warning, so that its pictures are computed again.
    """

    def __init__(
        self, folder: Path, identity: str, shape: tuple[int, int], dtype: torch.dtype, tower: str, *,
        shard_bytes: int = SHARD_BYTES,
    ):  # fmt: skip
        self.folder, self.dtype, self.shard_bytes = folder, dtype, shard_bytes
        index = Index(tower, identity, *shape, str(dtype).removeprefix("torch."))
        if (folder / INDEX).exists():
            index = self._matching(index, read_index(folder))
        elif stray := sorted(folder.glob("features-*.safetensors")):
            raise ValueError(f"output: {folder} holds {stray[0].name}, but no {INDEX}: name another folder")
        self.index, self._digests = self._intact(index)
        self.index.save(folder)
        self._pending: dict[str, tuple[str, Tensor]] = {}

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.flush()

    def __len__(self) -> int:
        return len(self._digests)

    @property
    def digests(self) -> dict[str, str]:
        """Digest of the picture by the name of what is there."""
        return self._digests

    def add(self, name: str, digest: str, features_SD: Tensor) -> None:
        """ValueError when a value is not finite in the folder's dtype."""
        assert features_SD.shape == (self.index.num_tokens, self.index.dim)
        stored = features_SD.detach().to("cpu", self.dtype)
        if not bool(stored.isfinite().all()):
            wider = ": set dtype to float32" if self.dtype != torch.float32 and features_SD.isfinite().all() else ""
            raise ValueError(f"the features of {name} are not finite in {self.index.dtype}{wider}")
        self._pending[name] = (digest, stored)
        self._digests[name] = digest
        if len(self._pending) * stored.nbytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        if not self._pending:
            return
        names = list(self._pending)
        digests, rows = zip(*self._pending.values(), strict=True)
        metadata = {"identity": self.index.identity, "names": json.dumps(names), "digests": json.dumps(digests)}
        numbers = [int("0" + "".join(filter(str.isdigit, Path(name).stem))) for name in self.index.shards]
        file = f"features-{max(numbers, default=0) + 1:05d}.safetensors"
        save_tensors(self.folder / file, {TENSOR: torch.stack(rows)}, metadata)
        self.index = replace(self.index, shards={**self.index.shards, file: len(names)})
        self.index.save(self.folder)
        self._pending = {}

    def _matching(self, wanted: Index, there: Index) -> Index:
        for key in ("identity", "num_tokens", "dim", "dtype"):
            if getattr(wanted, key) != getattr(there, key):
                values = f"{getattr(there, key)}, not {getattr(wanted, key)}"
                what = f"another tower, weights or layers ({there.tower})" if key == "identity" else f"{key} {values}"
                raise ValueError(f"output: {self.folder} holds features of {what}: name another folder")
        return there

    def _intact(self, index: Index) -> tuple[Index, dict[str, str]]:
        """The index of the shards that are whole, and the digests of their pictures by name."""
        digests: dict[str, str] = {}
        whole = {}
        for name, count in index.shards.items():
            try:
                shard = open_shard(self.folder, index, name)
            except ValueError as error:
                log.warning("Left out, and computed again: %s", error)
                continue
            digests.update(zip(shard.names, shard.digests, strict=True))
            whole[name] = count
        return replace(index, shards=whole), digests
