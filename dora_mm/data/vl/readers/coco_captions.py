"""COCO captions, in the official files and in Karpathy's single file of all splits; one Example per image."""

from collections.abc import Iterator
from typing import Literal, NamedTuple, NotRequired

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from dora_mm.config.schema import Text
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import Example, stem
from dora_mm.data.vl.json_items import Item, list_items
from dora_mm.data.vl.rows import BadRows, Id, Line, RowError, good_rows

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
    """Reads every image of `captions_{split}.json` with its captions, in the order of `images`.

    All captions are held in memory (40 MB for COCO), since the file has them in any order.

    Raises:
        ValueError: The file is damaged; or `bad` is set to "stop" and an image or caption is bad, a caption belongs to
            no image, or an image has no caption.
    """
    path = source.path
    images = [*good_rows(path, list_items(path, "images"), IMAGE, _without_captions, bad)]
    captions: dict[str, list[str]] = {image.id: [] for image in images}

    def known(row: _Caption) -> Caption:
        if str(row["image_id"]) not in captions:
            raise RowError("is a caption of an image_id that no usable image has")
        return Caption(row["id"], row["image_id"], row["caption"])

    for caption in good_rows(path, list_items(path, "annotations"), CAPTION, known, bad):
        captions[str(caption.image_id)].append(caption.text)
    for image in images:
        if captions[image.id]:
            yield _captioned(image.id, image.images[0], captions[image.id])
        else:
            bad.add(f"{path}, image id {image.id}", "has no usable caption")


def _without_captions(row: _Image) -> Example:
    return Example(str(row["id"]), (row["file_name"],), "")


def read_coco_karpathy(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every image of one split of `dataset_coco.json` with its captions; "train" includes COCO's restval.

    Raises:
        ValueError: The file has no such split; the file is damaged; or an image is bad or has no caption and `bad` is
            set to "stop".
    """
    path = source.path
    if source.split not in SPLITS:
        raise ValueError(
            f"{path} has the splits train (restval included), val and test: split {source.split!r} does not exist"
        )

    def selected() -> Iterator[Item]:
        for where, row in list_items(path, "images"):
            split = row.get("split") if isinstance(row, dict) else None
            if split in SPLITS[source.split or ""] or split not in (*SPLITS, "restval"):  # report unknown splits
                yield where, row

    def example(row: _Karpathy) -> Example:
        if not row["sentences"]:
            raise RowError("has no caption")
        name = str(row.get("cocoid", stem(row["filename"])))
        return _captioned(name, row["filename"], [sentence["raw"] for sentence in row["sentences"]])

    return good_rows(path, selected(), KARPATHY, example, bad)


def _captioned(name: str, image: str, captions: list[str]) -> Example:
    return Example(name, (image,), "", tuple(captions), (1.0,) * len(captions))
