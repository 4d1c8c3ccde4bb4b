"""Draws a picture again from what its PNG file says."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import get_args

import numpy as np
from PIL import Image
from pydantic import ValidationError

from dora_mm.config.models import ModelConfig, validated
from dora_mm.config.pictures import MemoryConfig, PicturesConfig, PromptSyntax
from dora_mm.models.hub import check_named_by
from dora_mm.sampling.drawing import PictureJob, draw
from dora_mm.sampling.jobs.job_row import JobRow
from dora_mm.sampling.jobs.picture import Picture
from dora_mm.sampling.manifest import write_manifest
from dora_mm.sampling.model import LoadedModel, load_model
from dora_mm.sampling.png import Description, read_description
from dora_mm.utils.circumstances import differences, sentence

log = logging.getLogger(__name__)
NEEDED = ("steps", "guidance", "width", "height", "scheduler")


def replay_picture(file: Path, folder: Path) -> tuple[Path, str | None]:
    """Draws a picture again, in the batch that it was drawn in, since rounding depends on the batch.

    Args:
        file: A PNG file of a job.
        folder: The folder to write to.

    Returns:
        The new file; and how its pixels differ from the old ones, or None where they are the same. Other circumstances
        are reported in the log.

    Raises:
        ValueError: The file does not say how it was drawn, the model or an adapter has changed since, or the picture
            cannot be drawn.
    """
    description = read_description(file)
    check_complete(description, file)
    check_named_by(str(file), description.model.path, description.model.revision)
    check_named_by(str(file), description.model.vae)
    loaded = load_model(pictures_config(description), [adapter.path for adapter in description.adapters])
    check_unchanged(description, loaded)
    job = job_of(description, loaded, folder, file.name)
    report_circumstances(file, description, job)
    loaded.load(job.pictures)
    draw(job, loaded.sampler, loaded.load_adapter)
    write_manifest(job.folder, [job.entries()[description.position]])
    job.raise_failures()
    drawn = job.file(description.position)
    return drawn, difference(file, drawn)


def check_complete(description: Description, file: Path) -> None:
    """Checks that a file says all that a picture is drawn with, in the types that a job has.

    Raises:
        ValueError: It does not.
    """
    try:
        settings = dict(description.settings)
        if settings.pop("prompt_syntax", "plain") not in get_args(PromptSyntax):
            raise ValueError("its prompt_syntax is unknown")
        row = JobRow.model_validate({"prompt": "a", **settings})
        if lacking := [name for name in NEEDED if name not in row.model_fields_set]:
            raise ValueError(f"settings lack {lacking[0]}")
        pictures_config(description)
    except ValidationError as error:
        found = error.errors()[0]
        problem = ": ".join([".".join(map(str, found["loc"])), found["msg"]])
        raise ValueError(f"{file} cannot be drawn again ({problem})") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot be drawn again ({error})") from None


def pictures_config(description: Description) -> PicturesConfig:
    """The config of the model that a picture was drawn with."""
    model = description.model
    return PicturesConfig(
        pipeline="sample",
        name="replay",
        backend=description.environment["backend"],
        model=validated(
            ModelConfig,
            {"path": model.path, "revision": model.revision, "vae": model.vae, "dtype": model.dtype, **model.settings},
        ),
        memory=MemoryConfig(**description.environment["memory"]),
    )


def check_unchanged(description: Description, loaded: LoadedModel) -> None:
    """Compares the model and the adapters that were loaded with those that a picture was drawn with.

    Raises:
        ValueError: The base model or an adapter is another one now.
    """
    if changes := loaded.base.changes(description.model):
        raise ValueError(f"the model {loaded.base.path} has changed since the picture was drawn: {', '.join(changes)}")
    hashes = loaded.adapter_hashes()
    for adapter in description.adapters:
        if hashes[adapter.path][0] != adapter.digest:
            raise ValueError(f"the adapter {adapter.path} has changed since the picture was drawn")


def job_of(description: Description, loaded: LoadedModel, folder: Path, name: str) -> PictureJob:
    """A job of the batch of a picture, of which only this picture is missing."""
    adapters = tuple((adapter.path, adapter.strength) for adapter in description.adapters)
    pictures = [
        Picture(
            row=1,
            prompt=prompt,
            negative_prompt=negative_prompt,
            seed=seed,
            adapters=adapters,
            strength=1.0,
            **description.settings,
        )
        for prompt, negative_prompt, seed in description.batch
    ]
    job = loaded.plan(folder, pictures, len(pictures))
    job.names = [name if index == description.position else f"{index}-{name}" for index in range(len(pictures))]
    job.done = dict.fromkeys((index for index in range(len(pictures)) if index != description.position), "")
    return job


def report_circumstances(file: Path, description: Description, job: PictureJob) -> None:
    """Warns of circumstances that differ from those under which a picture was drawn."""
    now = job.descriptions[description.position].circumstances
    if message := sentence(f"{file} was", differences(description.circumstances, now)):
        log.warning(message)


def difference(one: Path, other: Path) -> str | None:
    """How the pixels of two pictures differ, or None."""
    first, second = (np.asarray(Image.open(path).convert("RGB"), dtype=np.int16) for path in (one, other))
    if first.shape != second.shape:
        return "in its size"
    largest = int(np.abs(first - second).max())
    return f"by up to {largest} of 255" if largest else None
