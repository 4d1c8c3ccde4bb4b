"""The adapters of a VL-BART on disk: the language model's and, in a folder inside it, its vision tower's."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

import dora_mm
from dora_mm import formats

VISION = "vision"  # the folder of the vision tower's adapter, inside that of the language model's
IDENTITIES = {"base_digest": "model.path: another base model", "vision_digest": "vision: another tower or features"}


def check_identity(folder: Path, metadata: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Checks that an adapter was trained upon this base model and with this vision tower.

    Args:
        folder: Where the adapter lies, for the message.
        metadata: The header of its file.
        here: Digests by the keys of IDENTITIES. What either side does not know is not compared.

    Raises:
        ValueError: It was trained upon another base model, or with another tower.
    """
    for key, what in IDENTITIES.items():
        if metadata.get(key) and here.get(key) and metadata[key] != here[key]:
            raise ValueError(f"{what} than the one that the adapter {folder} was trained with")


def seed_of(folder: Path, metadata: Mapping[str, str]) -> int:
    """The seed that the weights which a bare BART lacks were drawn from.

    Raises:
        ValueError: The header holds something else than a number.
    """
    text = metadata.get("seed", "0")
    if not text.isdecimal():
        raise ValueError(f"{formats.find_file(folder)} has a header key seed that is not a number: {text!r}")
    return int(text)


def load_adapters(path: Path, model: nn.Module, tower: nn.Module | None, backend: str) -> None:
    """Loads the adapter of a VL-BART and, where its run adapted the tower as well, the tower's.

    Args:
        path: A run directory, a folder or a file.
        tower: None where precomputed features are read.

    Raises:
        ValueError: The tower was adapted, and there is none.
    """
    folder = formats.adapter_folder(path)
    if (folder / VISION).is_dir() and tower is None:
        raise ValueError(f"{folder} adapts the vision tower too: leave vision.features out, so that images are encoded")
    dora_mm.load_adapter({"model": model}, folder, backend=backend)
    if (folder / VISION).is_dir() and tower is not None:
        dora_mm.load_adapter({VISION: tower}, folder / VISION, backend=backend)
