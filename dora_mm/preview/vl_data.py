"""The data of a training before it starts: rows, their lengths, bad ones, and the first ones as the model sees them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dora_mm.config.paths import find_path
from dora_mm.config.vl import TrainVLConfig
from dora_mm.config.vl_data import SPLITS, HeldOutConfig, SourceConfig, Split, VLTaskConfig
from dora_mm.data.images.frames import check_video, is_video
from dora_mm.data.images.pixels import load_rgb, upright_size
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.image_folder import image_path
from dora_mm.data.vl.readers import FILES, paths_under
from dora_mm.data.vl.readers.unread import about_unread
from dora_mm.data.vl.report import SKIPPED, data_report, learned_answers, table_figures
from dora_mm.data.vl.row_view import CLOSE, OPEN
from dora_mm.data.vl.rows import MAX_ROWS_NAMED, quiet
from dora_mm.data.vl.splits import AllRows, TrainingSet, about_share, open_split, open_training
from dora_mm.data.vl.tables import ExampleTable
from dora_mm.models.vl.vl_model import RowLengths, VLModel, likeliest_answer
from dora_mm.preview.lengths import RowSample, check_sample, sample_lengths, sample_table
from dora_mm.registries.vl_tasks import TASKS
from dora_mm.utils.progress import tracked

LEAVES_OUT = "data.on_bad_data: skip leaves them out"
SHOWN = 3  # rows that are shown, of all tasks together


@dataclass
class DataPreview:
    """Findings about the data of a config.

    Attributes:
        sections: Paragraphs of text.
        problems: Why a training would stop, a sentence each.
        sets: The training sets that are there.
        samples: The lengths of some rows of each, where its family reports them.
        largest: The batch of the longest of these.
    """

    sections: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    sets: dict[str, TrainingSet] = field(default_factory=dict)
    samples: dict[str, RowSample] = field(default_factory=dict)
    largest: LargestBatch | None = None


class LargestBatch(NamedTuple):
    """A batch of the longest rows of a task.

    Attributes:
        task: Name of the task.
        rows: The rows of its training set, by index.
        length: Tokens of the longest.
    """

    task: str
    rows: Sequence[int]
    length: int

    @property
    def num_computed(self) -> int:
        """How many rows are computed: of pairs two each."""
        return len(self.rows) * (2 if TASKS[self.task].pairs else 1)

    @property
    def num_tokens(self) -> int:
        """The tokens of the batch, padding included."""
        return self.num_computed * self.length

    def __str__(self) -> str:
        return f"{self.num_computed:,} rows of {self.length:,} tokens"


def preview_data(
    config: TrainVLConfig, model: VLModel | None, *, colour: bool = False, decode: bool = False
) -> DataPreview:
    """Reads all data of a config that is there. Bad rows are found also where a training stops at the first one.

    Those that only encoding shows are found in the sample of `sample_lengths`; all images are decoded on request.

    Args:
        config: The config.
        model: The model, whose weights are not needed; None: lengths and rows as it sees them are left out.
        colour: Whether to mark rows with the colours of a terminal.
        decode: Whether to decode all images.
    """
    found, tables, figures = DataPreview(), {}, {}
    images: dict[str, tuple[ExampleTable, str | None]] = {}
    remarks: list[str] = []
    skipping = config.model_copy(update={"data": config.data.model_copy(update={"on_bad_data": "skip"})})
    with quiet():
        for task, split, source in present_splits(config):
            name = f"{task.task} {split}"
            try:
                if split == "train":
                    table = _open_training(skipping, task, model, found)
                else:
                    table = open_split(task, split, skipping.data, model or AllRows())
            except ValueError as error:
                found.problems.append(str(error))
                continue
            tables[name], figures[name] = table, _figures(source, table)
            figures[name] |= learned_answers(table) if split == "train" else {}
            if table.unread:
                remarks.append(f"columns of {source.title} that are not read: {about_unread(table.unread)}")
            full_table = found.sets[task.task].table if split == "train" and task.task in found.sets else table
            images[name] = full_table, source.images
    for task in config.data.all_tasks:
        halves = [len(tables[name]) for split in SPLITS if (name := f"{task.task} {split}") in tables]
        if isinstance(task.valid, HeldOutConfig) and len(halves) == len(SPLITS):
            remarks.append(about_share(task.valid, sum(halves), halves[-1]))
    skipped = {name: table.skipped for name, table in tables.items() if table.skipped}
    if skipped and config.data.on_bad_data == "stop":
        found.problems.append(first_bad_row(skipped))
    found.sections += [data_report(figures)] if figures else []
    found.sections += dict.fromkeys(filter(None, remarks))
    found.sections += [bad_row_list(skipped)] if skipped else []
    if decode and not config.vision.features:
        count, broken = broken_images(images)
        found.sections.append("\n  ".join([f"{len(broken):,} of {count:,} images are broken", *broken]))
        if broken and config.data.on_bad_data == "stop":
            found.problems.append(f"{broken[0]}; a training would stop there ({LEAVES_OUT})")
    found.sections += [sample_table(task, sample) for task, sample in found.samples.items()]
    if model is not None and found.sets:
        found.sections.append(first_rows(model, found.sets, colour=colour))
    return found


def present_splits(config: TrainVLConfig) -> Iterator[tuple[VLTaskConfig, Split, SourceConfig]]:
    """The splits of a config whose files and folders exist, each with its task and the name of its key."""
    for task in config.data.all_tasks:
        for split in SPLITS:
            if source := task.source_of(split):
                sources = task.trained if source is task.train else (source,)
                paths = [path for key in (*FILES, "images") for each in sources for path in paths_under(each, key)]
                if all(find_path(path) for path in paths):
                    yield task, split, source


def _open_training(
    config: TrainVLConfig, task: VLTaskConfig, model: VLModel | None, found: DataPreview
) -> ExampleTable:
    """The usable rows of a training split, as far as that is known; their lengths are added to `found`."""
    check, name = model or AllRows(), task.task
    rows = open_training(config.data.with_tasks((task,)), config.train.batch_size, check)[name]
    if model is None:
        return rows.table
    if (sample := sample_lengths(model, name, rows)) is not None:
        check_sample(rows.table, sample)
    found.sets[name] = rows
    if sample is None:
        return rows.table
    found.samples[name] = sample
    batch = largest_batch(name, rows, sample.lengths)
    found.largest = max(filter(None, [found.largest, batch]), key=lambda b: b.num_tokens, default=None)
    return rows.table.without_rows(sample.lengths.bad)


def largest_batch(task: str, rows: TrainingSet, lengths: RowLengths) -> LargestBatch | None:
    """The batch of the longest rows of a training set that were encoded, as they are read; None if none was.

    Args:
        task: Name of the task.
        rows: The training set.
        lengths: The lengths of some of its rows.
    """
    order = np.argsort(-lengths.tokens_read, kind="stable")
    usable = order[~lengths.loses_answer[order]][: rows.batch_size]
    if not len(usable):
        return None
    chosen = np.resize(usable, rows.batch_size)  # of fewer rows than that, a batch has some again
    return LargestBatch(task, lengths.rows[chosen].tolist(), int(lengths.tokens_read[chosen[0]]))


def batch_of(model: VLModel, sets: Mapping[str, TrainingSet], batch: LargestBatch, number: int = 0) -> Any:
    """A batch as the model computes it, each row with its likeliest answer; the same for every `number`."""
    rows = sets[batch.task]
    examples = [rows.table[row] for row in batch.rows]
    return model.batch(batch.task, examples, rows.images, [(likeliest_answer(example), 1.0) for example in examples])


def _figures(source: SourceConfig, table: ExampleTable) -> dict[str, str]:
    """The figures of a table, with one number for all rows that are bad, since these are listed."""
    figures = {label: text for label, text in table_figures(source, table).items() if not label.startswith(SKIPPED)}
    return figures | {"bad rows": f"{sum(map(len, table.skipped.values())):,}"}


Skipped = Mapping[str, Mapping[str, Sequence[str]]]  # the places of bad rows by split and reason


def bad_row_list(skipped: Skipped) -> str:
    """The reasons why rows of each split are bad, with their number and the first locations."""
    lines = []
    for name, reasons in skipped.items():
        lines.append(f"bad rows of {name}")
        for reason, locations in reasons.items():
            lines += [
                f"  {len(locations):,} x {reason}",
                *(f"      {location}" for location in locations[:MAX_ROWS_NAMED]),
            ]
            lines += [f"      and {len(locations) - MAX_ROWS_NAMED:,} more"] if len(locations) > MAX_ROWS_NAMED else []
    return "\n".join(lines)


def first_bad_row(skipped: Skipped) -> str:
    """A sentence with the row at which a training would stop."""
    reasons = next(iter(skipped.values()))
    reason, locations = next(iter(reasons.items()))
    number = sum(len(found) for each in skipped.values() for found in each.values())
    return f"{locations[0]}: {reason}; a training would stop there, at the first of {number:,} bad rows ({LEAVES_OUT})"


def broken_images(tables: Mapping[str, tuple[ExampleTable, str | None]]) -> tuple[int, list[str]]:
    """Decodes the images of splits, each with the folder of its images.

    Returns:
        How many images there are, and a line on each that cannot be decoded, with its rows.
    """
    names = {
        name: {image: image_path(folder, image) for image in table.images()} for name, (table, folder) in tables.items()
    }
    paths = sorted({path for of_split in names.values() for path in of_split.values()})
    with ThreadPoolExecutor() as pool:
        shown = tracked(pool.map(_why_broken, paths), "decoding images", "images", len(paths))
        reasons = {path: reason for path, reason in zip(paths, shown, strict=True) if reason}
    rows: dict[Path, list[str]] = defaultdict(list)
    for name, (table, _) in tables.items() if reasons else ():
        for index, images in enumerate(table.image_lists()):
            for path in {names[name][image] for image in images} & reasons.keys():
                rows[path].append(f"{table[index].id} of {name}")
    return len(paths), [f"{reason}; rows {', '.join(rows[path])}" for path, reason in reasons.items()]


def _why_broken(path: Path) -> str | None:
    try:
        (check_video if is_video(path) else load_rgb)(path)
    except ValueError as error:
        return str(error)
    return None


# --- rows as the model sees them -------------------------------------------------------------------------------------


def first_rows(model: VLModel, sets: Mapping[str, TrainingSet], *, colour: bool = False) -> str:
    """The first rows of every task as the model sees them."""
    blocks = [f"the first rows as the model sees them; tokens with loss are between {OPEN} and {CLOSE}"]
    for task, rows in sets.items():
        for example in rows.table[: max(1, SHOWN // len(sets))]:
            for name, one in _answers_of(example):
                heading = "; ".join([f"row {one.id} of {task}{name}", *_images(one, rows.images)])
                try:
                    row = model.row_view(task, one, rows.images).text(colour=colour)
                except ValueError as error:
                    row = f"  {error}"
                blocks.append(f"{heading}\n{row}")
    return "\n".join(blocks)


def _answers_of(example: Example) -> list[tuple[str, Example]]:
    """An example; or one with each of the answers of a pair, and which that is."""
    if not example.rejected:
        return [("", example)]
    return [(", the chosen answer", example), (", the rejected answer", example.with_rejected())]


def _images(example: Example, folder: str | None) -> Iterator[str]:
    """The names of the images of an example, with their sizes where they can be read."""
    for name in example.images:
        if folder is None and not os.path.isabs(name):  # the name of features
            yield name
            continue
        try:
            height, width = upright_size(image_path(folder, name))
            yield f"{name} ({width} x {height} pixels)"
        except ValueError:  # features are read instead, or what cannot be read is told with the row
            yield name
