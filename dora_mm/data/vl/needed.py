"""Which files a run would read, and where those that are missing are published."""

from pathlib import Path

from dora_mm.config.loader import find_path
from dora_mm.config.vl import VisionConfig, VLDataConfig

PUBLISHED = {  # by data format
    "vqa_v2": "visualqa.org",
    "vqa_karpathy": "the data of VL-T5 (github.com/j-min/VL-T5)",
    "easy_vqa": "the package easy-vqa",
    "gqa": "GQA's download page (cs.stanford.edu/people/dorarad/gqa)",
    "gqa_vlt5": "the data of VL-T5 (github.com/j-min/VL-T5)",
    "nlvr2": "github.com/lil-lab/nlvr",
    "nlvr2_vlt5": "the data of VL-T5 (github.com/j-min/VL-T5)",
    "coco_captions": "cocodataset.org",
    "coco_karpathy": "Karpathy's splits (cs.stanford.edu/people/karpathy/deepimagesent)",
    "video_qa": "the VALUE benchmark (github.com/VALUE-Leaderboard/DataRelease)",
    "video_captions": "the VALUE benchmark (github.com/VALUE-Leaderboard/DataRelease)",
}


def data_needed(data: VLDataConfig, vision: VisionConfig, model: str) -> str:
    """Every file and folder that the config names, whether it is there, and where the data set is published."""
    rows = [
        (
            f"{task.task} {split} {key}",
            path,
            "is there" if find_path(path) else f"put there: {PUBLISHED[source.format]}",
        )
        for task in data.tasks
        for split, source in (("train", task.train), ("valid", task.valid))
        if source is not None
        for key in ("file", "annotations", "subtitles", "images")
        if (path := getattr(source, key)) is not None
    ]
    rows += [
        ("features", path, "is there" if find_path(path) else "put there: dora-mm features, or .h5 and .npz of others")
        for path in vision.features
    ]
    rows.append(("model", model, "a folder, or fetched from the hub"))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(["data", *(f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)])


def found_features(vision: VisionConfig) -> list[Path]:
    """Those of `vision.features` that are there."""
    return [path for name in vision.features if (path := find_path(name)) is not None]
