"""The resolutions of a training's images: how many images each has, and what a step costs at each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dora_mm.config.images import DataConfig
from dora_mm.data.images.folder import CaptionedImage
from dora_mm.data.images.resolutions import at_resolutions, left_out_at, resolution_of
from dora_mm.preview.training import StepCost, measure_step
from dora_mm.utils.example_losses import NUM_TIMES

if TYPE_CHECKING:  # with diffusers, which takes seconds to load: `new` describes images without a model
    from dora_mm.tasks.image_batches import CaptionedBatches

MOST_NAMES = 8  # of images in a line


def describe_resolutions(images: Sequence[CaptionedImage], data: DataConfig) -> list[str]:
    """Lines with the images of each resolution, and those that are left out at some; none for a single resolution."""
    if len(data.resolutions) < 2:
        return []
    counts = Counter(resolution_of(image, data) for image in at_resolutions(images, data))
    each = ", ".join(f"{resolution}: {counts[resolution]}" for resolution in sorted(counts))
    lines = [f"sizes     {each}, {counts.total()} in all; each image once at each size that it has"]
    return lines + [f"left out  {remark}" for remark in remark_on_resolutions(images, data)]


def remark_on_resolutions(images: Sequence[CaptionedImage], data: DataConfig) -> list[str]:
    """For each of several resolutions, which images are left out at it; empty where none is."""
    found = []
    for resolution in data.resolutions:
        names = [image.path.name for image in images if resolution in left_out_at(image, data)]
        if names:
            named = ", ".join(names[:MOST_NAMES]) + (", ..." if len(names) > MOST_NAMES else "")
            have = "image has" if len(names) == 1 else "images have"
            found.append(f"{len(names)} {have} too few pixels for resolution {resolution} ({named})")
    return found


def num_measured(images: Sequence[CaptionedImage], data: DataConfig) -> int:
    """The noised images whose loss is computed where that of each image is measured."""
    return NUM_TIMES * len(at_resolutions(images, data))


def measured_batches(batches: CaptionedBatches, preserved_every: int) -> dict[int, tuple[int, int]]:
    """By resolution, the number of a batch of this process to measure, and how many batches of an epoch have it.

    That batch is the first one with the most images, if possible among those on which the model is preserved. Of a
    training with a single resolution, it is the first of all.

    Args:
        batches: The batches of the training.
        preserved_every: The model is preserved on the batches whose number is a multiple of this.
    """
    index, count = batches.process
    found: dict[int, list[tuple[bool, int, int]]] = {}
    for number in range(len(batches.order.batches_of(0))):
        rows = batches.order(number * count + index)
        resolution = resolution_of(batches.images[rows[0]], batches.config)
        found.setdefault(resolution, []).append((number % preserved_every == 0, len(rows), -number))
    if len(found) == 1:
        return {resolution: (0, len(each)) for resolution, each in found.items()}
    return {resolution: (-max(found[resolution])[2], len(found[resolution])) for resolution in sorted(found)}


def measure_resolutions(
    training: Mapping[str, Any],
    source: Callable[[int], Any],
    numbers: Mapping[int, tuple[int, int]],
) -> tuple[StepCost, dict[int, float]]:
    """Measures a step of each resolution.

    Args:
        training: The arguments of `measure_step` but for the batches.
        source: The batches.
        numbers: From `measured_batches`.

    Returns:
        The memory of the step that takes most, with the seconds of a step on average; and the seconds by resolution.
    """
    costs = {
        resolution: measure_step(**training, batch_at=lambda _, number=number: source(number))
        for resolution, (number, _) in numbers.items()
    }
    seconds = {resolution: cost.seconds or 0.0 for resolution, cost in costs.items()}
    total = sum(count for _, count in numbers.values())
    mean = sum(seconds[resolution] * count for resolution, (_, count) in numbers.items()) / total
    largest = max(costs.values(), key=lambda cost: cost.activations)
    return largest._replace(seconds=mean), seconds
