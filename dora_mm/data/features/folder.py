"""A folder of visual features: shards of one tensor each, and an index that records how they were computed.

    index.json                       identity of the tower, sizes, and the number of rows of each shard
    features-00001.safetensors       "features" (N, S, D); metadata: identity, names and digests of the N images, and
                                     the circumstances under which they were computed

A shard is valid once the index lists it, so that an interruption loses one shard at most. If an image was computed
again, it is in several shards and the last one takes precedence.
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
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dora_mm.utils.atomic import write_text
from dora_mm.utils.circumstances import Record, about_kept, circumstances
from dora_mm.utils.folders import check_entry
from dora_mm.utils.json_text import parse_json, read_bounded
from dora_mm.utils.tensor_writer import save_tensors

log = logging.getLogger(__name__)
INDEX = "index.json"
FORMAT = "dora-mm features 1"
SHARD_BYTES = 64_000_000  # 320 images of RN101: two minutes on one CPU core
TENSOR = "features"
AGAIN = "run dora-mm features again"


@dataclass(frozen=True)
class FeatureIndex:
    """The content of index.json.

    Attributes:
        tower: A description of the tower, for messages.
        identity: `VisionTower.identity`: changes with architecture, weights, layers and preprocessing.
        num_tokens: S.
        dim: D.
        dtype: Of the stored features, such as "float16".
        format: The version of this layout.
        shards: The number of rows of each shard by file name, in the order of writing.
    """

    tower: str
    identity: str
    num_tokens: int
    dim: int
    dtype: str
    format: str = FORMAT
    shards: dict[str, int] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Writes index.json atomically."""
        write_text(folder / INDEX, json.dumps(asdict(self), indent=1) + "\n")


class Shard(NamedTuple):
    """An opened shard."""

    names: list[str]
    digests: list[str]  # of the image files
    rows: Any  # a lazy safetensors slice of (N, S, D)
    circumstances: Record


def image_digest(path: Path) -> str:
    """The BLAKE2b digest of an image file, which shows whether the file has changed.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.blake2b(digest_size=16)
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_index(folder: Path) -> FeatureIndex:
    """Reads index.json of a folder of features.

    Raises:
        ValueError: It is missing, not a valid index, or of another version.
    """
    path = folder / INDEX
    try:
        index = TypeAdapter(FeatureIndex).validate_json(read_bounded(path), strict=True)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as the index of a folder of features ({error})") from error
    if index.format != FORMAT:
        raise ValueError(f"{path} has format {index.format!r}, but this version reads {FORMAT!r}")
    if any(Path(name).name != name for name in index.shards):
        raise ValueError(f"{path} names a file outside its folder")
    return index


def open_shard(folder: Path, index: FeatureIndex, name: str) -> Shard:
    """Opens a shard by reading its header; rows are read on access.

    Args:
        folder: The folder of features.
        index: Its index.
        name: The file name of the shard.

    Raises:
        ValueError: The file is missing, damaged or inconsistent with the index.
    """
    path = check_entry(folder / name, folder)
    try:
        file: Any = safe_open(path, framework="pt").__enter__()  # stays open as long as its slice
        metadata = file.metadata() or {}
        names, digests = (parse_json(metadata[key], key, list) for key in ("names", "digests"))
        if not all(isinstance(text, str) for text in (*names, *digests)):
            raise ValueError("its names or digests are not texts")
        about = parse_json(metadata.get("circumstances", "{}"), "circumstances")
        rows = file.get_slice(TENSOR)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}): {AGAIN}") from error
    if metadata.get("identity") != index.identity:
        raise ValueError(
            f"{path} was computed by another tower than the one in {folder / INDEX}: delete it and {AGAIN}"
        )
    expected = [index.shards[name], index.num_tokens, index.dim]
    if rows.get_shape() != expected or not len(names) == len(digests) == expected[0]:
        found = f"{len(names)} names and features of {tuple(rows.get_shape())}"
        raise ValueError(f"{path} has {found}, but {INDEX} requires {tuple(expected)}: delete it and {AGAIN}")
    return Shard(names, digests, rows, about)


class FeatureFolder:
    """A `Source` that reads a folder of features; shards are memory-mapped, rows are read on access.

    Args:
        folder: A folder that FeatureWriter wrote.

    Attributes:
        path: The folder.
        index: Its index.
        dim: D.

    Raises:
        ValueError: The index or a shard is missing or damaged.
    """

    def __init__(self, folder: Path):
        self.path = folder
        self.index = read_index(folder)
        self.dim = self.index.dim
        self._shards: dict[str, Shard] = {}
        self._rows: dict[str, tuple[str, int]] = {}
        for shard in self.index.shards:
            for row, name in enumerate(self._open(shard).names):
                self._rows[name] = (shard, row)

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def read(self, name: str) -> Tensor:
        """The features of an image, (S, D) in the stored dtype."""
        shard, row = self._rows[name]
        return self._open(shard).rows[row]

    def where(self, name: str) -> Path:
        """The shard that contains these features."""
        return self.path / self._rows[name][0]

    def _open(self, shard: str) -> Shard:
        if shard not in self._shards:
            self._shards[shard] = open_shard(self.path, self.index, shard)
        return self._shards[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}  # a process that unpickles this opens the files itself


class FeatureWriter:
    """Adds features to a folder, shard by shard; existing features are kept.

    As a context manager it writes the remaining features on exit. A damaged shard is removed from the index with a
    warning, so that its images are computed again. Another warning reports features of other circumstances.

    Args:
        folder: The folder; created if missing.
        identity: `VisionTower.identity`.
        shape: (S, D) of the features of one image.
        dtype: In which the features are stored.
        tower: A description of the tower, for messages.
        shard_bytes: A shard is written when its features reach this size.

    Attributes:
        index: The current index of the folder.

    Raises:
        ValueError: The folder has features of another tower, size or dtype, or shards without an index.
    """

    def __init__(
        self, folder: Path, identity: str, shape: tuple[int, int], dtype: torch.dtype, tower: str, *,
        shard_bytes: int = SHARD_BYTES,
    ):  # fmt: skip
        self.folder, self.dtype, self.shard_bytes = folder, dtype, shard_bytes
        index = FeatureIndex(tower, identity, *shape, str(dtype).removeprefix("torch."))
        if (folder / INDEX).exists():
            index = self._matching(index, read_index(folder))
        elif stray := sorted(folder.glob("features-*.safetensors")):
            raise ValueError(f"output: {folder} contains {stray[0].name} but no {INDEX}: name another folder")
        self._now = circumstances()
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
        """The digests of the images whose features are stored or pending, by name."""
        return self._digests

    def add(self, name: str, digest: str, features_SD: Tensor) -> None:
        """Adds the features of one image; they replace earlier ones of the same name.

        Args:
            name: The name of the features.
            digest: Of the image file, see `image_digest`.
            features_SD: (S, D), in any dtype and on any device.

        Raises:
            ValueError: A value is not finite in the folder's dtype.
        """
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
        """Writes the pending features as a shard and updates the index; does nothing if there are none."""
        if not self._pending:
            return
        names = list(self._pending)
        digests, rows = zip(*self._pending.values(), strict=True)
        metadata = {"identity": self.index.identity, "names": json.dumps(names), "digests": json.dumps(digests)}
        metadata["circumstances"] = json.dumps(self._now)
        numbers = [int("0" + "".join(filter(str.isdigit, Path(name).stem))) for name in self.index.shards]
        file = f"features-{max(numbers, default=0) + 1:05d}.safetensors"
        save_tensors(self.folder / file, {TENSOR: torch.stack(rows)}, metadata)
        self.index = replace(self.index, shards={**self.index.shards, file: len(names)})
        self.index.save(self.folder)
        self._pending = {}

    def _matching(self, requested: FeatureIndex, existing: FeatureIndex) -> FeatureIndex:
        for key in ("identity", "num_tokens", "dim", "dtype"):
            if getattr(requested, key) != getattr(existing, key):
                values = f"{getattr(existing, key)}, not {getattr(requested, key)}"
                what = (
                    f"another tower, weights or layers ({existing.tower})" if key == "identity" else f"{key} {values}"
                )
                raise ValueError(f"output: {self.folder} contains features of {what}: name another folder")
        return existing

    def _intact(self, index: FeatureIndex) -> tuple[FeatureIndex, dict[str, str]]:
        """The index reduced to intact shards, and the digests of their images by name."""
        digests: dict[str, str] = {}
        intact, kept = {}, []
        for name, count in index.shards.items():
            try:
                shard = open_shard(self.folder, index, name)
            except ValueError as error:
                log.warning("Features of a damaged shard are computed again: %s", error)
                continue
            digests.update(zip(shard.names, shard.digests, strict=True))
            intact[name] = count
            kept.append((shard.circumstances, count))
        if message := about_kept(kept, self._now, f"features in {self.folder}"):
            log.warning(message)
        return replace(index, shards=intact), digests
