"""Visual questions with scored answers: the official VQA v2 files, their Karpathy form, and easy-vqa."""

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NotRequired

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from dora_mm.config.schema import Text
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.json_items import Item, list_items, value_of
from dora_mm.data.vl.readers.vqa_answers import NUM_ANSWERS, soft_scores
from dora_mm.data.vl.rows import BadRows, Id, Index, RowError, Score, good_rows


class _Answer(TypedDict):
    answer: str


class _Question(TypedDict):
    question_id: Id
    image_id: Index
    question: Text


class _Annotation(TypedDict):
    question_id: Id
    image_id: Index
    question_type: str
    answer_type: str
    answers: list[_Answer]


class _Karpathy(TypedDict):
    question_id: Id
    img_id: Text
    sent: Text
    label: NotRequired[dict[str, Score]]
    answers: NotRequired[list[_Answer]]
    answer_type: NotRequired[str]
    question_type: NotRequired[str]


class _Easy(TypedDict):
    number: int
    row: tuple[Text, Text, Index]  # question, answer, image id


QUESTION, ANNOTATION = TypeAdapter(_Question), TypeAdapter(_Annotation)
KARPATHY, EASY = TypeAdapter(_Karpathy), TypeAdapter(_Easy)


class Labels(NamedTuple):
    """A compact annotation: its strings are interned, since most answers occur in many questions."""

    id: Id
    image_id: int
    raw_answers: tuple[str, ...]
    kinds: tuple[str, str]


def read_vqa_v2(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every question of `v2_OpenEnded_mscoco_{split}_questions.json`, with annotations if the source has them.

    The two files are read in parallel. The official ones have the same order, so that no annotations need to be held.

    Raises:
        ValueError: A file is damaged, or a question or annotation is bad or has no counterpart and `bad` is set to
            "stop".
    """
    path = source.path
    split = _coco_split(path)
    annotations = _Annotations(Path(source.annotations), bad) if source.annotations else None

    def example(row: _Question) -> Example:
        image = f"COCO_{split}_{row['image_id']:012d}.jpg"
        unanswered = Example(str(row["question_id"]), (image,), row["question"])
        if annotations is None:
            return unanswered
        found = annotations.of(row["question_id"], row["image_id"])
        scores = soft_scores(found.raw_answers)
        return replace(
            unanswered,
            answers=tuple(scores),
            scores=tuple(scores.values()),
            raw_answers=found.raw_answers,
            kinds=found.kinds,
        )

    yield from good_rows(path, list_items(path, "questions"), QUESTION, example, bad)
    if annotations:
        annotations.report_unused(path)


class _Annotations:
    """Annotations by question id, read from the file only as far as they are needed."""

    def __init__(self, path: Path, bad: BadRows) -> None:
        self._path, self._bad = path, bad
        self._unread = good_rows(path, list_items(path, "annotations"), ANNOTATION, _compact, bad)
        self._pending: dict[Id, Labels] = {}  # read, but not matched with a question yet

    def of(self, question_id: Id, image_id: int) -> Labels:
        """The annotation of a question about this image.

        Raises:
            RowError: There is no usable annotation, or it is for another image.
        """
        while question_id not in self._pending:
            labels = next(self._unread, None)
            if labels is None:
                raise RowError(f"has no usable annotation in {self._path}")
            self._pending[labels.id] = labels
        found = self._pending.pop(question_id)
        if found.image_id != image_id:
            raise RowError(f"has another image_id than its annotation in {self._path}")
        return found

    def report_unused(self, questions: Path) -> None:
        """Reports annotations without a question as bad rows: questions and annotations must correspond one to one."""
        for labels in (*self._pending.values(), *self._unread):
            self._bad.add(f"{self._path}, question_id {labels.id}", f"has no usable question in {questions}")


def _compact(row: _Annotation) -> Labels:
    kinds = (sys.intern(row["answer_type"]), sys.intern(row["question_type"]))
    return Labels(row["question_id"], row["image_id"], _ten(row["answers"]), kinds)


def _ten(answers: list[_Answer]) -> tuple[str, ...]:
    if len(answers) != NUM_ANSWERS:
        raise RowError("must have exactly ten answers")
    return tuple(sys.intern(answer["answer"]) for answer in answers)


def _coco_split(path: Path) -> str:
    """The COCO split of the images ("train2014"), from the file's data_subtype or else from its name."""
    stated: Any = value_of(path, "data_subtype")
    named = re.fullmatch(r"v2_OpenEnded_mscoco_(.+)_questions\.json", path.name)
    if not isinstance(stated, str) and not named:
        raise ValueError(
            f"{path} does not name the COCO split of its images: give it a data_subtype such as train2014, "
            "or a name such as v2_OpenEnded_mscoco_train2014_questions.json"
        )
    split = stated if isinstance(stated, str) else named[1] if named else ""
    return split.replace("-dev", "").replace("-std", "")  # test-dev2015 is a subset of the images of test2015


def read_vqa_karpathy(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every question of `karpathy_{train,val,test}.json`, with its label.

    A label may be empty: no answer to that question was frequent enough for the format's list of answers. The ten
    answers, by which questions are scored, come from the official file if the source names it, or from the row itself.
    Training uses the label.

    Raises:
        ValueError: The file is damaged, or a row is bad and `bad` is set to "stop".
    """
    path = source.path
    annotations = _Annotations(Path(source.annotations), bad) if source.annotations else None

    def example(row: _Karpathy) -> Example:
        label = positive_scores(row.get("label", {}))
        raw_answers = _ten(row["answers"]) if "answers" in row else ()
        kinds = (row.get("answer_type", ""), row.get("question_type", ""))
        if annotations is not None:
            found = annotations.of(row["question_id"], _image_number(row["img_id"]))
            raw_answers, kinds = found.raw_answers, found.kinds
        return Example(
            str(row["question_id"]),
            (with_suffix(row["img_id"]),),
            row["sent"],
            tuple(label),
            tuple(label.values()),
            raw_answers,
            kinds if any(kinds) else (),
        )

    return good_rows(path, list_items(path), KARPATHY, example, bad)


def read_easy_vqa(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every question of easy-vqa's `questions.json`. It has no ids; the row number, from 0, is used as the id.

    Raises:
        ValueError: The file is damaged, or a row is bad and `bad` is set to "stop".
    """
    path = source.path

    def example(item: _Easy) -> Example:
        question, answer, image = item["row"]
        return Example(str(item["number"]), (f"{image}.png",), question, (answer,), (1.0,))

    def numbered() -> Iterator[Item]:
        for number, (where, row) in enumerate(list_items(path)):
            yield where, {"number": number, "row": tuple(row) if isinstance(row, list) else row}

    return good_rows(path, numbered(), EASY, example, bad)


def _image_number(image_id: str) -> int:
    """42 for "COCO_val2014_000000000042"."""
    number = re.fullmatch(r"(?:.*_)?(\d+)", Path(image_id).stem)
    if number is None:
        raise RowError("has an img_id without a number, which annotations have")
    return int(number[1])


def positive_scores(label: dict[str, float]) -> dict[str, float]:
    """The answers of a label whose score is positive."""
    return {answer: score for answer, score in label.items() if score > 0}


def with_suffix(image_id: str) -> str:
    """The file name of an image id in VL-T5's files, which omit ".jpg" for COCO and GQA."""
    return image_id if Path(image_id).suffix else f"{image_id}.jpg"
