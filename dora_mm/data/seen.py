"""Digests of a run's data files from when it first read them: a change later, or after a resume, is noticed."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dora_mm.utils.digest import file_digest, file_state
from dora_mm.utils.messages import ChangedFileError

DIGEST_BYTES = 16  # of SHA-256, that are kept
MOST_NEW = 1 << 14  # files between two merges
BY_CONTENT = re.compile(r"sha256-([0-9a-f]{32})\.\w+")  # the name of a copy of an embedded image: see `content_name`


class SeenFiles:
    """The digests of all files that a run has read; a part of its checkpoints.

    A file is known by its place, relative to the current directory where it is inside, and its digest is that of its
    content: data that are copied, or moved together with the run, are the same. 600,000 files take 14 MB, also in a
    checkpoint. Threads may share it.
    """

    def __init__(self):
        self._keys = np.empty(0, np.uint64)  # sorted; with 64 bits, two of a million are alike once in 40 million runs
        self._digests = np.empty((0, DIGEST_BYTES), np.uint8)
        self._new: dict[int, bytes] = {}  # that are not in the arrays yet
        self._unshared: dict[int, bytes] = {}
        self._hashed: dict[str, tuple[int, ...]] = {}  # the state of large files whose digest was compared
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._keys) + len(self._new)

    def read(self, path: Path) -> bytes:
        """The content of a file.

        Raises:
            OSError: It cannot be read.
            ChangedFileError: It is not as it was when it was read before.
        """
        content = path.read_bytes()
        self.compare(path, hashlib.sha256(content).digest())
        return content

    def check(self, path: Path) -> None:
        """Compares a file that something else reads, and that may be large: once for each state of it."""
        state = file_state(path)
        if self._hashed.get(str(path)) != state:
            self.compare(path, bytes.fromhex(file_digest(path)))
            self._hashed[str(path)] = state

    def digest(self, path: Path, what: str = "", read: Callable[[], object] | None = None) -> str:
        """The digest that a file, or something of it, was read with, in hex.

        Args:
            path: The file.
            what: As in `compare`.
            read: Reads what was not read before; None: the file is hashed.
        """
        if not what and (named := BY_CONTENT.fullmatch(path.name)):
            return named[1]
        key = _key(path, what)
        with self._lock:
            known = self._known(key)
        if known is None:
            (read or partial(self.check, path))()
            known = self._known(key)
        assert known is not None, path
        return known.hex()

    def compare(self, path: Path, digest: bytes, what: str = "") -> None:
        """Compares the digest of something with the one that it had before, or keeps it.

        Args:
            path: The file.
            digest: SHA-256.
            what: What of the file, where it is not all.

        Raises:
            ChangedFileError: It is another one.
        """
        digest = digest[:DIGEST_BYTES]
        if not what and (named := BY_CONTENT.fullmatch(path.name)):
            if named[1] != digest.hex():
                raise ChangedFileError(
                    f"{path}, a copy of an embedded image, is damaged: delete it and start again (a training with "
                    "--resume RUN), which makes it again from the data file"
                )
            return
        key = _key(path, what)
        with self._lock:
            before = self._known(key)
            if before is None:
                self._new[key] = self._unshared[key] = digest
                if len(self._new) >= MOST_NEW:
                    self._merge()
        if before is not None and before != digest:
            raise changed(f"{path}, {what}," if what else str(path))

    def unshared(self) -> dict[int, bytes]:
        """The digests that are new since the last call, by key, for the other processes of a run."""
        with self._lock:
            found, self._unshared = self._unshared, {}
        return found

    def add(self, found: Mapping[int, bytes]) -> None:
        """Takes in what another process has read.

        Raises:
            ChangedFileError: A file was another one there.
        """
        with self._lock:
            for key, digest in found.items():
                before = self._known(key)
                if before is not None and before != digest:
                    raise changed("a file of the data")
                if before is None:
                    self._new[key] = digest
            self._merge()

    def state_dict(self) -> dict[str, Any]:
        import torch  # here, so that what reads images alone need not load it

        with self._lock:
            self._merge()
            return {"places": torch.from_numpy(self._keys.view(np.int64)), "digests": torch.from_numpy(self._digests)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on with what an earlier process has read; what this one has read already is compared with it."""
        with self._lock:
            self._merge()
            keys, digests = self._keys, self._digests
            self._keys = state_dict["places"].numpy().view(np.uint64)
            self._digests = state_dict["digests"].numpy()
        self.add({int(key): digest.tobytes() for key, digest in zip(keys, digests, strict=True)})

    def _known(self, key: int) -> bytes | None:
        if (found := self._new.get(key)) is not None:
            return found
        index = int(np.searchsorted(self._keys, np.uint64(key)))
        known = index < len(self._keys) and int(self._keys[index]) == key
        return self._digests[index].tobytes() if known else None

    def _merge(self) -> None:
        """Puts what is new into the arrays."""
        if not self._new:
            return
        new = np.frombuffer(b"".join(self._new.values()), np.uint8).reshape(-1, DIGEST_BYTES)
        keys = np.concatenate([self._keys, np.fromiter(self._new, np.uint64, len(self._new))])
        order = np.argsort(keys, kind="stable")
        self._keys, self._digests = keys[order], np.concatenate([self._digests, new])[order]
        self._new = {}


def content_name(content: bytes, suffix: str) -> str:
    """The name of a file that says what its content is, so that it is checked whenever it is read."""
    return f"sha256-{hashlib.sha256(content).hexdigest()[: 2 * DIGEST_BYTES]}.{suffix}"


def changed(name: str) -> ChangedFileError:
    """The error for a file whose content is another one than before."""
    return ChangedFileError(
        f"{name} is not as it was when this run read it first: restore it, and go on with --resume RUN, or start a new "
        "run"
    )


def read_as(path: Path, digest: str) -> bytes:
    """The content of a file that has to have a digest, SHA-256 in hex.

    Raises:
        OSError: It cannot be read.
        ChangedFileError: It has another one.
    """
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise changed(str(path))
    return content


def _key(path: Path, what: str) -> int:
    key = os.path.abspath(path).removeprefix(f"{os.getcwd()}{os.sep}")
    name = f"{key}\0{what}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")
