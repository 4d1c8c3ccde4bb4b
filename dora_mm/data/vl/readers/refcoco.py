"""RefCOCO: the boxes of things that are described, in the official files, and in those that Qwen-VL is scored with."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from dora_mm.config.schema import Text
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.json_items import Item, json_lines, list_items, location
from dora_mm.data.vl.rows import BadRows, Index, RowError, checked, good_rows
from dora_mm.utils.pickles import read_data_pickle

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


class _Image(TypedDict):
    id: Index
    file_name: Text
    width: Pixels
    height: Pixels


class _Annotation(TypedDict):
    id: Index
    bbox: Annotated[list[float], Field(min_length=4, max_length=4)]


class _Sentence(TypedDict):
    sent_id: Index
    sent: Text


class _Description(TypedDict):
    ann_id: Index
    image_id: Index
    sentence: _Sentence


LINE, ROW = TypeAdapter(_Row), TypeAdapter(_Numbered)
IMAGE, ANNOTATION, DESCRIPTION = TypeAdapter(_Image), TypeAdapter(_Annotation), TypeAdapter(_Description)
RowT = TypeVar("RowT", _Image, _Annotation)


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
        return with_box(str(item["number"]), row["image"], row["sent"], row["bbox"], (row["width"], row["height"]))

    rows = ((where, {"number": number, "line": line}) for number, (where, line) in enumerate(json_lines(path)))
    return good_rows(path, rows, ROW, example, bad)


def with_box(name: str, image: str, text: str, box: Sequence[float], size: tuple[int, int]) -> Example:
    """An example of a box (x1, y1, x2, y2) in pixels."""
    x1, y1, x2, y2 = box
    if not (0 <= x1 < x2 <= size[0] and 0 <= y1 < y2 <= size[1]):
        raise RowError("has a bbox that is no box (x1, y1, x2, y2) inside of its image")
    shares = [f"{value / size[location % 2]:.3f}" for location, value in enumerate(box)]
    about = {"bbox": [[*box]], "ref": [], "norm1": False, "image": [0], "size": size}
    return Example(name, (image,), text, (f"[{', '.join(shares)}]",), (1.0,), boxes=json.dumps(about))


def read_refs(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every description of `refs({author}).p`, with the boxes and the sizes of images of `instances.json`.

    A box (x, y, width, height) ends with its image where it is a fraction of a pixel beyond.

    Raises:
        ValueError: A file is damaged or holds more than data, there is no such split, or a row is bad and `bad` is set
            to "stop".
    """
    path, instances = source.path, Path(source.annotations or "")
    descriptions = _descriptions(path, source.split)
    images, boxes = _by_id(instances, "images", IMAGE, bad), _by_id(instances, "annotations", ANNOTATION, bad)

    def example(row: _Description) -> Example:
        image, box = images.get(row["image_id"]), boxes.get(row["ann_id"])
        if image is None or box is None:
            raise RowError(f"has an image or a box that is not in {instances.name}")
        (x, y, width, height), size = box["bbox"], (image["width"], image["height"])
        inside = (x, y, min(x + width, size[0]), min(y + height, size[1]))
        sentence = row["sentence"]
        return with_box(str(sentence["sent_id"]), image["file_name"], sentence["sent"], inside, size)

    return good_rows(path, descriptions, DESCRIPTION, example, bad)


def _descriptions(path: Path, split: str | None) -> list[Item]:
    """The descriptions of a split, each with the numbers of its image and its box."""
    refs = read_data_pickle(path)
    if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
        raise ValueError(f"{path}: is no list of refs")
    splits = sorted({str(ref.get("split")) for ref in refs})
    if split is not None and split not in splits:
        raise ValueError(f"{path} has no rows of the split {split!r}: it has {', '.join(splits)}")
    found = []
    for number, ref in enumerate(refs, 1):
        sentences = ref.get("sentences")
        if split in (None, ref.get("split")):
            about = {key: value for key, value in ref.items() if key != "sentences"}
            found += [
                (f"item {number}", about | {"sentence": sentence})
                for sentence in (sentences if isinstance(sentences, list) else [sentences])
            ]
    return found


def _by_id(path: Path, member: str, schema: TypeAdapter[RowT], bad: BadRows) -> dict[int, RowT]:
    """The items of a member of `instances.json` by their ids."""
    found = {}
    for where, item in list_items(path, member):
        try:
            row = checked(schema, item)
            found[row["id"]] = row
        except RowError as error:
            bad.add(location(path, where, item), str(error))
    return found
