"""Output of an evaluation, written and printed: answers, scores, a report and a page of examples."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dora_mm.data.images.frames import is_video, stills
from dora_mm.data.images.pixels import load_rgb
from dora_mm.data.vl.answers import AnsweredRows, answer_notes, predictions_of
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.image_folder import image_path
from dora_mm.eval.vl.confidence_intervals import precision_notes
from dora_mm.eval.vl.metrics import report, score, score_row, task_table
from dora_mm.eval.vl.pages import PageExample, PageSection, write_examples_page
from dora_mm.eval.vl.predictions.scored import About, write_scored
from dora_mm.eval.vl.scores import VLScores, is_answered
from dora_mm.eval.vl.submissions import suffix, write_predictions
from dora_mm.registries.suites import file_stem
from dora_mm.registries.vl_tasks import TASKS
from dora_mm.utils.atomic import write_text

log = logging.getLogger(__name__)
Answered = Mapping[str, AnsweredRows]  # by task


def write_answers(
    folder: Path,
    answered: Answered,
    settings: Mapping[str, Any],
    digests: Mapping[str, Any],
    prompts: Mapping[str, str],
    notes: Mapping[str, str],
    day: str = "",
) -> dict[str, VLScores]:
    """Scores answers, and writes predictions_<task> and scored_<task>.jsonl of every task.

    Args:
        folder: Where they are written.
        answered: The answers.
        settings: How they were made: sections of the config, by their names.
        digests: Of model, adapter and data, by a description of each.
        prompts: The prompts of tasks that have others than their own.
        notes: A sentence by task on answers that were given under other circumstances; empty: none were.
        day: See `About`.

    Returns:
        The scores of the tasks that have references, each with how precisely it is known.
    """
    found = {}
    for name, answers in answered.items():
        stem, rows = file_stem(name), predictions_of(answers)
        write_predictions(name, rows, folder / f"predictions_{stem}{suffix(name)}")
        # Some rows of Karpathy's VQA have no reference answer: they count as wrong, and a note gives their number.
        scores = score(name, rows) if any(is_answered(example) for example, _ in rows) else None
        mixed = {"circumstances": notes[name]} if notes[name] else {}
        about = About(name, settings={**settings, **mixed}, digests=digests, day=day)
        prompt = prompts.get(name, TASKS[name].prompt) or "{text}"
        write_scored(folder / f"scored_{stem}.jsonl", answers, scores, about, prompt)
        remarks = answer_notes((example.id, answer) for example, answer in answers)
        if remarks and scores is None:
            log.warning("%s: %s", name, "; ".join(remarks))
        if scores is not None:
            precision = precision_notes(name, rows, scores.main)
            found[name] = replace(scores, notes=(*scores.notes, *remarks, *precision, *mixed.values()))
    return found


def write_report(
    folder: Path,
    title: str,
    scores: Mapping[str, VLScores],
    unscored: Sequence[str],
    main: Mapping[str, float],
) -> None:
    """Writes scores.json and report.md, and prints the report.

    Args:
        folder: Where they are written.
        title: The name of the evaluation.
        scores: By task.
        unscored: The tasks without references.
        main: The main metrics, and their mean, by name.
    """
    values: dict[str, Any] = {name: {"task": name, **asdict(found)} for name, found in scores.items()}
    write_text(folder / "scores.json", json.dumps(values, indent=2) + "\n")
    overall = ", ".join(f"{name} {value:.2f}" for name, value in main.items())
    texts = [
        f"# {title}\n\n{overall}",
        *([f"## all tasks\n\n{overview}"] if len(scores) > 1 and (overview := task_table(scores)) else []),
        *(f"## {name}\n\n{report(name, found)}" for name, found in scores.items()),
    ]
    texts += [f"## {name}\n\nNo answers to compare with: predictions only." for name in unscored]
    write_text(folder / "report.md", "\n\n".join(texts) + "\n")
    print("\n\n".join(texts[1:]))
    print(f"\nreport   {folder / 'report.md'}")


def write_examples(folder: Path, title: str, answered: Answered, images: Mapping[str, str | None], count: int) -> None:
    """Writes examples.html: rows of every task, evenly spaced over its split.

    Args:
        folder: Where it is written.
        title: The name of the evaluation.
        answered: The answers.
        images: The folder of the images of each task.
        count: How many rows of each task; 0: there is no page.
    """
    if not count:
        return
    sections = []
    for name, rows in answered.items():
        examples = [
            PageExample.from_example(
                example, answer.text, score_row(name, example, answer.text), load_images(name, example, images[name])
            )
            for example, answer in rows[:: max(1, len(rows) // count)][:count]
        ]
        sections.append(PageSection(name, examples))
    write_examples_page(folder / "examples.html", title, sections)
    print(f"examples {folder / 'examples.html'}")


def load_images(task: str, example: Example, folder: str | None) -> list[Any]:
    """The images of an example; none for videos, and where only features of images are known."""
    if TASKS[task].clips or (folder is None and not all(map(os.path.isabs, example.images))):
        return []
    paths = [image_path(folder, name) for name in example.images]
    return [still for path in paths for still in (stills(path) if is_video(path) else [load_rgb(path, "white")])]
