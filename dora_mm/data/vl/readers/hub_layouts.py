"""The columns of benchmarks on the hub, by the format of their official files, and how a row becomes an example.

One more repository is an entry of LAYOUTS, which names its columns. These are the columns that lmms-eval's tasks read
(`tasks/*/utils.py` of 0.7.3), and those of the repositories' own cards.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from string import ascii_uppercase
from typing import Any

from dora_mm.data.images.decoders import open_image
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.readers.charts import AUGMENTED, HUMAN
from dora_mm.data.vl.readers.chat_shapes import JsonRow
from dora_mm.data.vl.readers.choices import choice, choice_cells, listed
from dora_mm.data.vl.readers.contents import image_of, interleaved
from dora_mm.data.vl.readers.knowledge import letter_of, mmmu_example
from dora_mm.data.vl.readers.refcoco import with_box
from dora_mm.data.vl.readers.vqa_answers import NUM_ANSWERS, soft_scores
from dora_mm.data.vl.rows import RowError

EMPTY = ("", "nan")  # what a cell without a text has in tables that pandas wrote
PARTS = {0: HUMAN, 1: AUGMENTED, "human_test": HUMAN, "augmented_test": AUGMENTED}  # of ChartQA, as repositories say it


@dataclass(frozen=True)
class HubColumns:
    """The columns of a repository.

    Attributes:
        repository: Its name on the hub.
        make: Makes the examples of a row, without ids.
        question: The column of the question; "": rows have none.
        answers: The columns of answers, of which the first that a file has counts.
        image: The column of the image, or of a list of images; "": images are files that `named` names.
        named: The name of the image's file, by columns.
        ids: The columns of ids, of which the first that a row has counts; else it is the number of the row.
        within: A column in front of the id, where ids are unique in each of its values alone.
        kinds: The columns of the categories.
        group: The column that rows share that are not independent, with what it is; ("", ""): none.
        others: Further columns that rows must have.
        is_answered: Whether rows must have answers: False where only a test split is published.
    """

    repository: str
    make: Callable[["HubColumns", JsonRow], Iterable[Example]]
    question: str = "question"
    answers: tuple[str, ...] = ("answers",)
    image: str = "image"
    named: str = ""
    ids: tuple[str, ...] = ()
    within: str = ""
    kinds: tuple[str, ...] = ()
    group: tuple[str, str] = ("", "")
    others: tuple[str, ...] = ()
    is_answered: bool = True

    def id_of(self, row: JsonRow, number: int) -> Any:
        """The id of a row as its file has it, or its number."""
        given = next((row[name] for name in self.ids if row.get(name) is not None), number)
        return f"{row[self.within]}_{given}" if self.within and row.get(self.within) else given

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns by which it is found, for messages."""
        found = (self.question, *(self.answers[:1] if self.is_answered else ()), *self.others, self.image)
        return tuple(filter(None, (*found, *self.ids[:1])))

    def fits(self, row: JsonRow) -> bool:
        """Whether a row has its columns."""
        needed = {*filter(None, (self.question, self.image, *self.others))}
        return needed <= row.keys() and (not self.is_answered or any(name in row for name in self.answers))


# --- rows ------------------------------------------------------------------------------------------------------------


def _words(layout: HubColumns, row: JsonRow) -> Iterator[Example]:
    """A question with accepted answers that count the same."""
    known = _answers(layout, row)
    yield _example(layout, row, known, (1.0,) * len(known))


def _people(layout: HubColumns, row: JsonRow) -> Iterator[Example]:
    """A question with the answers of ten people."""
    given = _answers(layout, row)
    if given and len(given) != NUM_ANSWERS:
        raise RowError("must have exactly ten answers")
    known = soft_scores(given)
    yield replace(_example(layout, row, tuple(known), tuple(known.values())), raw_answers=given)


def _direct(layout: HubColumns, row: JsonRow) -> Iterator[Example]:
    """A question of A-OKVQA that is answered directly, which difficult ones are not; answers are a list in a text."""
    if row.get("difficult_direct_answer") is True:
        return
    given = row.get("direct_answers")
    yield from _people(layout, {**row, "direct_answers": listed(given) if isinstance(given, str) and given else given})


def _chart(layout: HubColumns, row: JsonRow) -> Iterator[Example]:
    """A question about a chart, with the part of the data set that it is of."""
    for example in _words(layout, row):
        part = row.get(layout.kinds[0])
        yield replace(example, kinds=() if part is None else (PARTS.get(part, str(part)),))


def _of_types(layout: HubColumns, row: JsonRow) -> Iterator[Example]:
    """A question of GQA, with its structural and semantic types."""
    types = row.get("types") or {}
    for example in _words(layout, row):
        yield replace(example, kinds=_kinds(layout, types))


def _numbered(layout: HubColumns, row: JsonRow) -> Iterator[Example]:
    """A question with a list of options, of which the answer is one by its number."""
    options, given = [*_texts(row, layout.others[0])], _first(row, layout.answers)
    answer = letter_of(None if given is None else _option_number(given), options)
    images, hint = _images(layout, row), _text(row, "hint") if row.get("hint") else ""
    yield choice("", _text(row, layout.question), options, answer, images=images, hint=hint, kinds=_kinds(layout, row))


def _option_number(value: Any) -> int:
    if not (value.isdecimal() if isinstance(value, str) else isinstance(value, int | float) and value == value // 1):
        raise RowError("has an answer that is not the number of an option")
    return int(value)


def _lesson(layout: HubColumns, row: JsonRow) -> Iterator[Example]:
    """A question of ScienceQA, with what it has beside its text in place of its second category."""
    for example in _numbered(layout, row):
        context = "image" if example.images else "text" if row.get("hint") else "none"
        yield replace(example, kinds=(str(row.get("subject") or ""), context, str(row.get("grade") or "")))


def _lettered(layout: HubColumns, row: JsonRow) -> Iterator[Example]:
    """A question with options in columns, of which the answer is one by its letter."""
    names = {name: letter for letter, name in zip(ascii_uppercase, layout.others, strict=False)}
    cells = {names.get(key, key): str(value) for key, value in row.items() if value is not None and key != layout.image}
    cells = {key: "" if value.strip() in EMPTY else value for key, value in cells.items()}
    if cells.get("answer", "") not in (*ascii_uppercase, ""):  # of a test split
        cells["answer"] = ""
    made = choice_cells({**cells, "index": "-", "question": _text(row, layout.question)})
    yield interleaved(replace(made, images=_images(layout, row), kinds=_kinds(layout, row)[:1]))


def _boxes(layout: HubColumns, row: JsonRow) -> Iterator[Example]:
    """Each description of a box (x, y, width, height) in pixels."""
    box, content = row.get("bbox"), (row.get(layout.image) or {}).get("bytes")
    if not isinstance(box, list) or len(box) != 4 or not isinstance(content, bytes):
        raise RowError("has no image with a bbox of four numbers")
    (image,) = _images(layout, row)
    width, height = size = _size(content)
    inside = (box[0], box[1], min(box[0] + box[2], width), min(box[1] + box[3], height))
    for text in _answers(layout, row):
        yield with_box("", image, text, inside, size)


def _captions(layout: HubColumns, row: JsonRow) -> Iterator[Example]:
    """An image with its captions."""
    yield Example("", _images(layout, row), "", known := _answers(layout, row), (1.0,) * len(known))


def _discipline(layout: HubColumns, row: JsonRow) -> Iterator[Example]:
    """A question of MMMU or MMMU-Pro."""
    yield mmmu_example(row)


def _example(layout: HubColumns, row: JsonRow, answers: tuple[str, ...], scores: tuple[float, ...]) -> Example:
    name, what = layout.group
    group = f"{what} {row[name]}" if name and row.get(name) is not None else ""
    text, images = _text(row, layout.question), _images(layout, row)
    return Example("", images, text, answers, scores, kinds=_kinds(layout, row), group=group)


# --- values ----------------------------------------------------------------------------------------------------------


def _first(row: JsonRow, columns: tuple[str, ...]) -> Any:
    return next((row[name] for name in columns if name in row), None)


def _text(row: JsonRow, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{column} is missing, or not a text")
    return value


def _texts(row: JsonRow, column: str) -> Iterator[str]:
    value = row.get(column)
    for member in value if isinstance(value, list) else [value]:
        if not isinstance(member, str):
            raise RowError(f"{column} is not a list of texts")
        yield member


def _answers(layout: HubColumns, row: JsonRow) -> tuple[str, ...]:
    """The answers of a row: a text, a list of texts, or a list of objects with an `answer`; blank ones are none."""
    given = _first(row, layout.answers)
    members = given if isinstance(given, list) else [] if given is None else [given]
    found = [member.get("answer") if isinstance(member, dict) else member for member in members]
    texts = tuple(text for text in found if isinstance(text, str))
    if len(texts) < len(found):
        raise RowError("has answers that are not texts")
    return texts if any(text.strip() for text in texts) else ()  # ten empty ones are of a test split


def _kinds(layout: HubColumns, row: JsonRow) -> tuple[str, ...]:
    values = [row.get(name) for name in layout.kinds]
    members = [member for value in values for member in (value if isinstance(value, list) else [value])]
    return tuple(str(member) for member in members if member not in (None, ""))


def _images(layout: HubColumns, row: JsonRow) -> tuple[str, ...]:
    if layout.named:
        return (layout.named.format_map(row),)
    value = row.get(layout.image)
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(map(image_of, values))


def _size(content: bytes) -> tuple[int, int]:
    with open_image(io.BytesIO(content)) as image:
        return image.size


# --- repositories ----------------------------------------------------------------------------------------------------

OPTIONS = ("A", "B")
LAYOUTS: dict[str, tuple[HubColumns, ...]] = {
    "docvqa": (  # configs DocVQA and InfographicVQA
        HubColumns(
            "lmms-lab/DocVQA",
            _words,
            ids=("questionId", "question_id"),
            kinds=("question_types", "answer_type"),
            group=("docId", "document"),
        ),
    ),
    "stvqa": (HubColumns("lmms-lab/ST-VQA", _words, ids=("question_id",), kinds=("dataset",), is_answered=False),),
    "textvqa": (HubColumns("lmms-lab/textvqa", _people, ids=("question_id",)),),
    "ocrbench": (
        HubColumns(
            "echo840/OCRBench",
            _words,
            answers=("answer",),
            kinds=("question_type", "dataset"),
            others=("question_type",),
        ),
    ),
    "chartqa": (
        HubColumns("lmms-lab/ChartQA", _chart, answers=("answer",), kinds=("type",)),
        HubColumns("HuggingFaceM4/ChartQA", _chart, "query", answers=("label",), kinds=("human_or_machine",)),
    ),
    "vqa_v2": (  # lmms-lab/OK-VQA and VizWiz-VQA, too, whose answers are texts
        HubColumns("lmms-lab/VQAv2", _people, ids=("question_id",), kinds=("answer_type", "question_type")),
    ),
    "gqa": (
        HubColumns(
            "lmms-lab/GQA",
            _of_types,
            answers=("answer",),
            image="",
            named="{imageId}.jpg",
            ids=("id",),
            kinds=("structural", "semantic"),
            others=("imageId",),
        ),
    ),
    "scienceqa": (HubColumns("lmms-lab/ScienceQA", _lesson, answers=("answer",), others=("choices",)),),
    "ai2d": (HubColumns("lmms-lab/ai2d", _numbered, answers=("answer",), others=("options",)),),
    "aokvqa": (
        HubColumns(
            "HuggingFaceM4/A-OKVQA",
            _numbered,
            answers=("correct_choice_idx",),
            ids=("question_id",),
            others=("choices",),
        ),
    ),
    "aokvqa_direct": (HubColumns("HuggingFaceM4/A-OKVQA", _direct, answers=("direct_answers",), ids=("question_id",)),),
    "mmmu": (
        HubColumns("MMMU/MMMU", _discipline, question="", answers=("answer",), image="", others=("id", "options")),
    ),
    "pope": (
        HubColumns(
            "lmms-lab/POPE", _words, answers=("answer",), ids=("question_id",), within="category", kinds=("category",)
        ),
    ),
    "choices": (
        HubColumns(
            "lmms-lab/MMBench", _lettered, answers=("answer",), ids=("index",), kinds=("category",), others=OPTIONS
        ),
        HubColumns(
            "lmms-lab/SEED-Bench",
            _lettered,
            answers=("answer",),
            ids=("question_id",),
            kinds=("data_type",),
            others=("choice_a", "choice_b", "choice_c", "choice_d"),
        ),
    ),
    "answers": (
        HubColumns(
            "flaviagiammarino/vqa-rad", _words, answers=("answers", "answer"), ids=("index", "question_id", "id")
        ),
    ),
    "refcoco": (  # RefCOCOplus and RefCOCOg, too
        HubColumns("lmms-lab/RefCOCO", _boxes, answers=("answer",), ids=("question_id",), others=("bbox",)),
    ),
    "captions": (
        HubColumns("lmms-lab/TextCaps", _captions, "", answers=("caption_str", "reference_strs"), ids=("image_id",)),
        HubColumns("lmms-lab/NoCaps", _captions, "", answers=("annotations_captions",), ids=("image_id",)),
        HubColumns("lmms-lab/COCO-Caption", _captions, "", answers=("answer",), ids=("question_id",)),
        HubColumns("lmms-lab/flickr30k", _captions, "", answers=("caption",), ids=("img_id",), others=("img_id",)),
    ),
}
