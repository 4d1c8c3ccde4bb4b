"""The tasks of samples/vl as sections of a config."""

from pathlib import Path

ROOT = Path(__file__).parents[3]
SAMPLES = ROOT / "samples" / "vl"


def vqa(split: str, limit: int) -> dict:
    return {
        "format": "vqa_v2",
        "file": str(SAMPLES / f"vqa/v2_OpenEnded_mscoco_{split}2014_questions.json"),
        "annotations": str(SAMPLES / f"vqa/v2_mscoco_{split}2014_annotations.json.gz"),
        "images": str(SAMPLES / "images"),
        "limit": limit,
    }


def captions(split: str, limit: int) -> dict:
    file = str(SAMPLES / f"captions/captions_{split}2014.json")
    return {"format": "coco_captions", "file": file, "images": str(SAMPLES / "images"), "limit": limit}
