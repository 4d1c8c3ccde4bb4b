"""Which reader reads which form of data files."""

from collections.abc import Callable, Iterator

from dora_mm.config import resolve_path
from dora_mm.config.vl import SourceConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.readers.coco_captions import read_coco_captions, read_coco_karpathy
from dora_mm.data.vl.readers.gqa import read_gqa, read_gqa_vlt5
from dora_mm.data.vl.readers.nlvr2 import read_nlvr2, read_nlvr2_vlt5
from dora_mm.data.vl.readers.video import read_video_captions, read_video_qa
from dora_mm.data.vl.readers.vqa import read_easy_vqa, read_vqa_karpathy, read_vqa_v2
from dora_mm.data.vl.rows import BadRows

__all__ = ["READERS", "resolved"]

READERS: dict[str, Callable[[SourceConfig, BadRows], Iterator[Example]]] = {
    "vqa_v2": read_vqa_v2,
    "vqa_karpathy": read_vqa_karpathy,
    "easy_vqa": read_easy_vqa,
    "gqa": read_gqa,
    "gqa_vlt5": read_gqa_vlt5,
    "nlvr2": read_nlvr2,
    "nlvr2_vlt5": read_nlvr2_vlt5,
    "coco_captions": read_coco_captions,
    "coco_karpathy": read_coco_karpathy,
    "video_qa": read_video_qa,
    "video_captions": read_video_captions,
}
FILES = ("file", "annotations", "subtitles")  # keys of a source whose content its rows are made from


def resolved(source: SourceConfig) -> SourceConfig:
    """The source with the paths at which its files and its folder of pictures are. Raises ValueError if one is not."""
    given = {key: getattr(source, key) for key in (*FILES, "images")}
    return source.model_copy(update={key: str(resolve_path(path)) for key, path in given.items() if path is not None})
