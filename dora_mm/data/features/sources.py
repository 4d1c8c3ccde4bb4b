"""Visual features by the name of their picture or clip, from whatever kind of file holds them.

Shapes: S tokens, row by row where they are cells of a grid, D channels; (C, h, w) a map.
"""

import os
import zipfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dora_mm.data.features.folder import INDEX, FeatureFolder

H5_SUFFIXES = (".h5", ".hdf5")


class Source(Protocol):
    """One file or folder. `dim` is D, `where` the file that holds a name."""

    path: Path
    dim: int

    def __contains__(self, name: str) -> bool: ...
    def read(self, name: str) -> Tensor: ...
    def where(self, name: str) -> Path: ...


class Features:
    """`features[stem(image)]` is (S, D) float32. Of several sources that hold a name the first is read.

    May be pickled, and used in processes that were forked.
    """

    def __init__(self, sources: Sequence[Source], dim: int | None = None):
        self.sources = tuple(sources)
        self.dim = self.sources[0].dim if dim is None else dim
        for source in self.sources:
            if source.dim != self.dim:
                expected = f"{self.sources[0].path} has {self.dim}" if dim is None else f"{dim} are expected"
                raise ValueError(f"vision.features: {source.path} has {source.dim} channels, and {expected}")

    @property
    def identity(self) -> str:
        """Of the tower that computed them, as VisionTower's; empty where the files do not tell or there are several."""
        found = {source.index.identity if isinstance(source, FeatureFolder) else "" for source in self.sources}
        return found.pop() if len(found) == 1 else ""

    def __contains__(self, name: str) -> bool:
        return any(name in source for source in self.sources)

    def __getitem__(self, name: str) -> Tensor:
        """Raises ValueError with file and name: it is missing, of another size, or not finite."""
        source = next((source for source in self.sources if name in source), None)
        if source is None:
            paths = ", ".join(str(source.path) for source in self.sources)
            raise ValueError(f"vision.features: {paths} has no features of {name}: compute them with dora-mm features")
        features = source.read(name).float()
        if features.dim() != 2 or features.shape[1] != self.dim or not len(features):
            raise ValueError(f"{source.where(name)}: {name} has {tuple(features.shape)}, others {self.dim} channels")
        if not bool(features.isfinite().all()):
            raise ValueError(f"{source.where(name)}: the features of {name} are not finite: compute them again")
        return features


def open_features(paths: Sequence[str | Path], *, dim: int | None = None) -> Features:
    """Opens folders that dora-mm features wrote, .h5 files and folders of .npz files.

    dim: how many channels there must be; it also tells (C, h, w) from (h, w, C) where the shape does not.
    Raises ValueError with the path when one is missing, of no known kind, broken, or of another number of channels.
    """
    assert paths
    return Features([_open(Path(path).expanduser(), dim) for path in paths], dim)


def _open(path: Path, dim: int | None) -> Source:
    if path.suffix in H5_SUFFIXES and path.is_file():
        return H5Features(path, dim)
    if (path / INDEX).is_file():
        return FeatureFolder(path)
    if path.is_dir() and any(entry.suffix == ".npz" for entry in path.iterdir()):
        return NpzFeatures(path, dim)
    kinds = f"a folder with {INDEX}, a folder of .npz files or a .h5 file"
    raise ValueError(f"vision.features: {path} {'is not' if path.exists() else 'does not exist; it should be'} {kinds}")


class H5Features:
    """A file in the manner of VL-T5: a group per picture with a dataset `features`, (S, D), (C, h, w) or (h, w, C)."""

    def __init__(self, path: Path, dim: int | None = None):
        self.path = path
        self._file: Any = None
        self._process = -1
        file = self._open()
        first = next((name for name in islice(file, 100) if self.__contains__(name)), None)
        if first is None:
            raise ValueError(f"{path} holds no groups with a dataset `features`")
        self.dim = channels(file[f"{first}/features"].shape, dim, path, first)

    def __contains__(self, name: str) -> bool:
        return f"{name}/features" in self._open()

    def read(self, name: str) -> Tensor:
        try:
            values = self._open()[f"{name}/features"][()]
        except (OSError, KeyError) as error:
            raise ValueError(f"{self.path}: the features of {name} cannot be read ({error})") from error
        return as_tokens(values, self.dim, self.path, name)

    def where(self, name: str) -> Path:
        return self.path

    def _open(self) -> Any:
        if self._process != os.getpid():  # HDF5 handles do not survive a fork
            import h5py

            try:
                self._file, self._process = h5py.File(self.path, "r"), os.getpid()
            except OSError as error:
                raise ValueError(f"{self.path} is no whole HDF5 file ({error})") from error
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_process": -1}


class NpzFeatures:
    """A folder in the manner of VALUE: `<name>.npz` with an array `features`, (S, D) or a map."""

    def __init__(self, path: Path, dim: int | None = None):
        self.path = path
        first = min(entry.stem for entry in path.iterdir() if entry.suffix == ".npz")
        self.dim = channels(self._load(first).shape, dim, self.where(first), first)

    def __contains__(self, name: str) -> bool:
        return self.where(name).is_file()

    def read(self, name: str) -> Tensor:
        return as_tokens(self._load(name), self.dim, self.where(name), name)

    def where(self, name: str) -> Path:
        return self.path / f"{name}.npz"

    def _load(self, name: str) -> np.ndarray:
        try:
            with np.load(self.where(name), allow_pickle=False) as arrays:
                return arrays["features"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.where(name)} holds no array `features` that can be read ({error})") from error


def channels(shape: tuple[int, ...], dim: int | None, path: Path, name: str) -> int:
    """D of features of this shape: the last size of tokens, the first or the last of a map, whichever is larger."""
    if len(shape) == 2:
        return shape[1]
    if len(shape) == 3 and dim in (shape[0], shape[2]):
        return dim
    if len(shape) != 3 or shape[0] == shape[2]:
        raise ValueError(f"{path}: the features of {name} are {shape}, neither tokens nor a map of channels")
    return max(shape[0], shape[2])


def as_tokens(values: np.ndarray, dim: int, path: Path, name: str) -> Tensor:
    """(S, D) of tokens or of a map."""
    if values.ndim not in (2, 3) or values.dtype.kind != "f":
        raise ValueError(f"{path}: the features of {name} are {values.dtype} {values.shape}, not tokens or a map")
    features = torch.from_numpy(values)
    if values.ndim == 2:
        return features
    first, last = values.shape[0] == dim, values.shape[2] == dim
    if first == last:
        problem = "may be in either order" if first else f"have no {dim} channels as others do"
        raise ValueError(f"{path}: the features of {name}, {values.shape}, {problem}")
    return features.flatten(1).T if first else features.flatten(0, 1)
