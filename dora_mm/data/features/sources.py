"""Visual features by name of their image or clip, read from several kinds of files.

Shapes: (S, D) are S tokens of D channels; the cells of a feature map are tokens in row-major order. A feature map is
(C, h, w) or (h, w, C), with C = D.
"""

import hashlib
import math
import os
import zipfile
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dora_mm.data.features.folder import INDEX, FeatureFolder
from dora_mm.data.seen import SeenFiles
from dora_mm.utils.folders import check_entry
from dora_mm.utils.home import expanded
from dora_mm.utils.messages import foreign_errors

H5_SUFFIXES = (".h5", ".hdf5")
MOST_BYTES = 64 * 2**20  # of the features of an image; a feature map of 2,048 channels has 2 MB


class Source(Protocol):
    """One file or folder of features.

    To support another kind of file, implement this protocol and select the class in `_open`.

    Attributes:
        path: The file or folder.
        dim: D.
    """

    path: Path
    dim: int

    def __contains__(self, name: str) -> bool:
        """Whether there are features with this name."""
        ...

    def read(self, name: str) -> Tensor:
        """The features with this name, (S, D) in the stored dtype.

        Raises:
            ValueError: They cannot be read, or do not have D channels.
        """
        ...

    def where(self, name: str) -> Path:
        """The file that contains the features with this name, for messages."""
        ...


class FeatureStore:
    """Features from one or several sources: `features[stem(image)]` is (S, D) float32.

    If several sources have the same name, the first one is read.

    Args:
        sources: At least one source.
        files: Knows the content of features that were read before; None: it is not compared.

    Raises:
        ValueError: A source has another number of channels.
    """

    def __init__(self, sources: Sequence[Source], files: SeenFiles | None = None):
        self.sources, self.files = tuple(sources), files
        self.dim = self.sources[0].dim
        for source in self.sources:
            if source.dim != self.dim:
                expected = f"{self.sources[0].path} has {self.dim}"
                raise ValueError(f"vision.features: {source.path} has {source.dim} channels, but {expected}")

    @property
    def identity(self) -> str:
        """`VisionTower.identity` of the tower that computed them; "" if a file does not record it or sources differ."""
        found = {source.index.identity if isinstance(source, FeatureFolder) else "" for source in self.sources}
        return found.pop() if len(found) == 1 else ""

    def __contains__(self, name: str) -> bool:
        return any(name in source for source in self.sources)

    def __getitem__(self, name: str) -> Tensor:
        """The features with this name, (S, D) float32.

        Raises:
            ValueError: They are missing, have a wrong shape or are not finite; the message gives file and name.
            ChangedFileError: They are not as they were when they were read before.
        """
        source = self._source(name)
        stored = source.read(name)
        if self.files is not None:
            content = stored.contiguous().view(torch.uint8).numpy().data
            self.files.compare(source.path, hashlib.sha256(content).digest(), _features_of(name))
        features = stored.float()
        if features.dim() != 2 or features.shape[1] != self.dim or not len(features):
            raise ValueError(
                f"{source.where(name)}: {name} has shape {tuple(features.shape)}, others {self.dim} channels"
            )
        if not bool(features.isfinite().all()):
            raise ValueError(f"{source.where(name)}: the features of {name} are not finite: compute them again")
        return features

    def digest(self, name: str) -> str:
        """The digest of the features with this name, which are read where they were not before.

        Raises:
            ValueError: As when they are read.
        """
        assert self.files is not None
        return self.files.digest(self._source(name).path, _features_of(name), partial(self.__getitem__, name))

    def _source(self, name: str) -> Source:
        source = next((source for source in self.sources if name in source), None)
        if source is None:
            paths = ", ".join(str(source.path) for source in self.sources)
            raise ValueError(f"vision.features: {paths} has no features of {name}: compute them with dora-mm features")
        return source


def _features_of(name: str) -> str:
    return f"the features of {name}"


def open_features(paths: Sequence[str | Path], files: SeenFiles | None = None) -> FeatureStore:
    """Opens folders that `dora-mm features` wrote, .h5 files and folders of .npz files.

    Args:
        paths: At least one path; if several have the same name, the first one is read.
        files: As in `FeatureStore`.

    Raises:
        ValueError: A path is missing, of an unknown kind, broken, or has another number of channels.
    """
    assert paths
    return FeatureStore([_open(expanded(path)) for path in paths], files)


def _open(path: Path) -> Source:
    if path.suffix in H5_SUFFIXES and path.is_file():
        return H5Features(path)
    if (path / INDEX).is_file():
        return FeatureFolder(path)
    if path.is_dir() and any(entry.suffix == ".npz" for entry in path.iterdir()):
        return NpzFeatures(path)
    kinds = f"a folder with {INDEX}, a folder of .npz files or a .h5 file"
    raise ValueError(f"vision.features: {path} {'is not' if path.exists() else 'does not exist; it should be'} {kinds}")


class H5Features:
    """A `Source` in VL-T5's layout: a group per image with a dataset `features`, (S, D), (C, h, w) or (h, w, C)."""

    def __init__(self, path: Path):
        self.path = path
        self._file: Any = None
        self._process = -1
        file = self._open()
        with foreign_errors(f"{path} is damaged"):
            first = next((name for name in islice(file, 100) if self.__contains__(name)), None)
        if first is None:
            raise ValueError(f"{path} has no groups with a dataset `features`")
        self.dim = channels(self._dataset(first).shape, path, first)

    def __contains__(self, name: str) -> bool:
        key = f"{name}/features"
        with foreign_errors(f"{self.path} is damaged"):
            return self._leads_out(key) or key in self._open()

    def read(self, name: str) -> Tensor:
        dataset = self._dataset(name)
        with foreign_errors(f"{self.path}: the features of {name} cannot be read"):
            values = dataset[()]
        return as_tokens(values, self.dim, self.path, name)

    def _dataset(self, name: str) -> Any:
        """The dataset of an image, all of which is in this file: HDF5 can have parts of it in any other."""
        with foreign_errors(f"{self.path}: the features of {name} cannot be read"):
            found = None if self._leads_out(key := f"{name}/features") else self._open()[key]
            if found is None or found.is_virtual or found.external:
                raise ValueError(f"{self.path}: the features of {name} are in another file, which is not opened")
            size = math.prod(map(max, found.shape, found.chunks or found.shape)) * found.dtype.itemsize
        if size > MOST_BYTES:
            raise ValueError(f"{self.path}: the features of {name} take {size:,} bytes, of at most {MOST_BYTES:,}")
        return found

    def _leads_out(self, key: str) -> bool:
        """Whether there is a link on the way to a dataset, which may lead to another file; it is not followed."""
        import h5py

        file, parts = self._open(), key.split("/")
        paths = ("/".join(parts[:number]) for number in range(1, len(parts) + 1))
        try:
            links = (file.get(path, getlink=True) for path in paths)  # none behind one that leads out, which follows it
            return any(link is not None and not isinstance(link, h5py.HardLink) for link in links)
        except (KeyError, RuntimeError, ValueError):  # there is nothing
            return False

    def where(self, name: str) -> Path:
        return self.path

    def _open(self) -> Any:
        if self._process != os.getpid():  # HDF5 handles do not survive a fork
            import h5py

            with foreign_errors(f"{self.path} is not a complete HDF5 file"):
                self._file, self._process = h5py.File(self.path, "r"), os.getpid()
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_process": -1}


class NpzFeatures:
    """A `Source` in VALUE's layout: `<name>.npz` with an array `features`, (S, D) or a feature map."""

    def __init__(self, path: Path):
        self.path = path
        first = min(entry.stem for entry in path.iterdir() if entry.suffix == ".npz")
        self.dim = channels(self._load(first).shape, self.where(first), first)

    def __contains__(self, name: str) -> bool:
        return self.where(name).is_file()

    def read(self, name: str) -> Tensor:
        return as_tokens(self._load(name), self.dim, self.where(name), name)

    def where(self, name: str) -> Path:
        file = self.path / f"{name}.npz"
        return check_entry(file, self.path) if file.is_symlink() else file

    def _load(self, name: str) -> np.ndarray:
        file = self.where(name)
        with foreign_errors(f"{file} has no readable array `features`"):
            with zipfile.ZipFile(file) as packed:
                if (size := packed.getinfo("features.npy").file_size) > MOST_BYTES:
                    raise ValueError(f"{file}: the array takes {size:,} bytes, of at most {MOST_BYTES:,}")
            with np.load(file, allow_pickle=False) as arrays:
                found = arrays["features"]
            if not isinstance(found, np.ndarray):  # numpy gives the bytes of what does not begin as arrays do
                raise ValueError(f"{file} has no readable array `features`")
            return found


def channels(shape: tuple[int, ...], path: Path, name: str) -> int:
    """D of features of this shape: of a feature map the larger of the first and the last size.

    Args:
        shape: (S, D), (C, h, w) or (h, w, C).
        path: The file, for messages.
        name: The name of the features, for messages.

    Raises:
        ValueError: The shape is of neither kind, or is ambiguous.
    """
    if len(shape) == 2:
        return shape[1]
    if len(shape) != 3 or shape[0] == shape[2]:
        raise ValueError(
            f"{path}: the features of {name} have shape {shape}, which is neither (S, D) nor an unambiguous feature map"
        )
    return max(shape[0], shape[2])


def as_tokens(values: np.ndarray, dim: int, path: Path, name: str) -> Tensor:
    """Features as tokens.

    Args:
        values: (S, D), (C, h, w) or (h, w, C), floating point.
        dim: D.
        path: The file, for messages.
        name: The name of the features, for messages.

    Returns:
        (S, D); the cells of a feature map in row-major order.

    Raises:
        ValueError: The array has another dtype or shape, or the order of a map is ambiguous.
    """
    if values.ndim not in (2, 3) or values.dtype.kind != "f":
        raise ValueError(
            f"{path}: the features of {name} are {values.dtype} {values.shape}, not float tokens or a feature map"
        )
    features = torch.from_numpy(values)
    if values.ndim == 2:
        return features
    first, last = values.shape[0] == dim, values.shape[2] == dim
    if first == last:
        problem = "are ambiguous: (C, h, w) or (h, w, C)" if first else f"do not have {dim} channels as others do"
        raise ValueError(f"{path}: the features of {name}, {values.shape}, {problem}")
    return features.flatten(1).T if first else features.flatten(0, 1)
