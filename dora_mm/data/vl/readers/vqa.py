"""Questions about pictures with several worthy answers: VQA v2's own files, their Karpathy form, and easy-vqa."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter
from typing_extensions import NotRequired, TypedDict

from dora_mm.config.vl import SourceConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.json_items import Item, list_items, value_of
from dora_mm.data.vl.rows import BadRows, Id, Index, RowError, Score, Text, good_rows
from dora_mm.data.vl.vqa_answers import soft_scores

__all__ = ["read_easy_vqa", "read_vqa_karpathy", "read_vqa_v2", "with_suffix", "worthy"]

NUM_ANSWERS = 10


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
    """An annotation without its braces: ten short strings, most of them shared with other questions."""

    id: Id
    image_id: int
    raw_answers: tuple[str, ...]
    kinds: tuple[str, str]


def read_vqa_v2(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Every question of `v2_OpenEnded_mscoco_{split}_questions.json`, with its annotation where the source has them.

    The two files are read side by side; in the official ones the order is the same, so that nothing is held.

    Raises:
        ValueError: a file is damaged, or a question or an annotation is bad or alone and `bad` stops at it.
    """
    path = Path(source.file)
    split = _coco_split(path)
    annotations = _Annotations(Path(source.annotations), bad) if source.annotations else None

    def example(row: _Question) -> Example:
        image = f"COCO_{split}_{row['image_id']:012d}.jpg"
        bare = Example(str(row["question_id"]), (image,), row["question"])
        return annotations.answer(bare, row) if annotations else bare

    yield from good_rows(path, list_items(path, "questions"), QUESTION, example, bad)
    if annotations:
        annotations.report_rest(path)


class _Annotations:
    """Annotations by question, read only as far as they are asked for."""

    def __init__(self, path: Path, bad: BadRows) -> None:
        self._path, self._bad = path, bad
        self._rest = good_rows(path, list_items(path, "annotations"), ANNOTATION, _compact, bad)
        self._waiting: dict[Id, Labels] = {}

    def answer(self, bare: Example, row: _Question) -> Example:
        found = self._take(row["question_id"])
        if found is None:
            raise RowError(f"has no usable annotation in {self._path}")
        if found.image_id != row["image_id"]:
            raise RowError(f"is about another picture than its annotation in {self._path}")
        scores = soft_scores(found.raw_answers)
        return Example(
            bare.id, bare.images, bare.text, tuple(scores), tuple(scores.values()), found.raw_answers, found.kinds
        )

    def _take(self, question_id: Id) -> Labels | None:
        while question_id not in self._waiting:
            following = next(self._rest, None)
            if following is None:
                return None
            self._waiting[following.id] = following
        return self._waiting.pop(question_id)

    def report_rest(self, questions: Path) -> None:
        """Whatever no question has asked for is bad: the numbers of questions and annotations must agree."""
        for alone in (*self._waiting.values(), *self._rest):
            self._bad.add(f"{self._path}, question_id {alone.id}", f"has no usable question in {questions}")


def _compact(row: _Annotation) -> Labels:
    kinds = (sys.intern(row["answer_type"]), sys.intern(row["question_type"]))
    return Labels(row["question_id"], row["image_id"], _ten(row["answers"]), kinds)


def _ten(answers: list[_Answer]) -> tuple[str, ...]:
    if len(answers) != NUM_ANSWERS:
        raise RowError("has not exactly ten answers")
    return tuple(sys.intern(answer["answer"]) for answer in answers)


def _coco_split(path: Path) -> str:
    """The part of COCO that the pictures are of ("train2014"): as the file says, else as its name does."""
    stated: Any = value_of(path, "data_subtype")
    named = re.fullmatch(r"v2_OpenEnded_mscoco_(.+)_questions\.json", path.name)
    if not isinstance(stated, str) and not named:
        raise ValueError(
            f"{path} does not say of which part of COCO its pictures are: give it a data_subtype such as train2014, "
            "or the name v2_OpenEnded_mscoco_train2014_questions.json"
        )
    split = stated if isinstance(stated, str) else named[1] if named else ""
    return split.replace("-dev", "").replace("-std", "")  # test-dev2015 is a part of the pictures of test2015


def read_vqa_karpathy(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Every question of `karpathy_{train,val,test}.json`; ten answers beside the label are kept as well.

    A label may be empty: no answer of that question was frequent enough for the form's list of answers.

    Raises:
        ValueError: the file is damaged, or a row is bad and `bad` stops at it.
    """
    path = Path(source.file)

    def example(row: _Karpathy) -> Example:
        label = worthy(row.get("label", {}))
        raw_answers = _ten(row["answers"]) if "answers" in row else ()
        kinds = (row.get("answer_type", ""), row.get("question_type", ""))
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
    """Every question of easy-vqa's `questions.json`, which has no ids: the row's number, from 0, is its id.

    Raises:
        ValueError: the file is damaged, or a row is bad and `bad` stops at it.
    """
    path = Path(source.file)

    def example(item: _Easy) -> Example:
        question, answer, image = item["row"]
        return Example(str(item["number"]), (f"{image}.png",), question, (answer,), (1.0,))

    def numbered() -> Iterator[Item]:
        for number, (where, row) in enumerate(list_items(path)):
            yield where, {"number": number, "row": tuple(row) if isinstance(row, list) else row}

    return good_rows(path, numbered(), EASY, example, bad)


def worthy(label: dict[str, float]) -> dict[str, float]:
    """The answers of a label that are worth anything."""
    return {answer: score for answer, score in label.items() if score > 0}


def with_suffix(image_id: str) -> str:
    """The file of a picture of VL-T5's forms, which name COCO's and GQA's without ".jpg"."""
    return image_id if Path(image_id).suffix else f"{image_id}.jpg"
