"""NLVR2 (is the sentence true of the two images?), in the official JSON lines and in VL-T5's lists."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NotRequired

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from dora_mm.config.schema import Text
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.json_items import json_lines, list_items
from dora_mm.data.vl.rows import BadRows, RowError, good_rows


class _Official(TypedDict):
    identifier: Text
    sentence: Text
    label: NotRequired[Literal["True", "False"]]


class _VLT5(TypedDict):
    identifier: Text
    img0: Text
    img1: Text
    sent: Text
    label: NotRequired[Literal[0, 1]]


OFFICIAL, VLT5 = TypeAdapter(_Official), TypeAdapter(_VLT5)


def read_nlvr2(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every line of `{train,dev,test1}.json`.

    The sentence "dev-850-0-1" is about the images `dev-850-0-img0.png` and `dev-850-0-img1.png`.

    Raises:
        ValueError: The file cannot be read, or a line is bad and `bad` is set to "stop".
    """
    path = source.path

    def example(row: _Official) -> Example:
        pair, _, sentence = row["identifier"].rpartition("-")
        if not pair or not sentence:
            raise RowError("has an identifier that does not name a pair of images (expected: such as dev-850-0-1)")
        images = (f"{pair}-img0.png", f"{pair}-img1.png")
        return _example(row["identifier"], images, row["sentence"], {"True": 1, "False": 0}.get(row.get("label", "")))

    return good_rows(path, json_lines(path), OFFICIAL, example, bad)


def read_nlvr2_vlt5(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every row of VL-T5's `{train,valid,test}.json`, a list.

    Raises:
        ValueError: The file is damaged, or a row is bad and `bad` is set to "stop".
    """
    path = source.path

    def example(row: _VLT5) -> Example:
        images = tuple(name if Path(name).suffix else f"{name}.png" for name in (row["img0"], row["img1"]))
        return _example(row["identifier"], images, row["sent"], row.get("label"))

    return good_rows(path, list_items(path), VLT5, example, bad)


def _example(identifier: str, images: tuple[str, ...], sentence: str, label: int | None) -> Example:
    if label is None:
        return Example(identifier, images, sentence)
    return Example(identifier, images, sentence, ("true" if label else "false",), (1.0,))
