"""Generates the images of a job into a run directory, and goes on where an earlier process has stopped."""

from __future__ import annotations

import logging
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
from dora_mm.config.generation import ImageGenerationConfig
from dora_mm.config.loader import dump_config, saved_values
from dora_mm.core import remove
from dora_mm.core.adapted import AdaptedLayer
from dora_mm.core.inject import merged_adapters
from dora_mm.models.images.image_model import ImageModel
from dora_mm.sampling.batch.prompt_row import ActiveAdapters, adapters_text
from dora_mm.sampling.batch.requests import ImageRequest, batches, file_names
from dora_mm.sampling.image_sampler import ImageSampler, UnusableImageError
from dora_mm.sampling.manifest import (
    EARLIER,
    MANIFEST,
    ManifestEntry,
    keep_earlier,
    recorded,
    write_manifest,
)
from dora_mm.sampling.png import BaseModel, GenerationMetadata, UsedAdapter, read_metadata, save_image
from dora_mm.sampling.references import references_of
from dora_mm.sampling.strengths import HashableStrength
from dora_mm.utils.circumstances import Record, about_kept
from dora_mm.utils.digest import file_digest
from dora_mm.utils.folders import is_free
from dora_mm.utils.home import expanded
from dora_mm.utils.lock import only_writer
from dora_mm.utils.processes import SINGLE_PROCESS, DividedWork, Processes
from dora_mm.utils.progress import Progress
from dora_mm.utils.run_directory import CONFIG, RunDirectory
from dora_mm.utils.shell import quoted

log = logging.getLogger(__name__)
SAMPLES = "samples"
SECONDS_BETWEEN_MANIFESTS = 5.0
MOST_NAMED = 5  # files in one message

ImageOutcome = tuple[int, str | None, str | None]  # the index of an image, the digest of its file, or why it failed
Counted = Callable[[Iterable[Sequence[int]]], object]
Reached = Callable[[int, float], object]
LoadAdapter = Callable[[str, HashableStrength, str], object]  # loads the adapter of a path, at a strength, under a name


def existing_run(config: ImageGenerationConfig, resume: Path | None = None) -> Path | None:
    """Finds the run directory that a job goes on in: the one to resume, or the config's `output` where it exists.

    Args:
        config: The config.
        resume: The run directory to go on with; None: `output`, or a new directory.

    Returns:
        The directory; None where a new one is needed.

    Raises:
        ValueError: The directory holds something else than a run of this pipeline, or another process generates into
            it.
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
def generation_run(config: ImageGenerationConfig, path: Path | None) -> Iterator[RunDirectory]:
    """Opens the run directory of a batch generation, and says how to go on: at the start and at every stop.

    Args:
        config: The config. Where it differs from the one in the directory, it replaces that.
        path: The directory that `existing_run` has found; None creates one.

    Raises:
        ValueError: Another process generates into the directory.
    """
    text = dump_config(config)
    layers = about_layers(config.backend)
    run = RunDirectory(path) if path else RunDirectory.create(config.name, text, config.output, layers=layers)
    with only_writer(run.path):
        if path:
            run.write_config(text, {})
        go_on = f"dora-mm {config.command} --resume {quoted(run.path)}"
        log.info("Run %s. After a stop: %s", run.path, go_on)
        try:
            yield run
        except BaseException:
            log.info("\nRun %s has stopped; its images so far are kept. To go on: %s", run.path, go_on)
            raise


@dataclass
class BatchGeneration:
    """The images of a job, and what has become of them.

    Attributes:
        folder: The run directory.
        requests: The images.
        names: The name of each one's file.
        batches: The indices of the images of each batch.
        metadata: What each is generated with.
        done: The digests of the files that are there, by the index of the image.
        failed: Why others could not be generated, by index.
        scores: What they have scored, by index and the name of the score.
    """

    folder: Path
    requests: Sequence[ImageRequest]
    names: Sequence[str]
    batches: Sequence[Sequence[int]]
    metadata: Sequence[GenerationMetadata]
    done: dict[int, str] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    scores: dict[int, Mapping[str, float]] = field(default_factory=dict)

    def file(self, index: int) -> Path:
        """The file of an image."""
        return self.folder / SAMPLES / self.names[index]

    def entries(self) -> list[ManifestEntry]:
        """The entries of the manifest, in the order of the images."""
        batch_of = {index: number for number, batch in enumerate(self.batches, 1) for index in batch}
        return [
            ManifestEntry(
                row=request.row,
                file=f"{SAMPLES}/{self.names[index]}",
                status="done" if index in self.done else "failed" if index in self.failed else "missing",
                batch=batch_of[index],
                settings=self._settings(index),
                digest=self.done.get(index),
                reason=self.failed.get(index),
                scores=self.scores.get(index, {}),
            )
            for index, request in enumerate(self.requests)
        ]

    def outcomes(self, batch: Sequence[int]) -> list[ImageOutcome]:
        """The outcomes of a batch: the index, file digest and failure reason of each image."""
        return [(index, self.done.get(index), self.failed.get(index)) for index in batch]

    def note(self, outcomes: Sequence[ImageOutcome]) -> list[int]:
        """Notes what has become of the images of a batch in another process; returns their indices."""
        self.done |= {index: digest for index, digest, _ in outcomes if digest is not None}
        self.failed |= {index: reason for index, _, reason in outcomes if reason is not None}
        return [index for index, _, _ in outcomes]

    def raise_failures(self) -> None:
        """Raises ValueError where images could not be generated; the message names the first of them."""
        if not self.failed:
            return
        reasons = [f"row {self.requests[i].row} ({self.names[i]}) {reason}" for i, reason in self.failed.items()]
        more = f", and {len(reasons) - MOST_NAMED} more" if len(reasons) > MOST_NAMED else ""
        raise ValueError(
            f"{len(reasons)} of {len(self.requests)} images could not be generated, see {self.folder / MANIFEST}: "
            + "; ".join(reasons[:MOST_NAMED])
            + more
        )

    def _settings(self, index: int) -> dict[str, Any]:
        request = self.requests[index]
        left_out = ("row", "adapters", "file", "folder", *request.omitted_settings)
        settings = {name: value for name, value in vars(request).items() if name not in left_out}
        adapter = adapters_text(request.adapters)
        return {**settings, "adapter": adapter, "model": self.metadata[index].model.path}


def plan(
    folder: Path,
    requests: Sequence[ImageRequest],
    length: Callable[[ImageRequest], int],
    *,
    batch_size: int,
    model: BaseModel,
    adapters: Mapping[str, tuple[str, str]],
    environment: Mapping[str, Any],
    now: Record,
) -> BatchGeneration:
    """Plans the batches of a job, and describes every image.

    Args:
        folder: The run directory.
        requests: The images.
        length: Tells the length of an image's prompts: images of a batch have the same.
        batch_size: The largest number of images in a batch.
        model: The base model.
        adapters: The two hashes of each adapter (see `png.UsedAdapter`), by the path that the images have.
        environment: See `png.GenerationMetadata`.
        now: The circumstances.
    """
    groups = batches(requests, batch_size, length)
    metadata = {
        index: GenerationMetadata(
            model,
            tuple(UsedAdapter(path, strength, *adapters[path]) for path, strength in requests[index].active_adapters),
            requests[index].file_settings,
            tuple((requests[i].prompt, requests[i].negative_prompt, requests[i].seed) for i in group),
            position,
            environment,
            now,
        )
        for group in groups
        for position, index in enumerate(group)
    }
    return BatchGeneration(folder, requests, file_names(requests), groups, [metadata[i] for i in range(len(requests))])


def check_what_is_there(generation: BatchGeneration) -> None:
    """Finds the images of a job that were generated already, and verifies their files.

    Files that are damaged or changed, or that an earlier version of the job drew with other settings, are named in the
    log and kept in `earlier/`; they stay until their image is generated again. Others of a batch are not such settings,
    nor are other circumstances, which are reported. Files that do not belong to the job are named, and stay.
    """
    stale, damaged, kept, changes, entries = [], [], [], {}, recorded(generation.folder)
    for index, name in enumerate(generation.names):
        file = generation.file(index)
        if not file.exists():
            continue
        try:
            before, now = read_metadata(file), generation.metadata[index]
        except ValueError:
            damaged.append(name)
            continue
        digest, entry = file_digest(file), entries.get(f"{SAMPLES}/{name}")
        if not before.is_same_image_as(now):
            stale.append(name)
            changes |= dict.fromkeys(now.model.changes(before.model))
        elif entry and entry.digest != digest:
            damaged.append(name)
        else:
            generation.done[index] = digest
            generation.scores[index] = entry.scores if entry else {}
            kept.append((before.circumstances, 1))
    samples, known = generation.folder / SAMPLES, set(generation.names)
    others = sorted({f.relative_to(samples).as_posix() for f in samples.rglob("*.png")} - known)
    earlier = generation.folder / EARLIER
    keep_earlier(generation.folder, [f"{SAMPLES}/{name}" for name in stale + damaged])
    other = f"another model ({', '.join(changes)} changed)" if changes else "other settings"
    for names, what in (
        (stale, f"were generated with {other}: they are kept in {earlier}, and generated again"),
        (damaged, f"are damaged, changed or no images of a job: they are kept in {earlier}, and generated again"),
        (others, "do not belong to the job, and stay as they are"),
    ):
        if names:
            shown = ", ".join(names[:MOST_NAMED]) + (", ..." if len(names) > MOST_NAMED else "")
            log.warning("%d files in %s %s: %s", len(names), samples, what, shown)
    if generation.done:
        log.info("%d of %d images are there already.", len(generation.done), len(generation.requests))
        if message := about_kept(kept, generation.metadata[0].circumstances, "images that are there"):
            log.warning(message)


def generate(
    generation: BatchGeneration, sampler: ImageSampler, load: LoadAdapter, processes: Processes = SINGLE_PROCESS
) -> None:
    """Generates the images that are missing, and writes the manifest.

    A batch with a missing image is generated as a whole, since rounding depends on the batch. Every image is saved the
    moment it exists. Images that cannot be used, or have no room in memory, are noted in `job.failed`.

    Args:
        generation: The images, after `check_what_is_there`; afterwards the main process knows the outcome of each.
        sampler: Generates the batches.
        load: Loads an adapter into its model.
        processes: Those that share the batches.
    """
    open_batches = [batch for batch in generation.batches if any(index not in generation.done for index in batch)]
    share = DividedWork(processes, len(open_batches))
    single_process = nullcontext((lambda batches: None, lambda size, share: None))
    with (
        written_down(generation, sum(map(len, open_batches))) if processes.is_main else single_process as (count, reach)
    ):
        for active, numbers in groupby(share, lambda n: generation.requests[open_batches[n][0]].active_adapters):
            with adapted(sampler.model, active, load):
                sampler.forget_prompts()
                for number in numbers:
                    batch = open_batches[number]
                    generate_batch(generation, batch, sampler, partial(reach, len(batch)))
                    share.report(number, generation.outcomes(batch))
                    count([batch, *map(generation.note, share.reported())])
        for outcomes in share.reported(wait=True):
            count([generation.note(outcomes)])


@contextmanager
def written_down(generation: BatchGeneration, total: int) -> Iterator[tuple[Counted, Reached]]:
    """A context in which the manifest follows what becomes of images, and a bar counts them.

    Args:
        generation: The job.
        total: The number of images that are generated.

    Yields:
        What counts batches that have been generated, and what takes the size of one and the share of it that is done.
    """
    generated = 0
    write_manifest(generation.folder, generation.entries())
    next_manifest = time.monotonic() + SECONDS_BETWEEN_MANIFESTS

    def count(batches: Iterable[Sequence[int]]) -> None:
        nonlocal generated, next_manifest
        generated += sum(map(len, batches))
        progress.done = generated
        if (started := time.monotonic()) > next_manifest:
            write_manifest(generation.folder, generation.entries())
            seconds = time.monotonic() - started  # half a second for 10,000 images
            next_manifest = started + max(SECONDS_BETWEEN_MANIFESTS, 100 * seconds)

    def reach(size: int, share: float) -> None:
        progress.done = generated + size * share

    try:
        with Progress("sampling", total, "images") as progress:
            yield count, reach
    finally:  # after Ctrl-C, too
        write_manifest(generation.folder, generation.entries())


@contextmanager
def adapted(model: ImageModel, weights: ActiveAdapters, load: LoadAdapter) -> Iterator[None]:
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


def generate_batch(
    generation: BatchGeneration,
    batch: Sequence[int],
    sampler: ImageSampler,
    on_step: Callable[[float], object] | None = None,
) -> None:
    """Generates one batch, and saves its missing images; `on_step` is that of `ImageSampler.generate`."""
    requests = [generation.requests[index] for index in batch]
    settings = requests[0].settings
    prompts = [request.prompts for request in requests]
    try:
        references = references_of(sampler.model, requests[0])
        seeds = [request.seed for request in requests]
        generated = sampler.generate(prompts, seeds, **settings, references=references, on_step=on_step)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
        size = f"{len(batch)} of {settings['width']} x {settings['height']} pixels"
        generated = [UnusableImageError(f"has no room in memory, in a batch of {size}: lower batch_size or the size")]
        generated *= len(batch)
    for index, image in zip(batch, generated, strict=True):
        if index in generation.done:
            continue
        if isinstance(image, UnusableImageError):
            generation.failed[index] = str(image)
            generation.file(index).unlink(missing_ok=True)  # of an earlier version of the job, which is kept
        else:
            title = sampler.scheduler_title(settings["scheduler"])
            save_image(generation.file(index), image, generation.metadata[index], title)
            generation.done[index] = file_digest(generation.file(index))
