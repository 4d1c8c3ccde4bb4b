"""The formats of vision-language data files, each with the function that reads it. docs/vl.md lists all."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from dora_mm.registries.registry import Registry

Key = Literal["annotations", "subtitles", "split", "columns"]  # of a source, which only some formats have


@dataclass(frozen=True)
class Reader:
    """One format.

    Attributes:
        read: The place of its function `read(source, bad)`, see dora_mm/data/vl/readers.
        published: Where its files are published; "" where they are a user's own.
        keys: Which of the keys that not all formats have it reads.
        needs: Those of them that must be given, each with the reason.
        images: Where rows have images: "named" as files of a folder; "own", inside them or by absolute paths, or named;
            "none": rows are texts.
        several: Whether `file` may also be a folder, a pattern of files or a list.
        version: Changes when the function makes other rows of the same files: tables on disk are made anew.
    """

    read: str
    published: str = ""
    keys: tuple[Key, ...] = ()
    needs: Mapping[Key, str] = field(default_factory=dict)
    images: Literal["named", "own", "none"] = "named"
    several: bool = False
    version: str = ""


HERE = "dora_mm.data.vl.readers"
VL_T5 = "the data of VL-T5 (github.com/j-min/VL-T5)"
VALUE = "the VALUE benchmark (github.com/VALUE-Leaderboard/DataRelease)"
KARPATHY = "Karpathy's splits (cs.stanford.edu/people/karpathy/deepimagesent)"
RECORDS = {
    "vqa_v2": Reader(f"{HERE}.vqa:read_vqa_v2", "visualqa.org", keys=("annotations",)),
    "vqa_karpathy": Reader(f"{HERE}.vqa:read_vqa_karpathy", VL_T5, keys=("annotations",)),
    "easy_vqa": Reader(f"{HERE}.vqa:read_easy_vqa", "the package easy-vqa"),
    "gqa": Reader(f"{HERE}.gqa:read_gqa", "GQA's download page (cs.stanford.edu/people/dorarad/gqa)"),
    "gqa_vlt5": Reader(f"{HERE}.gqa:read_gqa_vlt5", VL_T5),
    "nlvr2": Reader(f"{HERE}.nlvr2:read_nlvr2", "github.com/lil-lab/nlvr"),
    "nlvr2_vlt5": Reader(f"{HERE}.nlvr2:read_nlvr2_vlt5", VL_T5),
    "coco_captions": Reader(f"{HERE}.coco_captions:read_coco_captions", "cocodataset.org"),
    "coco_karpathy": Reader(
        f"{HERE}.coco_captions:read_coco_karpathy",
        KARPATHY,
        keys=("split",),
        needs={"split": "a coco_karpathy file contains all splits"},
    ),
    "video_qa": Reader(f"{HERE}.video:read_video_qa", VALUE, keys=("subtitles",)),
    "video_captions": Reader(f"{HERE}.video:read_video_captions", VALUE, keys=("subtitles",)),
    "chat": Reader(f"{HERE}.chat:read_chat", keys=("columns", "split"), images="own", several=True),
    "preferences": Reader(
        f"{HERE}.preferences:read_preferences", keys=("columns", "split"), images="own", several=True
    ),
    "captions": Reader(f"{HERE}.chat:read_captions", keys=("columns", "split"), images="own", several=True),
    "choices": Reader(
        f"{HERE}.choices:read_choices",
        "VLMEvalKit (github.com/open-compass/VLMEvalKit)",
        keys=("split",),
        images="own",
    ),
    "commonsense": Reader(
        f"{HERE}.commonsense:read_commonsense",
        "the data of LLM-Adapters (github.com/AGI-Edgerunners/LLM-Adapters)",
        images="none",
    ),
}
READERS = Registry("readers", "format of data files", RECORDS)
