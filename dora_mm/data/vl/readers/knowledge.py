"""Questions of knowledge: MMMU and MMMU-Pro, ScienceQA and A-OKVQA, in their own files."""

import re
from collections.abc import Iterator, Mapping
from string import ascii_uppercase
from typing import Any, NotRequired

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from dora_mm.config.schema import Text
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.json_items import Item, object_items
from dora_mm.data.vl.readers.choices import choice, listed
from dora_mm.data.vl.readers.contents import image_of, interleaved
from dora_mm.data.vl.readers.file_rows import file_items
from dora_mm.data.vl.readers.vqa_answers import soft_scores
from dora_mm.data.vl.rows import BadRows, Index, RowError, checked, good_rows

SUBJECT = re.compile(r"[a-z]+_(.+)_\d+")  # of an id of MMMU, such as validation_Art_Theory_1
UNKNOWN = ("", "?")  # the answer of a row of MMMU's test split
IMAGES = ("image", *(f"image_{number}" for number in range(1, 8)))


class _Discipline(TypedDict):
    id: Text
    question: NotRequired[str | None]  # MMMU-Pro's vision rows have it in the image
    options: str
    answer: NotRequired[str | None]
    subject: NotRequired[str | None]


class _Lesson(TypedDict):
    question: Text
    choices: list[str]
    answer: NotRequired[Index]
    hint: NotRequired[str]
    image: NotRequired[str | None]
    subject: NotRequired[str]
    grade: NotRequired[str]
    split: Text


class _NamedLesson(TypedDict):
    id: str
    value: _Lesson


class _Direct(TypedDict):
    question_id: Text
    image_id: Index
    question: Text
    choices: list[str]
    correct_choice_idx: NotRequired[Index]
    direct_answers: NotRequired[list[str]]
    difficult_direct_answer: NotRequired[bool]


LESSON, DIRECT, DISCIPLINE = TypeAdapter(_NamedLesson), TypeAdapter(_Direct), TypeAdapter(_Discipline)


def mmmu_example(row: Mapping[str, Any]) -> Example:
    """A question of MMMU or MMMU-Pro on the hub, with or without options.

    An image stands where the question or an option names it, as `<image 2>`.

    Raises:
        RowError: The row is bad.
    """
    known = checked(DISCIPLINE, row)
    options = listed(known["options"])
    options = [] if options in ([""], ["[]"]) else options
    answer = known.get("answer") or ""
    answers = [] if answer in UNKNOWN else [answer] if options else listed(answer)
    subject = SUBJECT.fullmatch(known["id"])
    kind = known.get("subject") or (subject[1] if subject else "")
    images = tuple(image_of(row[name]) for name in IMAGES if row.get(name) is not None)
    question, kinds = known.get("question") or "", (kind,) if kind else ()
    if options:
        return interleaved(choice(known["id"], question, options, "".join(answers), images=images, kinds=kinds))
    return interleaved(Example(known["id"], images, question, tuple(answers), (1.0,) * len(answers), kinds=kinds))


def read_scienceqa(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every question of a split of ScienceQA's `problems.json`, with its image where it has one.

    Images are `{split}/{id}/image.png`.

    Raises:
        ValueError: The file is damaged or has no such split, or a row is bad and `bad` is set to "stop".
    """
    path = source.path

    def example(item: _NamedLesson) -> Example:
        row, key = item["value"], item["id"]
        answer = letter_of(row.get("answer"), row["choices"])
        hint, image = row.get("hint", ""), row.get("image")
        names = (f"{row['split']}/{key}/{image}",) if image else ()
        kinds = (row.get("subject", ""), "image" if image else "text" if hint else "none", row.get("grade", ""))
        return choice(key, row["question"], row["choices"], answer, images=names, hint=hint, kinds=kinds)

    def of_the_split() -> Iterator[Item]:
        splits = set()
        for where, item in object_items(path):
            value = item["value"]
            split = value.get("split") if isinstance(value, dict) else source.split
            splits.add(str(split))
            if source.split in (None, split):
                yield where, item
        if source.split and source.split not in splits:
            raise ValueError(f"{path} has no rows of the split {source.split!r}: it has {', '.join(sorted(splits))}")

    return good_rows(path, of_the_split(), LESSON, example, bad)


def letter_of(number: int | None, options: list[str]) -> str:
    """The letter of an option by its number, from 0; "" for none."""
    if number is None:
        return ""
    if not 0 <= number < min(len(options), len(ascii_uppercase)):
        raise RowError("has an answer that is not the number of a choice")
    return ascii_uppercase[number]


def read_aokvqa(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every question of `aokvqa_v1p0_{split}.json` with its choices.

    Raises:
        ValueError: The file is damaged, or a row is bad and `bad` is set to "stop".
    """
    path = source.path

    def example(row: _Direct) -> Example:
        answer = letter_of(row.get("correct_choice_idx"), row["choices"])
        return choice(row["question_id"], row["question"], row["choices"], answer, images=_coco(row["image_id"]))

    return good_rows(path, file_items(path), DIRECT, example, bad)


def read_aokvqa_direct(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads the questions of `aokvqa_v1p0_{split}.json` that are answered directly, which difficult ones are not.

    Raises:
        ValueError: The file is damaged, or a row is bad and `bad` is set to "stop".
    """
    path = source.path

    def example(row: _Direct) -> Example:
        given = tuple(row.get("direct_answers", ()))
        known = soft_scores(given)
        key, images = row["question_id"], _coco(row["image_id"])
        return Example(key, images, row["question"], tuple(known), tuple(known.values()), given)

    rows = (
        (where, row)
        for where, row in file_items(path)
        if not (isinstance(row, dict) and row.get("difficult_direct_answer") is True)
    )
    return good_rows(path, rows, DIRECT, example, bad)


def _coco(number: int) -> tuple[str, ...]:
    return (f"{number:012d}.jpg",)
