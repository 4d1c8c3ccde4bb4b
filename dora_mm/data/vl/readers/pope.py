"""POPE: questions of yes and no about objects, in its own JSON lines."""

from collections.abc import Iterator
from typing import NotRequired

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from dora_mm.config.schema import Text
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.readers.file_rows import file_items
from dora_mm.data.vl.rows import BadRows, Id, good_rows

PARTS = ("random", "popular", "adversarial")  # how absent objects were chosen, by the names of the files


class _Row(TypedDict):
    question_id: Id
    image: Text
    text: Text
    label: NotRequired[Text]


ROW = TypeAdapter(_Row)


def read_pope(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every question of `coco_pope_{random,popular,adversarial}.json`.

    Raises:
        ValueError: The file is damaged, or a row is bad and `bad` is set to "stop".
    """
    path = source.path
    part = next((name for name in PARTS if name in path.name), "")

    def example(row: _Row) -> Example:
        answers = (row["label"],) if "label" in row else ()
        kinds = (part,) if part else ()
        return Example(
            str(row["question_id"]), (row["image"],), row["text"], answers, (1.0,) * len(answers), kinds=kinds
        )

    return good_rows(path, file_items(path), ROW, example, bad)
