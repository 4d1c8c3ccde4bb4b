"""The steps of a training of images whose length is given in epochs."""

import logging
from math import ceil
from pathlib import Path

from dora_mm.config.images import DataConfig, TrainDiffusionConfig
from dora_mm.config.training import TrainConfig
from dora_mm.data.images.folder import read_images
from dora_mm.data.images.held_out import hold_out
from dora_mm.data.images.resolutions import resolutions_of
from dora_mm.train.optim import with_steps
from dora_mm.train.sharing import micro_batches

log = logging.getLogger(__name__)


def views_per_epoch(data: DataConfig) -> float:
    """How many images an epoch shows: every training image at each of its resolutions, times its repeats.

    Raises:
        ValueError: The images cannot be read.
    """
    images, _ = hold_out(read_images(data, "train"), data)
    return sum(data.repeats * image.repeats * len(resolutions_of(image, data)) for image in images)


def in_steps(config: TrainDiffusionConfig, num_processes: int, resume: Path | None = None) -> TrainDiffusionConfig:
    """The config with `train.epochs` converted to `train.steps`, which the run keeps; one that has steps as it is.

    Args:
        config: The config.
        num_processes: The number of processes that train.
        resume: The run directory to resume, whose steps have as many images as before; None: a new run.

    Raises:
        ValueError: The images cannot be read, or the warm-up is as long as the training; or inputs.json is missing or
            damaged.
    """
    train = config.train
    if train.epochs is None:
        return config
    total = micro_batches(resume, train) if resume else train.gradient_accumulation_steps * num_processes
    per_step = train.batch_size * total
    counted: TrainConfig = with_steps(train, config.schedule, ceil(views_per_epoch(config.data) / per_step))
    log.info("train.epochs %d: %d steps of %d images", train.epochs, counted.steps, per_step)
    return config.model_copy(update={"train": counted.model_copy(update={"epochs": None})})
