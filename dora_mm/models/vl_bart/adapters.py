"""The adapters of a VL-BART on disk: the language model's and, in a subfolder, the vision tower's."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

import dora_mm
from dora_mm import formats

VISION = "vision"  # subfolder with the vision tower's adapter, inside the folder of the language model's
IDENTITIES = {"base_digest": "model.path: another base model", "vision_digest": "vision: another tower or features"}


def check_identity(folder: Path, metadata: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Checks that an adapter was trained with this base model and this vision tower.

    Args:
        folder: The adapter's folder, for the message.
        metadata: The header of the adapter file.
        here: The digests of the loaded model, by the keys of IDENTITIES. A digest that either side lacks is not
            compared.

    Raises:
        ValueError: The adapter was trained with another base model or vision tower.
    """
    for key, what in IDENTITIES.items():
        if metadata.get(key) and here.get(key) and metadata[key] != here[key]:
            raise ValueError(f"{what} than the one that the adapter {folder} was trained with")


def seed_of(folder: Path, metadata: Mapping[str, str]) -> int:
    """The seed of the weights that a plain BART lacks (visual embedding, sentinel rows), from an adapter's header.

    Args:
        folder: The adapter's folder, for the message.
        metadata: The header of the adapter file.

    Returns:
        The seed; 0 if the header names none.

    Raises:
        ValueError: The header's seed is not a number.
    """
    text = metadata.get("seed", "0")
    if not text.isdecimal():
        raise ValueError(f"{formats.find_file(folder)} has a header key seed that is not a number: {text!r}")
    return int(text)


def load_adapters(path: Path, model: nn.Module, tower: nn.Module | None, backend: str) -> None:
    """Loads the adapter of a VL-BART and, if its run adapted the vision tower too, the adapter of the tower.

    Args:
        path: A run directory, an adapter folder or an adapter file.
        model: The VL-BART to adapt.
        tower: The vision tower to adapt; None if precomputed features are read.
        backend: "auto", "torch" or "triton".

    Raises:
        ValueError: The run adapted the tower, and `tower` is None.
    """
    folder = formats.adapter_folder(path)
    if (folder / VISION).is_dir() and tower is None:
        raise ValueError(
            f"{folder} adapts the vision tower too: remove vision.features, so that the tower encodes the images"
        )
    dora_mm.load_adapter({"model": model}, folder, backend=backend)
    if (folder / VISION).is_dir() and tower is not None:
        dora_mm.load_adapter({VISION: tower}, folder / VISION, backend=backend)
