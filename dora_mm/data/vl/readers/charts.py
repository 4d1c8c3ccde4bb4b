"""Questions about charts: ChartQA and PlotQA, in their own files."""

from collections.abc import Iterator
from typing import NotRequired

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from dora_mm.config.schema import Text
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.json_items import list_items, numbered
from dora_mm.data.vl.rows import BadRows, Id, Index, good_rows

PARTS = HUMAN, AUGMENTED = ("human", "augmented")  # of ChartQA, by the names of its files


class _Chart(TypedDict):
    number: Index
    imgname: Text
    query: Text
    label: NotRequired[Text]


class _Plot(TypedDict):
    question_id: Id
    image_index: Index
    question_string: Text
    answer: NotRequired[str | float]
    template: NotRequired[Text]


CHART, PLOT = TypeAdapter(_Chart), TypeAdapter(_Plot)


def read_chartqa(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every question of ChartQA's `{split}_human.json` or `{split}_augmented.json`.

    Its rows have no ids; the number of a row, from 0, behind the name of its part is the id.

    Raises:
        ValueError: The file is damaged, or a row is bad and `bad` is set to "stop".
    """
    path = source.path
    part = next((name for name in PARTS if name in path.name), "")

    def example(row: _Chart) -> Example:
        answers = (row["label"],) if "label" in row else ()
        key = f"{part}_{row['number']}" if part else str(row["number"])
        kinds = (part,) if part else ()
        return Example(key, (row["imgname"],), row["query"], answers, (1.0,) * len(answers), kinds=kinds)

    return good_rows(path, numbered(list_items(path), "number"), CHART, example, bad)


def read_plotqa(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every question of PlotQA's `qa_pairs_V1.json` or `qa_pairs_V2.json`.

    Raises:
        ValueError: The file is damaged, or a row is bad and `bad` is set to "stop".
    """
    path = source.path

    def example(row: _Plot) -> Example:
        answers = (str(row["answer"]),) if "answer" in row else ()
        kinds = (row["template"],) if "template" in row else ()
        image, scores = f"{row['image_index']}.png", (1.0,) * len(answers)
        return Example(str(row["question_id"]), (image,), row["question_string"], answers, scores, kinds=kinds)

    return good_rows(path, list_items(path, "qa_pairs"), PLOT, example, bad)
