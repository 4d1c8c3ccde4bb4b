"""dora-mm score: predictions of any program by the rule of a suite, with intervals, and two of them compared."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dora_mm.config.paths import resolve_model, resolve_path
from dora_mm.data.vl.answers import AnsweredRows, answer_notes, predictions_of
from dora_mm.eval.vl.boxes import with_grids
from dora_mm.eval.vl.confidence_intervals import precision_notes
from dora_mm.eval.vl.metrics import report, score
from dora_mm.eval.vl.predictions.comparison import compared, comparison_report
from dora_mm.eval.vl.predictions.exports import write_for
from dora_mm.eval.vl.predictions.joining import joined, references_of, same_rows
from dora_mm.eval.vl.predictions.pages import write_page
from dora_mm.eval.vl.predictions.reading import PredictionFile, read_predictions
from dora_mm.registries.suites import file_stem
from dora_mm.registries.vl_tasks import TASKS
from dora_mm.utils.run_directory import differing_inputs


def main(
    predictions: Sequence[str],
    *,
    suite: str | None = None,
    data: str | None = None,
    form: str | None = None,
    annotations: str | None = None,
    split: str | None = None,
    partial: bool = False,
    keep_thoughts: bool = False,
    precision: float | None = None,
    page: Path | None = None,
    images: str | None = None,
    boxes: str | None = None,
    to: str | None = None,
    out: Path | None = None,
) -> None:
    """Scores files of predictions and prints a report of each; the second and further ones are compared with the first.

    Args:
        predictions: The files.
        suite: The suite or task; None: that of the files, which are ours.
        data: The data file with the references; None: the files have them.
        form: Its format; None: that of the suite.
        annotations: The file of answers of formats that have one.
        split: A split of the data file.
        partial: Whether rows that only one side has are left out, and not refused.
        keep_thoughts: Whether what a model thought before an answer is a part of it.
        precision: Half the width of a wished interval, in points, for which the number of answers is named.
        page: A new page of all answers, of two files with what changed.
        images: The folder of the images that it shows; None: those that rows name in full.
        boxes: The model that wrote the boxes of answers, in whose notation they are read; None: as the rules say.
        to: A tool for which the predictions are written to `out`.
        out: A new file.

    Raises:
        ValueError: A file cannot be read, rows are bad, repeated or missing, or there are no references.
    """
    check_arguments(data, form, annotations, split)
    check_written(predictions, page, images, to, out)
    files = [read_predictions(name) for name in predictions]
    task = task_of(files, suite)
    references = None if data is None else references_of(task, data, form, annotations, split)
    options = {"partial": partial, "keep_thoughts": keep_thoughts}
    records = [joined(task, file, references, **options) for file in files]
    if boxes is not None:
        records = [in_notation(boxes, task, rows) for rows in records]
    answered = [predictions_of(rows) for rows in records]
    for file, rows in zip(files, records, strict=True):
        print(f"## {file.path}: {file_stem(task)}\n\n{report_of(task, file, rows, precision)}\n")
    pairs = []
    for file, rows in zip(files[1:], answered[1:], strict=True):
        names = (str(files[0].path), str(file.path))
        pairs.append(same_rows(answered[0], rows, names, partial=partial))
        print(f"## compared\n\n{comparison_report(compared(task, *pairs[-1]), names)}\n")
        for remark in about_differences(files[0], file):
            print(f"{remark}\n")
    if page is not None:
        before, rows = pairs[0] if pairs else (None, answered[0])
        write_page(page, task, rows, before, images)
        print(f"page     {page}")
    if to is not None and out is not None:
        write_for(to, out, file_stem(task), answered[0])
        print(f"written  {out}")


def in_notation(model: str, task: str, rows: AnsweredRows) -> AnsweredRows:
    """Rows whose boxes are read as a model writes them.

    Raises:
        ValueError: The rows have no boxes, or the model cannot be opened.
    """
    from dora_mm.models.vl.families import load_for_questions  # here, since it imports torch and transformers

    settings = {"seed": 0, "trained_tower": False, "given": {"dtype": "float32"}, "device": "cpu"}
    found = with_grids(rows, load_for_questions(resolve_model(model), None, **settings).box_grid)
    if found == rows:
        raise ValueError(f"--boxes {model}: no row of {task} has boxes, or its class has no notation: leave it out")
    return found


def check_arguments(data: str | None, form: str | None, annotations: str | None, split: str | None) -> None:
    """Checks that arguments about the data file are given with a data file.

    Raises:
        ValueError: An argument would have no effect.
    """
    named = (("--format", form), ("--annotations", annotations), ("--split", split))
    if data is None and (given := [name for name, value in named if value is not None]):
        raise ValueError(f"{given[0]} is of the data file: name it with --data")


def check_written(
    predictions: Sequence[str], page: Path | None, images: str | None, to: str | None, out: Path | None
) -> None:
    """Checks what is to be written.

    Raises:
        ValueError: An argument would have no effect, or lacks another one.
    """
    if images is not None and page is None:
        raise ValueError("--images are for a page: --page ANSWERS.html")
    if page is not None and len(predictions) > 2:
        raise ValueError("--page shows one file of predictions, or two: name no more")
    if images is not None:
        resolve_path(images, "--images")
    if (to is None) != (out is None):
        raise ValueError("--to and --out belong together: --to vlmevalkit --out RESULTS.xlsx")
    if to is not None and len(predictions) > 1:
        raise ValueError("--to writes one file of predictions: name one")


def task_of(files: Sequence[PredictionFile], suite: str | None) -> str:
    """The suite or task by which the files are scored.

    Raises:
        ValueError: It is unknown, or the files say none, or several.
    """
    by_task = {file.about.task: file for file in files if file.about}
    if suite is None and len(by_task) != 1:
        why = (
            f"the files are of {' and '.join(by_task)}" if by_task else f"{files[0].path} does not say what it answers"
        )
        raise ValueError(f"{why}: name the suite with --suite, such as --suite docvqa")
    try:
        return TASKS.check(suite or next(iter(by_task)))
    except ValueError as error:
        raise ValueError(f"--suite: {error}") from None


def about_differences(one: PredictionFile, other: PredictionFile) -> Iterator[str]:
    """A sentence on the inputs of two files that differ, and one on their days."""
    if not (one.about and other.about):
        return
    both = one.about.digests, other.about.digests
    if names := dict.fromkeys([*differing_inputs(*both), *differing_inputs(*both[::-1])]):
        yield f"Not the same in {one.path} and {other.path}: {', '.join(names)}."
    first, second = (about.day or "none" for about in (one.about, other.about))
    if first != second:
        yield f"The day that the chat template got: {first} in {one.path}, {second} in {other.path}."


def report_of(task: str, file: PredictionFile, answered: AnsweredRows, precision: float | None) -> str:
    """Scores, rules, intervals and what is known of the answers, as Markdown."""
    rows = predictions_of(answered)
    scores = score(task, rows)
    notes = [*scores.notes, *answer_notes((example.id, answer) for example, answer in answered)]
    notes += precision_notes(task, rows, scores.main, precision)
    if len(rows) > 1 and not any(example.images or example.group for example, _ in rows):
        notes.append("images are not known, so that each row counts for itself: --data names what it is about")
    about = file.about.inputs if file.about else []
    about += [f"day of the chat template: {file.about.day}"] if file.about and file.about.day else []
    return report(file_stem(task), replace(scores, notes=(*notes, *about)))
