"""RefCOCO: the boxes of things that are described, in the JSON lines with which Qwen-VL is evaluated."""

import json
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from dora_mm.config.schema import Text
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.json_items import json_lines
from dora_mm.data.vl.rows import BadRows, RowError, checked, good_rows

Pixels = Annotated[int, Field(gt=0)]


class _Row(TypedDict):
    image: Text
    sent: Text
    bbox: Annotated[list[float], Field(min_length=4, max_length=4)]
    width: Pixels
    height: Pixels


class _Numbered(TypedDict):
    number: int
    line: bytes


LINE, ROW = TypeAdapter(_Row), TypeAdapter(_Numbered)


def read_refcoco(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every description of `refcoco_{split}.jsonl`: image, sent, bbox (x1, y1, x2, y2 in pixels), width, height.

    Its rows have no ids; the number of a line, from 0, is used as the id. The answer is the box as shares of width and
    height, in square brackets.

    Raises:
        ValueError: The file is damaged, or a row is bad and `bad` is set to "stop".
    """
    path = source.path

    def example(item: _Numbered) -> Example:
        row = checked(LINE, item["line"])
        (x1, y1, x2, y2), size = row["bbox"], (row["width"], row["height"])
        if not (0 <= x1 < x2 <= size[0] and 0 <= y1 < y2 <= size[1]):
            raise RowError("has a bbox that is no box (x1, y1, x2, y2) inside of its image")
        shares = [f"{value / size[place % 2]:.3f}" for place, value in enumerate(row["bbox"])]
        about = {"bbox": [row["bbox"]], "ref": [], "norm1": False, "image": [0], "size": size}
        answer = f"[{', '.join(shares)}]"
        return Example(str(item["number"]), (row["image"],), row["sent"], (answer,), (1.0,), boxes=json.dumps(about))

    rows = ((where, {"number": number, "line": line}) for number, (where, line) in enumerate(json_lines(path)))
    return good_rows(path, rows, ROW, example, bad)
