"""Predictions joined with what they are compared with, by id; rows that one side lacks are counted and named."""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from dora_mm.config.paths import resolve_path
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.answers import AnsweredRows, ModelAnswer
from dora_mm.data.vl.embedded import without_content
from dora_mm.data.vl.example import Example, Predictions
from dora_mm.data.vl.readers import read_source, resolved
from dora_mm.data.vl.readers.file_rows import COLUMNAR, kind_of_file
from dora_mm.data.vl.rows import BadRows, count_of
from dora_mm.eval.vl.metrics import scorer_of
from dora_mm.eval.vl.predictions.reading import AnsweredRow, PredictionFile, named
from dora_mm.eval.vl.scores import is_answered
from dora_mm.registries.readers import READERS
from dora_mm.registries.vl_tasks import TASKS

log = logging.getLogger(__name__)
OF_TABLES = ("choices", "answers")  # the formats of VLMEvalKit's


def references_of(
    task: str, data: str, form: str | None, annotations: str | None = None, split: str | None = None
) -> list[Example]:
    """The rows of a suite's data file, without the content of images that are in it.

    Args:
        task: The suite.
        data: The file.
        form: Its format; None: that of the suite's formats which reads a file of this kind.
        annotations: The file of answers, where the format has one.
        split: As in `SourceConfig`.

    Raises:
        ValueError: The file cannot be read, or a row of it is bad.
    """
    source = SourceConfig(format=form or _format(task, data), file=data, annotations=annotations, split=split)
    if source.format not in TASKS[task].formats:
        raise ValueError(f"--format: {task} reads {', '.join(TASKS[task].formats)}, not {source.format}")
    rows = list(map(without_content, read_source(resolved(source), BadRows("stop"))))
    if "annotations" in source.reader.keys and annotations is None and not any(map(is_answered, rows)):
        raise ValueError(f"--data: {data} has no answers: give the file that has them, --annotations FILE")
    return rows


def _format(task: str, data: str) -> str:
    """The first of a suite's formats that reads what a file is: a table, Parquet of the hub, or its official file."""
    path, forms = resolve_path(data), TASKS[task].formats
    kind = kind_of_file(path) if path.is_file() else COLUMNAR[0]  # folders are snapshots of the hub
    if kind == "table":
        fitting = [form for form in forms if form in OF_TABLES]
    else:
        fitting = [form for form in forms if kind in COLUMNAR and READERS[form].hub]
    return fitting[0] if fitting else forms[0]


def joined(
    task: str,
    file: PredictionFile,
    references: Sequence[Example] | None,
    *,
    partial: bool,
    keep_thoughts: bool = False,
) -> AnsweredRows:
    """The answers of a file with the examples that they are to, in the order of these.

    Args:
        task: The suite.
        file: The file.
        references: The rows of the data; None: those that the file has itself.
        partial: Whether rows that only one side has are left out.
        keep_thoughts: Whether thoughts are a part of the answers.

    Raises:
        ValueError: There are no references, or less than the suite needs, or one side lacks rows of the other and
            `partial` is not set.
    """
    if references is None:
        without = [row.where for row in file.rows if row.example is None or not is_answered(row.example)]
        if without:
            raise ValueError(
                f"{file.path}: {count_of(len(without), 'row')} of {len(file.rows)} have no references "
                f"({named(without)}): name the data that they are answers to with --data"
            )
        if file.by_number and not scorer_of(task).scores_answers_only:
            raise ValueError(f"{file.path} has no options and kinds, which {task} needs: name the data with --data")
        return [(row.example, _read(file, row, row.example, keep_thoughts)) for row in file.rows if row.example]
    if file.by_number:
        references = [replace(example, id=str(number)) for number, example in enumerate(references)]
    known = {example.id: example for example in references}
    rows = {row.id: row for row in file.rows}
    check_same(rows, known, f"{file.path}", "the data", partial=partial)
    _check_targets(file, known)
    return [(example, _read(file, rows[key], example, keep_thoughts)) for key, example in known.items() if key in rows]


def _read(file: PredictionFile, row: AnsweredRow, example: Example, keep_thoughts: bool) -> ModelAnswer:
    """The answer with or without its thought; our own files have it apart already, if they have not kept it."""
    if keep_thoughts:
        return row.answer.with_thought()
    return row.answer if file.about else row.answer.without_thought(example.answers)


def _check_targets(file: PredictionFile, known: Mapping[str, Example]) -> None:
    """Checks that the references that a file has itself are those of the data: else its numbers are of other rows."""
    pairs = [(row.where, row.example, known[row.id]) for row in file.rows if row.example and row.id in known]
    other = [
        where
        for where, predictions, example in pairs
        if not {*predictions.answers} & {*example.answers, *example.raw_answers}
    ]
    if file.by_number and len(other) * 2 > len(pairs):
        raise ValueError(
            f"{file.path}: {len(other)} of {len(pairs)} rows have another target than the row of this number in "
            f"the data ({named(other)}): it is another split, or in another order"
        )


def same_rows(
    first: Predictions, second: Predictions, names: Sequence[str], *, partial: bool
) -> tuple[Predictions, Predictions]:
    """Two predictions of the same rows, in the same order.

    Raises:
        ValueError: One lacks rows of the other and `partial` is not set, or a row has other references.
    """
    ours = {example.id: (example, text) for example, text in first}
    theirs = {example.id: (example, text) for example, text in second}
    check_same(ours, theirs, names[0], names[1], partial=partial)
    both = [key for key in ours if key in theirs]
    other = [key for key in both if _truth(ours[key][0]) != _truth(theirs[key][0])]
    if other:
        raise ValueError(
            f"{names[0]} and {names[1]}: {count_of(len(other), 'row')} of {len(both)} have other references "
            f"({named(other)}): score both against the same --data"
        )
    return [ours[key] for key in both], [theirs[key] for key in both]


def _truth(example: Example) -> tuple:
    return example.answers, example.raw_answers, example.options


def check_same(first: Collection[str], second: Collection[str], name: str, other: str, *, partial: bool) -> None:
    """Checks that both sides have the same ids, or with `partial` one in common.

    Raises:
        ValueError: They do not; the numbers and some of the ids are named.
    """
    lacking = [*_only(second, first, f"{name} lacks", other), *_only(first, second, f"{other} lacks", name)]
    if not any(key in second for key in first):
        raise ValueError(f"{name} and {other} have no row in common: {'; '.join(lacking)}")
    if lacking and not partial:
        raise ValueError(f"{'; '.join(lacking)}: --partial scores the rows that both have")
    for sentence in lacking:
        log.warning("%s: left out", sentence)


def _only(one: Iterable[str], other: Collection[str], lacks: str, of: str) -> list[str]:
    missing = [key for key in one if key not in other]
    return [f"{lacks} {count_of(len(missing), 'row')} of {of} ({named(missing)})"] if missing else []
