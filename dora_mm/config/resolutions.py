"""The resolutions of training images: one, or several at which every image is trained on."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator

from dora_mm.config.generation import LARGEST_SIZE
from dora_mm.config.schema import Items


def bucket_step(resolution: int) -> int:
    """The number of pixels that the sides of training images are multiples of.

    64 as in SDXL's pretraining; below a resolution of 512 it is 32, the size of one cell of the coarsest feature map.
    """
    return 64 if resolution >= 512 else 32


def _checked_resolution(resolution: int) -> int:
    if resolution % bucket_step(resolution) or not 0 < resolution <= LARGEST_SIZE:
        raise ValueError(f"must be a multiple of 64 from 512 to {LARGEST_SIZE}, or of 32 below 512, got {resolution}")
    return resolution


def _ascending(resolutions: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(resolutions)) < len(resolutions):
        raise ValueError(f"must differ from each other, got {list(resolutions)}")
    return tuple(sorted(resolutions))


Resolution = Annotated[int, AfterValidator(_checked_resolution)]
Resolutions = Annotated[Items[Resolution], AfterValidator(_ascending)]


def check_resolutions(resolution: int | None, resolutions: Sequence[int]) -> list[str]:
    """Problems of a section in which just one of the keys `resolution` and `resolutions` is needed."""
    if (resolution is None) == (not resolutions):
        return ["give either resolution or resolutions"]
    return []
