"""The configs that `dora-mm new vlm` writes: of a training, and of an evaluation of its held-out rows."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import yaml

from dora_mm.config import find_path, resolve_path
from dora_mm.config.vl import EvalVLConfig, TrainVLConfig
from dora_mm.config.vl_data import HeldOutConfig
from dora_mm.preview.drafts import Changes, Draft, folder_of_images, head_of, print_next, write_files
from dora_mm.preview.machine import largest_gpu
from dora_mm.registries.vl_tasks import TASKS
from dora_mm.utils.folders import OPTION, Links
from dora_mm.utils.shell import quoted
from dora_mm.utils.yaml12 import MISSING

FEW_ROWS = 1000  # fewer are seen three times
SHORT = 4  # words of an answer that is scored by exact match, the median of the data
ANSWERED = 1000  # rows whose answers say that
LOOKED_AT = 1000  # rows whose images are looked for
OF_PAIRS = "how often the chosen answer gains more than the rejected one, and by how much"
OF_A_RUN = {"pipeline", "name", "output", "backend", "adapter"}  # keys of a training that its evaluation has of its own
RATE_OF_PAIRS = 5e-6  # examples/train_lora/qwen3vl_lora_dpo.yaml of LLaMA-Factory, whose alpha is twice the rank, too
WANTED, MOST = 20, 0.2  # held-out rows, below which scores have no intervals, and the largest share of the rows


class FoundRows(NamedTuple):
    """What the rows of a data file are.

    Attributes:
        shape: Whose shape they have, and its keys.
        number: How many there are.
        task: The task that they are trained and scored by.
        format: The format that reads them.
        metric: A sentence on the metric.
        has_images: Whether a row has images.
        image_names: The names of images in files, of some rows.
        unread: The columns with texts or images that are not read, each with the first of its texts.
    """

    shape: str
    number: int
    task: str
    format: str
    metric: str
    has_images: bool
    image_names: list[str]
    unread: dict[str, str]

    @property
    def pairs(self) -> bool:
        """Whether a row has two answers, of which one is preferred."""
        return TASKS[self.task].pairs


def write_vl(draft: Draft, start: TrainVLConfig) -> None:
    """Writes the configs, and prints what was found and what comes next.

    Raises:
        ValueError: The data cannot be read, or a file exists already.
    """
    from dora_mm.data.vl.readers.unread import about_unread  # needs the extra vl

    rows = found_rows(draft, start)
    missing = missing_images(draft, rows)
    changes = vl_changes(draft, start, rows)
    if start.data.all_tasks[0].valid:
        changes[("data", "valid", "share")] = held_out_share(rows.number)
    evaluation = draft.file.with_name(f"{draft.file.stem}_eval.yaml")
    config = write_files(
        draft,
        changes,
        about(draft, rows),
        lambda config: {evaluation: evaluation_text(draft.file, evaluation, config, rows.metric)},
    )
    where = f"images in {draft.images}" if rows.has_images else "no row has an image"
    print(f"{'pairs    ' if rows.pairs else 'questions'} {rows.number} rows of {draft.data}, {rows.shape}; {where}")
    if missing:
        print(f"missing   {missing}")
    if rows.unread:
        print(f"unread    {about_unread(rows.unread)}")
    print(f"score     {rows.metric}\n\nwritten   {draft.file}, {evaluation}")
    question = ["IMAGE", "QUESTION"] if rows.has_images else ["QUESTION"]
    own = "" if rows.pairs else "; --set adapter=null scores the bare model"
    print_next(
        config,
        {
            "--dry-run first: every row is checked": ["train", draft.file],
            f"the score of held-out rows{own}": ["eval", evaluation],
            "without and with the adapter": ["ask", config.model.path, *question, "--adapter", draft.run],
            "for transformers and vLLM": ["merge", config.model.path, draft.run, "merged"],
        },
    )


def found_rows(draft: Draft, start: TrainVLConfig) -> FoundRows:
    """What the rows of a draft's data are, pairs of answers or conversations.

    Raises:
        ValueError: The data are missing or cannot be read.
    """
    from dora_mm.data.vl.embedded import PREFIX  # these need the extra vl
    from dora_mm.data.vl.readers import read_source
    from dora_mm.data.vl.readers.chat import find_shape
    from dora_mm.data.vl.readers.file_rows import file_items
    from dora_mm.data.vl.readers.hub_files import files_of
    from dora_mm.data.vl.readers.preferences import find_pair_shape, has_pairs
    from dora_mm.data.vl.readers.unread import unread_columns
    from dora_mm.data.vl.rows import BadRows

    if draft.data is None:
        raise ValueError("--data is missing: the file of your questions and answers, such as my.json")
    files = files_of(resolve_path(draft.data, "--data"))
    first = start.data.all_tasks[0]
    pairs = has_pairs(files[0])
    shape = find_pair_shape(files[0]).name if pairs else find_shape(files[0]).name
    number = sum(1 for file in files for _ in file_items(file))
    source = first.train
    assert source is not None
    paired = next(name for name, task in TASKS.items() if task.pairs)
    form = TASKS[paired].formats[0] if pairs else source.format
    source = source.model_copy(update={"file": str(resolve_path(draft.data)), "format": form})
    with_images = islice((row for row in read_source(source, BadRows("skip")) if row.images), LOOKED_AT)
    images = [name for row in with_images for name in row.images]
    names = [*dict.fromkeys(name for name in images if not name.startswith(PREFIX))]
    answered = islice((row for row in read_source(source, BadRows("skip")) if row.answers), ANSWERED)
    if pairs:
        task, metric = paired, OF_PAIRS
    else:
        task, metric = task_of(first.task, [row.answers[0] for row in answered])
    return FoundRows(shape, number, task, form, metric, bool(images), names, unread_columns(source))


def missing_images(draft: Draft, rows: FoundRows) -> str:
    """A sentence on images that are not in the folder; empty: all are there.

    Raises:
        ValueError: None of them is, or no folder is given for images in files.
    """
    from dora_mm.data.vl.image_folder import ImageFolder, folder_with

    if not rows.image_names:
        return ""
    assert draft.data is not None
    given = draft.images if draft.images and find_path(draft.images) else None
    folder = ImageFolder(resolve_path(given) if given else None, links=Links(draft.follow_links, OPTION), anywhere=True)
    missing = [name for name in rows.image_names if folder.find(name) is None]
    if len(missing) == len(rows.image_names):
        near = folder_with(missing, resolve_path(draft.data), given)
        better = f", did you mean --images {quoted(near)}?" if near else ""
        if draft.images is None:
            raise ValueError(f"--images is missing: the folder of your images{better}")
        if given is None:
            raise ValueError(f"--images: {draft.images} does not exist{better}")
        reason = folder.refusal(missing[0])
        raise ValueError(
            f"--images: none of the images of {draft.data} is in {draft.images}; one is {missing[0]}"
            + (f", which {reason}" if reason else better)
        )
    if not missing:
        return ""
    return f"{len(missing):,} of {len(rows.image_names):,} images are not in {draft.images}; one is {missing[0]}"


def about(draft: Draft, rows: FoundRows) -> str:
    """The head of the training's config."""
    lines = [
        f"{rows.number} rows of {draft.data}{f' about the images in {draft.images}' if rows.has_images else ''}.",
        f"It started from {draft.recipe}, whose head says what memory it takes.",
    ]
    if rows.pairs:
        lines += [
            "Each row has two answers, of which one is preferred: docs/preferences.md. A pair is two rows of a batch,",
            "so batch_size is half of the recipe's; lr is that of LLaMA-Factory's example of DPO.",
        ]
    lines += [
        "--dry-run checks every row and shows some as the model sees them.",
        "docs/vlm.md explains data, models and scores; docs/keys.md lists every key.",
    ]
    return "\n".join(lines)


def vl_changes(draft: Draft, start: TrainVLConfig, rows: FoundRows) -> Changes:
    """The changes to the recipe, without the share of rows that is held out."""
    changes: Changes = {("data", "task"): rows.task, ("data", "train", "file"): draft.data}
    changes[("data", "train", "images")] = folder_of_images(draft) if rows.has_images else MISSING
    changes[("train", "epochs")] = 1 if rows.number >= FEW_ROWS else 3
    if rows.pairs:
        size, accumulated = start.train.batch_size, start.train.gradient_accumulation_steps
        changes |= {("data", "train", "format"): rows.format, ("optimizer", "lr"): RATE_OF_PAIRS}
        if size > 1:
            changes |= {("train", "batch_size"): size // 2, ("train", "gradient_accumulation_steps"): 2 * accumulated}
    if draft.follow_links:
        changes[("data", "follow_links")] = True
    if draft.model is not None:
        changes[("model", "path")] = draft.model
    if not rows.has_images:  # nothing passes the connector that some recipes train; language models have none
        changes |= {("model", "max_pixels"): MISSING, ("adapter", "parts"): MISSING}
    if largest_gpu() is None:  # many processors emulate half precision
        changes |= {("model", "dtype"): "float32", ("train", "mixed_precision"): "no"}
    return changes


def task_of(task: str, answers: Sequence[str]) -> tuple[str, str]:
    """The task by which such answers are scored, and a sentence on its metric.

    Args:
        task: That of short answers.
        answers: Some of the answers.
    """
    from dora_mm.eval.vl.rouge import words_of

    if not answers:
        return task, "exact match, but no row has an answer that is read"
    if median([len(words_of(answer)) for answer in answers]) > SHORT:
        named = TASKS[task].sentences
        return named, f"ROUGE-L, since most answers have more than {SHORT} words; exact match beside it"
    return task, f"exact match, since most answers have {SHORT} words at most; ROUGE-L beside it"


def held_out_share(num_rows: int) -> float:
    """The share of the rows that is held out: 5 %, and more of few rows."""
    return round(min(MOST, max(0.05, WANTED / max(num_rows, 1))), 2)


def evaluation_text(training: Path, file: Path, config: TrainVLConfig, metric: str) -> str:
    """The config that scores the held-out rows of a training.

    Args:
        training: The config file of the training.
        file: The new file.
        config: The config of the training.
        metric: What is measured, as the end of a sentence.
    """
    pairs = any(TASKS[task.task].pairs for task in config.data.all_tasks)
    bare = (
        "" if pairs else "--set adapter=null scores the model without it, and adapter=RUN that of another training.\n"
    )
    chosen = any(isinstance(task.valid, HeldOutConfig) for task in config.data.all_tasks)
    same = "The data section decides which rows are held out: change it in both files, or in neither."
    about = (
        f"Scores the rows that {training.name} {'holds out' if chosen else 'validates on'}, with its adapter,\n"
        f"by {metric}.\n{bare}{same if chosen else ''}".rstrip()
    )
    both = (TrainVLConfig.model_fields.keys() & EvalVLConfig.model_fields.keys()) - OF_A_RUN
    sections = config.model_dump(mode="json", include=set(both), exclude_unset=True)
    values: dict[str, Any] = {
        "pipeline": "eval_vl",
        "model": sections["model"],
        "adapter": f"runs/{training.stem}/latest",
        "data": sections["data"],
        **{key: section for key, section in sections.items() if key not in ("model", "data")},
        "decode": {"batch_size": config.evaluate.batch_size},
    }
    return f"{head_of('eval', file, about)}\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}"
