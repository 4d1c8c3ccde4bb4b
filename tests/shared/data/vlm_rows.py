"""Small images, and conversations and questions about them."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.shared.data.vl_files import vqa_annotation, vqa_question, write_json

SHAPES = {"wide.png": (40, 60), "tall.png": (70, 50), "square.png": (56, 56)}  # height, width


def save_noise(path: Path, seed: int, height: int, width: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def write_images(folder: Path) -> Path:
    """The images of SHAPES, and four with the names of COCO's validation images."""
    for seed, (name, shape) in enumerate(SHAPES.items()):
        save_noise(folder / name, seed, *shape)
    for number in range(42, 46):
        save_noise(folder / f"COCO_val2014_{number:012d}.jpg", number, 48, 64)
    return folder


def write_conversations(folder: Path, images: Path) -> dict[str, Any]:
    """The `data` section of conversations in LLaVA's shape: with no, one and two images, and of two turns."""
    rows = [
        ({"image": "wide.png"}, [("<image>\nWhat is it?", "noise"), ("Which colour has it?", "all of them")]),
        ({"image": ["tall.png", "square.png"]}, [("<image>\n<image>\nAre these the same?", "no")]),
        ({}, [("What is one and one?", "two")]),
        ({"image": "square.png"}, [("<image>\nWhat colour is it?", "grey")]),
    ]
    said = [
        {"id": str(number), **image, "conversations": [m for asked, told in turns for m in _messages(asked, told)]}
        for number, (image, turns) in enumerate(rows)
    ]
    source = {"format": "chat", "file": str(write_json(folder / "chat.json", said)), "images": str(images)}
    return {"train": source, "valid": {**source, "limit": 2}}


def _messages(asked: str, told: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": told}]


def write_questions(folder: Path, images: Path) -> dict[str, Any]:
    """The `data` section of four questions in VQA v2's files."""
    colours = ("red", "green", "blue", "grey")
    questions = [vqa_question(number, question="What colour is it?") for number in range(4)]
    annotations = [vqa_annotation(number, [colours[number]] * 10) for number in range(4)]
    about = {"data_type": "mscoco", "data_subtype": "val2014"}
    name = "v2_OpenEnded_mscoco_val2014_questions.json"
    source = {
        "format": "vqa_v2",
        "file": str(write_json(folder / name, {**about, "questions": questions})),
        "annotations": str(write_json(folder / "v2_annotations.json", {"annotations": annotations})),
        "images": str(images),
    }
    return {"task": "vqa", "train": source, "valid": {**source, "limit": 2}}
