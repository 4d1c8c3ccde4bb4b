"""AI2D as it was published: a JSON file of questions for each diagram, and letters to be drawn over its texts."""

import io
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from PIL import ImageDraw, ImageFont
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from dora_mm.config.schema import Text
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.images.pixels import load_rgb
from dora_mm.data.vl.embedded import data_url
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.json_items import Item
from dora_mm.data.vl.readers.choices import choice
from dora_mm.data.vl.readers.hub_files import files_of_source
from dora_mm.data.vl.readers.knowledge import letter_of
from dora_mm.data.vl.rows import BadRows, Index, RowError, checked, good_rows
from dora_mm.utils.folders import inside
from dora_mm.utils.json_text import read_bounded, read_json

LARGEST = 100  # pixels of a letter
Corner = Annotated[list[float], Field(min_length=2, max_length=2)]


class _Question(TypedDict):
    abcLabel: bool
    answerTexts: list[str]
    correctAnswer: Index
    questionId: Text


class _Row(TypedDict):
    question_id: Text
    question: Text
    image: Text
    folder: Text
    about: _Question


class _Label(TypedDict):
    rectangle: Annotated[list[Corner], Field(min_length=2, max_length=2)]
    replacementText: Text


class _Labels(TypedDict):
    text: dict[str, _Label]


ROW, LABELS = TypeAdapter(_Row), TypeAdapter(_Labels)


def read_ai2d_questions(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every question of AI2D's folder `questions`, beside which there are `images` and `annotations`.

    Where options are letters (`abcLabel`), these are drawn into the diagram in place of its texts. With `annotations`,
    the published list of the test split's diagrams, `split` is train or test.

    Raises:
        ValueError: A file is damaged, `split` is none of these or has no list, or a row is bad and `bad` is set to
            "stop".
    """
    tested = _tested(source)

    def example(row: _Row) -> Example:
        about, folder, name = row["about"], Path(row["folder"]), row["image"]
        file = folder / "images" / name
        image = _with_letters(folder, name) if about["abcLabel"] else str(file)
        return choice(
            row["question_id"],
            row["question"],
            about["answerTexts"],
            letter_of(about["correctAnswer"], about["answerTexts"]),
            images=(image,),
            kinds=("letters in the diagram" if about["abcLabel"] else "texts",),
            group=f"diagram {name}",
        )

    def items() -> Iterator[Item]:
        for path in files_of_source(source):
            if tested is None or (path.name.partition(".")[0] in tested) == (source.split == "test"):
                yield from _questions(path)

    return good_rows(source.path, items(), ROW, example, bad)


def _tested(source: SourceConfig) -> set[str] | None:
    """The numbers of the diagrams of the test split; None: all questions are read."""
    if source.split is None:
        return None
    if source.split not in ("train", "test") or source.annotations is None:
        raise ValueError(f"{source.path}: split is train or test, with annotations: ai2d_test_ids.csv")
    return set(read_bounded(Path(source.annotations)).decode("utf-8", "replace").split())


def _questions(path: Path) -> Iterator[Item]:
    """The questions of a file, each with the folder of the data set and the diagram's file."""
    found = read_json(path)
    questions = found.get("questions")
    if not isinstance(questions, dict):
        raise ValueError(f"{path}: has no `questions` of a diagram")
    folder, image = str(path.parent.parent.absolute()), found.get("imageName")
    for number, (question, about) in enumerate(questions.items(), 1):
        key = about.get("questionId") if isinstance(about, dict) else None
        rest = {"question_id": key, "question": question, "image": image, "folder": folder, "about": about}
        yield f"{path.name}, question {number}", rest


@lru_cache(1)  # questions of one diagram follow each other
def _with_letters(folder: Path, name: str) -> str:
    """A diagram whose texts are covered by their letters, in black on white, each as large as its box, as a data URL.

    Args:
        folder: The folder of the data set.
        name: The diagram's file.

    Raises:
        RowError: One of the files is missing, outside of the folder, or not what it should be.
    """
    try:
        image, annotations = inside(folder / "images", name), inside(folder / "annotations", f"{name}.json")
        labels, lettered = checked(LABELS, read_json(annotations)), load_rgb(image, "white")
    except ValueError as error:
        raise RowError("has letters in its diagram, whose image or annotations cannot be read") from error
    brush = ImageDraw.Draw(lettered)
    for label in labels["text"].values():
        (left, top), (right, bottom) = label["rectangle"]
        if right > left and bottom > top:
            brush.rectangle((left, top, right, bottom), fill="white")
            middle = ((left + right) / 2, (top + bottom) / 2)
            font = _font(label["replacementText"], right - left, bottom - top)
            brush.text(middle, label["replacementText"], fill="black", anchor="mm", font=font)
    file = io.BytesIO()
    lettered.save(file, "PNG")
    return data_url(file.getvalue())


def _font(text: str, width: float, height: float) -> Any:
    """The largest font in which a text has room."""
    for size in range(min(LARGEST, int(2 * height)), 1, -1):
        font = ImageFont.load_default(size)
        left, top, right, bottom = font.getbbox(text)
        if right - left <= width and bottom - top <= height:
            return font
    return ImageFont.load_default(1)
