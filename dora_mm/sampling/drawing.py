"""Draws the pictures of a job into a run directory, and goes on where an earlier process has stopped."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from accelerate.utils.memory import should_reduce_batch_size

from dora_mm.backend import about_layers
from dora_mm.config.loader import dump_config, saved_values
from dora_mm.config.pictures import PicturesConfig
from dora_mm.core import remove
from dora_mm.core.adapted import AdaptedLayer
from dora_mm.core.inject import merged_adapters
from dora_mm.models.images.image_model import ImageModel
from dora_mm.sampling.jobs.job_row import Weights, adapters_text
from dora_mm.sampling.jobs.picture import Picture, batches, file_names
from dora_mm.sampling.manifest import (
    EARLIER,
    MANIFEST,
    ManifestEntry,
    keep_earlier,
    recorded,
    write_manifest,
)
from dora_mm.sampling.pictures import PictureSampler, UnusablePictureError
from dora_mm.sampling.png import BaseModel, Description, UsedAdapter, read_description, save_picture
from dora_mm.sampling.strengths import HashableStrength
from dora_mm.utils.circumstances import Record, about_kept
from dora_mm.utils.digest import file_digest
from dora_mm.utils.folders import is_free
from dora_mm.utils.home import expanded
from dora_mm.utils.lock import only_writer
from dora_mm.utils.processes import ALONE, DividedWork, Processes
from dora_mm.utils.progress import Progress
from dora_mm.utils.run_directory import CONFIG, RunDirectory

log = logging.getLogger(__name__)
SAMPLES = "samples"
SECONDS_BETWEEN_MANIFESTS = 5.0
MOST_NAMED = 5  # files in one message

PictureOutcome = tuple[int, str | None, str | None]  # the index of a picture, the digest of its file, or why it failed
Counted = Callable[[Iterable[Sequence[int]]], object]
Reached = Callable[[int, float], object]
LoadAdapter = Callable[[str, HashableStrength, str], object]  # loads the adapter of a path, at a strength, under a name


def existing_run(config: PicturesConfig, resume: Path | None = None) -> Path | None:
    """Finds the run directory that a job goes on in: the one to resume, or the config's `output` where it exists.

    Args:
        config: The config.
        resume: The run directory to go on with; None: `output`, or a new directory.

    Returns:
        The directory; None where a new one is needed.

    Raises:
        ValueError: The directory holds something else than a run of this pipeline, or another process draws into it.
    """
    path = resume or expanded(config.output or "")
    if path == Path() or is_free(path):
        return None
    saved = path / CONFIG
    if saved.is_file():
        pipeline = saved_values(path)["pipeline"]
        if pipeline != config.pipeline:
            raise ValueError(f"{path} is a run of {pipeline}, not of {config.pipeline}: choose another folder")
    else:
        raise ValueError(f"output {path} exists already and is not a run directory: choose another folder")
    with only_writer(path):  # refused now, and not once the model is loaded
        return path


@contextmanager
def picture_run(config: PicturesConfig, path: Path | None) -> Iterator[RunDirectory]:
    """Opens the run directory of a job of pictures, and says how to go on: at the start and at every stop.

    Args:
        config: The config. Where it differs from the one in the directory, it replaces that.
        path: The directory that `existing_run` has found; None creates one.

    Raises:
        ValueError: Another process draws into the directory.
    """
    text = dump_config(config)
    layers = about_layers(config.backend)
    run = RunDirectory(path) if path else RunDirectory.create(config.name, text, config.output, layers=layers)
    with only_writer(run.path):
        if path:
            run.write_config(text, {})
        go_on = f"dora-mm {config.command} --resume {shlex.quote(str(run.path))}"
        log.info("Run %s. After a stop: %s", run.path, go_on)
        try:
            yield run
        except BaseException:
            log.info("\nRun %s has stopped; its pictures so far are kept. To go on: %s", run.path, go_on)
            raise


@dataclass
class PictureJob:
    """The pictures of a job, and what has become of them.

    Attributes:
        folder: The run directory.
        pictures: The pictures.
        names: The name of each one's file.
        batches: The indices of the pictures of each batch.
        descriptions: What each is drawn with.
        done: The digests of the files that are there, by the index of the picture.
        failed: Why others could not be drawn, by index.
        scores: What they have scored, by index and the name of the score.
    """

    folder: Path
    pictures: Sequence[Picture]
    names: Sequence[str]
    batches: Sequence[Sequence[int]]
    descriptions: Sequence[Description]
    done: dict[int, str] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    scores: dict[int, Mapping[str, float]] = field(default_factory=dict)

    def file(self, index: int) -> Path:
        """The file of a picture."""
        return self.folder / SAMPLES / self.names[index]

    def entries(self) -> list[ManifestEntry]:
        """The entries of the manifest, in the order of the pictures."""
        batch_of = {index: number for number, batch in enumerate(self.batches, 1) for index in batch}
        return [
            ManifestEntry(
                row=picture.row,
                file=f"{SAMPLES}/{self.names[index]}",
                status="done" if index in self.done else "failed" if index in self.failed else "missing",
                batch=batch_of[index],
                settings=self._settings(index),
                digest=self.done.get(index),
                reason=self.failed.get(index),
                scores=self.scores.get(index, {}),
            )
            for index, picture in enumerate(self.pictures)
        ]

    def outcomes(self, batch: Sequence[int]) -> list[PictureOutcome]:
        """What has become of the pictures of a batch."""
        return [(index, self.done.get(index), self.failed.get(index)) for index in batch]

    def note(self, outcomes: Sequence[PictureOutcome]) -> list[int]:
        """Notes what has become of the pictures of a batch in another process; returns their indices."""
        self.done |= {index: digest for index, digest, _ in outcomes if digest is not None}
        self.failed |= {index: reason for index, _, reason in outcomes if reason is not None}
        return [index for index, _, _ in outcomes]

    def raise_failures(self) -> None:
        """Raises ValueError where pictures could not be drawn; the message names the first of them."""
        if not self.failed:
            return
        reasons = [f"row {self.pictures[i].row} ({self.names[i]}) {reason}" for i, reason in self.failed.items()]
        more = f", and {len(reasons) - MOST_NAMED} more" if len(reasons) > MOST_NAMED else ""
        raise ValueError(
            f"{len(reasons)} of {len(self.pictures)} pictures could not be drawn, see {self.folder / MANIFEST}: "
            + "; ".join(reasons[:MOST_NAMED])
            + more
        )

    def _settings(self, index: int) -> dict[str, Any]:
        picture = self.pictures[index]
        left_out = ("row", "adapters", "file", "folder", *picture.unsaid)
        settings = {name: value for name, value in vars(picture).items() if name not in left_out}
        adapter = adapters_text(picture.adapters)
        return {**settings, "adapter": adapter, "model": self.descriptions[index].model.path}


def plan(
    folder: Path,
    pictures: Sequence[Picture],
    length: Callable[[Picture], int],
    *,
    batch_size: int,
    model: BaseModel,
    adapters: Mapping[str, tuple[str, str]],
    environment: Mapping[str, Any],
    now: Record,
) -> PictureJob:
    """Plans the batches of a job, and describes every picture.

    Args:
        folder: The run directory.
        pictures: The pictures.
        length: Tells the length of a picture's prompts: pictures of a batch have the same.
        batch_size: The largest number of pictures in a batch.
        model: The base model.
        adapters: The two hashes of each adapter (see `png.UsedAdapter`), by the path that the pictures have.
        environment: See `png.Description`.
        now: The circumstances.
    """
    groups = batches(pictures, batch_size, length)
    descriptions = {
        index: Description(
            model,
            tuple(UsedAdapter(path, strength, *adapters[path]) for path, strength in pictures[index].weights),
            pictures[index].described,
            tuple((pictures[i].prompt, pictures[i].negative_prompt, pictures[i].seed) for i in group),
            position,
            environment,
            now,
        )
        for group in groups
        for position, index in enumerate(group)
    }
    return PictureJob(folder, pictures, file_names(pictures), groups, [descriptions[i] for i in range(len(pictures))])


def check_what_is_there(job: PictureJob) -> None:
    """Finds the pictures of a job that were drawn already, and verifies their files.

    Files that are damaged or changed, or that an earlier version of the job drew with other settings, are named in the
    log and kept in `earlier/`; they stay until their picture is drawn again. Others of a batch are not such settings,
    nor are other circumstances, which are reported. Files that do not belong to the job are named, and stay.
    """
    stale, damaged, kept, changes, entries = [], [], [], {}, recorded(job.folder)
    for index, name in enumerate(job.names):
        file = job.file(index)
        if not file.exists():
            continue
        try:
            before, now = read_description(file), job.descriptions[index]
        except ValueError:
            damaged.append(name)
            continue
        digest, entry = file_digest(file), entries.get(f"{SAMPLES}/{name}")
        if not before.is_drawn_like(now):
            stale.append(name)
            changes |= dict.fromkeys(now.model.changes(before.model))
        elif entry and entry.digest != digest:
            damaged.append(name)
        else:
            job.done[index] = digest
            job.scores[index] = entry.scores if entry else {}
            kept.append((before.circumstances, 1))
    samples, known = job.folder / SAMPLES, set(job.names)
    others = sorted({f.relative_to(samples).as_posix() for f in samples.rglob("*.png")} - known)
    earlier = job.folder / EARLIER
    keep_earlier(job.folder, [f"{SAMPLES}/{name}" for name in stale + damaged])
    other = f"another model ({', '.join(changes)} changed)" if changes else "other settings"
    for names, what in (
        (stale, f"were drawn with {other}: they are kept in {earlier}, and drawn again"),
        (damaged, f"are damaged, changed or no pictures of a job: they are kept in {earlier}, and drawn again"),
        (others, "do not belong to the job, and stay as they are"),
    ):
        if names:
            shown = ", ".join(names[:MOST_NAMED]) + (", ..." if len(names) > MOST_NAMED else "")
            log.warning("%d files in %s %s: %s", len(names), samples, what, shown)
    if job.done:
        log.info("%d of %d pictures are there already.", len(job.done), len(job.pictures))
        if message := about_kept(kept, job.descriptions[0].circumstances, "pictures that are there"):
            log.warning(message)


def draw(job: PictureJob, sampler: PictureSampler, load: LoadAdapter, processes: Processes = ALONE) -> None:
    """Draws the pictures that are missing, and writes the manifest.

    A batch with a missing picture is drawn as a whole, since rounding depends on the batch. Every picture is saved the
    moment it exists. Pictures that cannot be used, or have no room in memory, are noted in `job.failed`.

    Args:
        job: The job, after `check_what_is_there`; afterwards the main process knows what has become of all pictures.
        sampler: Draws the batches.
        load: Loads an adapter into its model.
        processes: Those that share the batches.
    """
    open_batches = [batch for batch in job.batches if any(index not in job.done for index in batch)]
    share = DividedWork(processes, len(open_batches))
    alone = nullcontext((lambda batches: None, lambda size, share: None))
    with written_down(job, sum(map(len, open_batches))) if processes.is_main else alone as (count, reach):
        for weights, numbers in groupby(share, key=lambda number: job.pictures[open_batches[number][0]].weights):
            with adapted(sampler.model, weights, load):
                sampler.forget_prompts()
                for number in numbers:
                    batch = open_batches[number]
                    draw_batch(job, batch, sampler, partial(reach, len(batch)))
                    share.tell(number, job.outcomes(batch))
                    count([batch, *map(job.note, share.told())])
        for outcomes in share.told(wait=True):
            count([job.note(outcomes)])


@contextmanager
def written_down(job: PictureJob, total: int) -> Iterator[tuple[Counted, Reached]]:
    """A context in which the manifest follows what becomes of pictures, and a bar counts them.

    Args:
        job: The job.
        total: The number of pictures that are drawn.

    Yields:
        What counts batches that have been drawn, and what takes the size of one and the share of it that is done.
    """
    drawn = 0
    write_manifest(job.folder, job.entries())
    next_manifest = time.monotonic() + SECONDS_BETWEEN_MANIFESTS

    def count(batches: Iterable[Sequence[int]]) -> None:
        nonlocal drawn, next_manifest
        drawn += sum(map(len, batches))
        progress.done = drawn
        if (started := time.monotonic()) > next_manifest:
            write_manifest(job.folder, job.entries())
            seconds = time.monotonic() - started  # half a second for 10,000 pictures
            next_manifest = started + max(SECONDS_BETWEEN_MANIFESTS, 100 * seconds)

    def reach(size: int, share: float) -> None:
        progress.done = drawn + size * share

    try:
        with Progress("drawing", total, "pictures") as progress:
            yield count, reach
    finally:  # after Ctrl-C, too
        write_manifest(job.folder, job.entries())


@contextmanager
def adapted(model: ImageModel, weights: Weights, load: LoadAdapter) -> Iterator[None]:
    """A context in which a model has adapters, merged; afterwards it is as it was.

    Args:
        model: The model, not adapted.
        weights: The adapters by path, each with its strength.
        load: Loads one into the model.
    """
    try:
        for number, (path, strength) in enumerate(weights):
            load(path, strength, f"adapter {number}")
        with merged_adapters(model.adaptable.values()):
            yield
    finally:
        remove_adapters(model)


def remove_adapters(model: ImageModel) -> None:
    """Removes the adapters of all networks that have some, and new tokens."""
    model.new_tokens.clear()
    for network in model.adaptable.values():
        if any(isinstance(module, AdaptedLayer) for module in network.modules()):
            remove(network)


def draw_batch(
    job: PictureJob, batch: Sequence[int], sampler: PictureSampler, on_step: Callable[[float], object] | None = None
) -> None:
    """Draws one batch, and saves the pictures of it that are missing; `on_step` is that of `PictureSampler.draw`."""
    pictures = [job.pictures[index] for index in batch]
    settings = pictures[0].settings
    prompts = [picture.prompts for picture in pictures]
    try:
        drawn = sampler.draw(prompts, [picture.seed for picture in pictures], **settings, on_step=on_step)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
        size = f"{len(batch)} of {settings['width']} x {settings['height']} pixels"
        drawn = [UnusablePictureError(f"has no room in memory, in a batch of {size}: lower batch_size or the size")]
        drawn *= len(batch)
    for index, picture in zip(batch, drawn, strict=True):
        if index in job.done:
            continue
        if isinstance(picture, UnusablePictureError):
            job.failed[index] = str(picture)
            job.file(index).unlink(missing_ok=True)  # of an earlier version of the job, which is kept
        else:
            title = sampler.scheduler_title(settings["scheduler"])
            save_picture(job.file(index), picture, job.descriptions[index], title)
            job.done[index] = file_digest(job.file(index))
