"""COCO captions: the official files, and Karpathy's one file with all splits. One Example a picture."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import TypeAdapter
from typing_extensions import NotRequired, TypedDict

from dora_mm.config.vl import SourceConfig
from dora_mm.data.vl.example import Example, stem
from dora_mm.data.vl.json_items import Item, list_items
from dora_mm.data.vl.rows import BadRows, Id, Line, RowError, Text, good_rows

__all__ = ["read_coco_captions", "read_coco_karpathy"]

SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}


class _Image(TypedDict):
    id: Id
    file_name: Text


class _Caption(TypedDict):
    id: Id
    image_id: Id
    caption: Line


class _Sentence(TypedDict):
    raw: Line


class _Karpathy(TypedDict):
    filename: Text
    split: Literal["train", "restval", "val", "test"]
    sentences: list[_Sentence]
    cocoid: NotRequired[Id]


class Caption(NamedTuple):
    id: Id
    image_id: Id
    text: str


IMAGE, CAPTION, KARPATHY = TypeAdapter(_Image), TypeAdapter(_Caption), TypeAdapter(_Karpathy)


def read_coco_captions(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Every picture of `captions_{split}.json` with its captions, in the order of `images`.

    The captions (40 MB of COCO's) are held, since they stand there in any order.

    Raises:
        ValueError: the file is damaged; or a picture or a caption is bad, a caption is of no picture or a picture has
            no caption, and `bad` stops at it.
    """
    path = Path(source.file)
    images = [*good_rows(path, list_items(path, "images"), IMAGE, _picture, bad)]
    captions: dict[str, list[str]] = {image.id: [] for image in images}

    def known(row: _Caption) -> Caption:
        if str(row["image_id"]) not in captions:
            raise RowError("is a caption of an image_id that no usable picture has")
        return Caption(row["id"], row["image_id"], row["caption"])

    for caption in good_rows(path, list_items(path, "annotations"), CAPTION, known, bad):
        captions[str(caption.image_id)].append(caption.text)
    for image in images:
        if captions[image.id]:
            yield _captioned(image.id, image.images[0], captions[image.id])
        else:
            bad.add(f"{path}, image id {image.id}", "has no usable caption")


def _picture(row: _Image) -> Example:
    return Example(str(row["id"]), (row["file_name"],), "")


def read_coco_karpathy(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Every picture of one split of `dataset_coco.json` with its captions; "train" has COCO's restval as well.

    Raises:
        ValueError: no such split; the file is damaged; or a picture is bad or has no captions and `bad` stops at it.
    """
    path = Path(source.file)
    if source.split not in SPLITS:
        raise ValueError(f"{path} has the splits train (restval included), val and test: {source.split} is none")

    def chosen() -> Iterator[Item]:
        for where, row in list_items(path, "images"):
            split = row.get("split") if isinstance(row, dict) else None
            if split in SPLITS[source.split or ""] or split not in (*SPLITS, "restval"):  # an odd one must be seen
                yield where, row

    def example(row: _Karpathy) -> Example:
        if not row["sentences"]:
            raise RowError("has no caption")
        name = str(row.get("cocoid", stem(row["filename"])))
        return _captioned(name, row["filename"], [sentence["raw"] for sentence in row["sentences"]])

    return good_rows(path, chosen(), KARPATHY, example, bad)


def _captioned(name: str, image: str, captions: list[str]) -> Example:
    return Example(name, (image,), "", tuple(captions), (1.0,) * len(captions))
