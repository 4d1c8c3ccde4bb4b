"""The weights W0 of a base model by module, read one at a time, and copies of the model with some of them replaced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dora_mm.formats.names import Name


class BaseWeights(Mapping[Name, Tensor]):
    """The weights of the modules of a model that is not loaded: `weights[name]` reads W0 from the file.

    It holds every module that has a floating-point `weight`, (O, I) or (O, I / groups, *K), in the dtype and layout of
    the file. `Names(weights)` knows its modules.

    Attributes:
        source: The folder or file.
    """

    source: Path

    @classmethod
    def open(cls, path: str | Path, revision: str | None = None) -> BaseWeights:
        """Opens a model; only headers are read.

        Args:
            path: A diffusers pipeline folder; a folder of one network of diffusers or transformers, sharded or not; a
                single-file checkpoint (`.safetensors`) of SDXL in SGM's names, or of Flux or SD3 in their own; or a hub
                name, which is downloaded where it is not in the cache.
            revision: A commit, branch or tag, for a hub name.

        Raises:
            ValueError: There is no such model, it cannot be downloaded, it is a pickle, or its files are damaged.
        """
        raise NotImplementedError

    def __getitem__(self, name: Name) -> Tensor:
        """W0, in the dtype of the file.

        Raises:
            KeyError: There is no such module; `find` has a message for people.
        """
        raise NotImplementedError

    def __iter__(self) -> Iterator[Name]:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def shape(self, name: Name) -> tuple[int, ...]:
        """The shape of W0, from the header."""
        raise NotImplementedError

    def dtype(self, name: Name) -> torch.dtype:
        """The dtype of W0, from the header."""
        raise NotImplementedError

    def find(self, name: Name) -> Name:
        """The name under which these weights have a module.

        The component `model` stands for the only component; a leading part of the path, such as `model.`, may be
        missing on either side.

        Raises:
            ValueError: There is no such module, or there are several; the message has the nearest names.
        """
        raise NotImplementedError


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
    raise NotImplementedError
