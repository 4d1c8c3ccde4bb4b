"""GQA: compositional questions with one answer each, in the official files and in VL-T5's."""

from collections.abc import Iterator
from typing import NotRequired

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from dora_mm.config.schema import Text
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.json_items import list_items, object_items
from dora_mm.data.vl.readers.vqa import positive_scores, with_suffix
from dora_mm.data.vl.rows import BadRows, Id, Score, good_rows


class _Types(TypedDict):
    structural: str
    semantic: str


class _Question(TypedDict):
    imageId: Text
    question: Text
    answer: NotRequired[Text]
    types: NotRequired[_Types]


class _Official(TypedDict):
    id: str
    value: _Question


class _VLT5(TypedDict):
    question_id: Id
    img_id: Text
    sent: Text
    label: NotRequired[dict[Text, Score]]


OFFICIAL, VLT5 = TypeAdapter(_Official), TypeAdapter(_VLT5)


def read_gqa(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every question of `{split}_balanced_questions.json`, an object keyed by question id.

    Raises:
        ValueError: The file is damaged, or a question is bad and `bad` is set to "stop".
    """
    path = source.path

    def example(item: _Official) -> Example:
        row = item["value"]
        answers = (row["answer"],) if "answer" in row else ()
        kinds = (row["types"]["structural"], row["types"]["semantic"]) if "types" in row else ()
        return Example(
            item["id"], (f"{row['imageId']}.jpg",), row["question"], answers, (1.0,) * len(answers), kinds=kinds
        )

    return good_rows(path, object_items(path), OFFICIAL, example, bad)


def read_gqa_vlt5(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every question of VL-T5's `{train,valid,testdev}.json`, a list.

    Raises:
        ValueError: The file is damaged, or a question is bad and `bad` is set to "stop".
    """
    path = source.path

    def example(row: _VLT5) -> Example:
        label = positive_scores(row.get("label", {}))
        image = with_suffix(row["img_id"])
        return Example(str(row["question_id"]), (image,), row["sent"], tuple(label), tuple(label.values()))

    return good_rows(path, list_items(path), VLT5, example, bad)
