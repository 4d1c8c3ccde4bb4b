"""The configs that `dora-mm new vlm` writes: of a training, and of an evaluation of its held-out rows."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from dora_mm.config import resolve_path
from dora_mm.config.vl import TrainVLConfig
from dora_mm.preview.drafts import Changes, Draft, folder_of_images, head_of, print_next, write_files
from dora_mm.preview.machine import largest_gpu
from dora_mm.registries.vl_tasks import TASKS
from dora_mm.utils.yaml12 import MISSING

FEW_ROWS = 1000  # fewer are seen three times
SHORT = 4  # words of an answer that is scored by exact match, the median of the data
ANSWERED = 1000  # rows whose answers say that
WANTED, MOST = 20, 0.2  # held-out rows, below which scores have no intervals, and the largest share of the rows


def write_vl(draft: Draft, start: TrainVLConfig) -> None:
    """Writes the configs, and prints what was found and what comes next.

    Raises:
        ValueError: The data cannot be read, or a file exists already.
    """
    from dora_mm.data.vl.readers.chat import find_shape, read_chat  # these need the extra vl
    from dora_mm.data.vl.readers.file_rows import file_items
    from dora_mm.data.vl.readers.hub_files import files_of
    from dora_mm.data.vl.readers.unread import about_unread, unread_columns
    from dora_mm.data.vl.rows import BadRows

    if draft.data is None:
        raise ValueError("--data is missing: the file of your questions and answers, such as my.json")
    files = files_of(resolve_path(draft.data, "--data"))
    shape, num_rows = find_shape(files[0]).name, sum(1 for file in files for _ in file_items(file))
    first = start.data.all_tasks[0]
    source = first.train
    assert source is not None
    source = source.model_copy(update={"file": str(resolve_path(draft.data))})
    has_images = any(row.images for row in read_chat(source, BadRows("skip")))
    rows = islice((row for row in read_chat(source, BadRows("skip")) if row.answers), ANSWERED)
    task, metric = task_of(first.task, [row.answers[0] for row in rows])
    unread = unread_columns(source)
    changes = vl_changes(draft, num_rows, task, has_images=has_images)
    if first.valid:
        changes[("data", "valid", "share")] = held_out_share(num_rows)
    about = (
        f"{num_rows} rows of {draft.data}{f' about the images in {draft.images}' if has_images else ''}.\n"
        f"It started from {draft.recipe}, whose head says what memory it takes.\n"
        "--dry-run checks every row and shows some as the model sees them. Every key is explained in docs/vlm.md."
    )
    evaluation = draft.file.with_name(f"{draft.file.stem}_eval.yaml")
    config = write_files(
        draft, changes, about, lambda config: {evaluation: evaluation_text(draft, evaluation, config, metric)}
    )
    where = f"images in {draft.images}" if has_images else "no row has an image"
    print(f"questions {num_rows} rows of {draft.data}, {shape}; {where}")
    if unread:
        print(f"unread    {about_unread(unread)}")
    print(f"score     {metric}\n\nwritten   {draft.file}, {evaluation}")
    question = ["IMAGE", "QUESTION"] if has_images else ["QUESTION"]
    print_next(
        config,
        {
            "--dry-run first: every row is checked": ["train", draft.file],
            "the score of held-out rows; with --set adapter=null the model's own": ["eval", evaluation],
            "without and with the adapter": ["ask", config.model.path, *question, "--adapter", draft.run],
            "for transformers and vLLM": ["merge", config.model.path, draft.run, "merged"],
        },
    )


def vl_changes(draft: Draft, num_rows: int, task: str, *, has_images: bool) -> Changes:
    """The changes to the recipe, without the share of rows that is held out."""
    changes: Changes = {("data", "task"): task, ("data", "train", "file"): draft.data}
    changes[("data", "train", "images")] = folder_of_images(draft) if has_images else MISSING
    changes[("train", "epochs")] = 1 if num_rows >= FEW_ROWS else 3
    if draft.follow_links:
        changes[("data", "follow_links")] = True
    if draft.model is not None:
        changes[("model", "path")] = draft.model
    if not has_images:  # nothing passes the connector that some recipes train; a language model has none, and no images
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


def evaluation_text(draft: Draft, file: Path, config: TrainVLConfig, metric: str) -> str:
    """The config that scores the held-out rows of a training."""
    about = (
        f"Scores the rows that {draft.file} holds out, with its adapter,\n"
        f"by {metric}.\n"
        "--set adapter=null scores the model without it, and adapter=RUN that of another training."
    )
    sections = config.model_dump(mode="json", include={"model", "data"}, exclude_unset=True)
    values: dict[str, Any] = {
        "pipeline": "eval_vl",
        "model": sections["model"],
        "adapter": f"runs/{draft.file.stem}/latest",
        "data": sections["data"],
        "decode": {"batch_size": config.evaluate.batch_size},
    }
    return f"{head_of('eval', file, about)}\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}"
