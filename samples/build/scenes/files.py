"""Data sets of scenes in the official layouts of VQA v2, GQA, NLVR2 and the COCO captions.

    images/COCO_train2014_000000000001.jpg    of VQA and captions, numbered from FIRST_IDS[split] on
    vqa/v2_OpenEnded_mscoco_train2014_questions.json, vqa/v2_mscoco_train2014_annotations.json.gz
    captions/captions_train2014.json
    preferences/preferences_train2014.jsonl   of each image its own caption and that of the next one, in TRL's layout
    gqa/train_balanced_questions.json, gqa/images/<imageId>.jpg
    captions/captions_pretrain2014.json       of additional images that have no questions
    nlvr2/train.json, nlvr2/images/train-0-0-img0.png

The images of a smaller set are the first images of a larger one, so the validation scenes of one are never training
scenes of another.
"""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from dora_mm.utils.atomic import write_atomically, write_text
from samples.build.scenes.gqa import gqa_entries, gqa_questions
from samples.build.scenes.pictures import Artist
from samples.build.scenes.questions import vqa_annotations, vqa_questions
from samples.build.scenes.scenes import Scene, make_scene
from samples.build.scenes.sentences import captions, pair_sets
from samples.build.scenes.things import Thing

SEED = 0
JPEG_QUALITY = 75
PNG_COLORS = 96  # NLVR2 uses PNG: with a palette an image takes 12 kB, without 40
FIRST_IDS = {"train": 1, "val": 500_001, "testdev": 700_001, "dev": 500_001, "test1": 700_001, "pretrain": 800_001}
INFO = {"description": "Generated scenes of icons; answers and captions follow from how they were composed."}
DESCRIBE = "Describe the image in one sentence."
LICENSE = {"id": 1, "name": "see SOURCES.md", "url": "https://creativecommons.org/licenses/by/4.0/"}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a data set.

    Attributes:
        vqa: Split -> number of images and of questions.
        gqa: Split -> number of images and of questions.
        nlvr2: Split -> number of sets, each of four pairs of images with four sentences.
        pretrain: Number of additional images that only have captions.
    """

    vqa: dict[str, tuple[int, int]]
    gqa: dict[str, tuple[int, int]]
    nlvr2: dict[str, int]
    pretrain: int = 0


def write_sets(folder: Path, things: Sequence[Thing], artist: Artist, sizes: Sizes) -> None:
    """Writes the files of the layout above, and deletes other files in its image folders.

    Args:
        folder: The folder of the data set.
        things: All objects.
        artist: Draws the scenes.
        sizes: The sizes of the data set.
    """
    images: dict[str, list[tuple[str, Scene]]] = {"images": [], "gqa/images": [], "nlvr2/images": []}
    for split, (num_images, num_questions) in sizes.vqa.items():
        for name, content in vqa_files(things, split, num_images, num_questions).items():
            write_json(folder / name, content)
        scenes = scenes_of(things, "vqa", split, num_images)
        rows = preference_rows(captions_file(split, scenes))
        write_text(folder / f"preferences/preferences_{split}2014.jsonl", "".join(dump(row) + "\n" for row in rows))
        images["images"] += [(coco_name(split, scene), scene) for scene in scenes]
    if sizes.pretrain:
        scenes = scenes_of(things, "captions", "pretrain", sizes.pretrain)
        write_json(folder / "captions/captions_pretrain2014.json", captions_file("pretrain", scenes))
        images["images"] += [(coco_name("pretrain", scene), scene) for scene in scenes]
    for split, (num_images, num_questions) in sizes.gqa.items():
        entries = gqa_file(things, split, num_images, num_questions)
        write_json(folder / f"gqa/{split}_balanced_questions.json", entries)
        scenes = scenes_of(things, "gqa", split, num_images)
        images["gqa/images"] += [(f"{gqa_id(split, scene)}.jpg", scene) for scene in scenes]
    for split, num_sets in sizes.nlvr2.items():
        rows, pair_images = nlvr2_file(things, split, num_sets)
        write_text(folder / f"nlvr2/{split}.json", "".join(dump(row) + "\n" for row in rows))
        images["nlvr2/images"] += pair_images
    for name, scenes in images.items():
        draw_all(folder / name, scenes, artist)


def dump(content: Any) -> str:
    """Compact JSON."""
    return json.dumps(content, separators=(",", ":"))


def write_json(path: Path, content: Any) -> None:
    """Writes compact JSON, compressed where the name ends in .gz: ten answers of a question repeat each other."""
    data = dump(content).encode()
    compressed = gzip.compress(data, mtime=0) if path.suffix == ".gz" else data
    write_atomically(path, lambda partial: partial.write_bytes(compressed))


def draw_all(folder: Path, scenes: Sequence[tuple[str, Scene]], artist: Artist) -> None:
    """Draws scenes into a folder, each under its name, and deletes all other files there."""
    for name, scene in tqdm(scenes, desc=f"{folder.parent.name}/{folder.name}", disable=None):
        image = artist.draw(scene)
        write_atomically(folder / name, lambda path, name=name, image=image: save(image, path, name))
    names = {name for name, _ in scenes}
    for stale in [path for path in folder.iterdir() if path.name not in names]:
        stale.unlink()


def save(image: Image.Image, path: Path, name: str) -> None:
    if name.endswith(".png"):
        image.quantize(PNG_COLORS, dither=Image.Dither.NONE).save(path, "png", optimize=True)
    else:
        image.save(path, "jpeg", quality=JPEG_QUALITY, optimize=True)


def scenes_of(things: Sequence[Thing], task: str, split: str, number: int) -> list[Scene]:
    """The scenes of a data set whose images are not paired; see `nlvr2_file` for NLVR2.

    Args:
        things: All objects.
        task: "vqa" (which has captions as well), "captions" or "gqa".
        split: The split.
        number: How many scenes.
    """
    return [make_scene(things, SEED, f"{task}/{split}", index) for index in range(number)]


def coco_id(split: str, scene: Scene) -> int:
    return FIRST_IDS[split] + scene.index


def coco_name(split: str, scene: Scene) -> str:
    return f"COCO_{split}2014_{coco_id(split, scene):012d}.jpg"


def vqa_files(things: Sequence[Thing], split: str, num_images: int, num_questions: int) -> dict[str, Any]:
    """VQA v2's questions and annotations and COCO's captions of a split: file name -> content."""
    scenes = scenes_of(things, "vqa", split, num_images)
    chosen = vqa_questions(things, scenes, num_questions, SEED)
    annotations = list(vqa_annotations(chosen, [coco_id(split, question.scene) for question in chosen], SEED))
    questions = [{key: row[key] for key in ("image_id", "question", "question_id")} for row in annotations]
    rows = [{key: value for key, value in row.items() if key != "question"} for row in annotations]
    head = {"info": INFO, "license": LICENSE, "data_type": "mscoco", "data_subtype": f"{split}2014"}
    return {
        f"vqa/v2_OpenEnded_mscoco_{split}2014_questions.json": {
            **head,
            "task_type": "Open-Ended",
            "questions": questions,
        },
        f"vqa/v2_mscoco_{split}2014_annotations.json.gz": {**head, "annotations": rows},
        f"captions/captions_{split}2014.json": captions_file(split, scenes),
    }


def captions_file(split: str, scenes: Sequence[Scene]) -> dict[str, Any]:
    """The content of a file of COCO captions."""
    images = [{"id": coco_id(split, scene), "file_name": coco_name(split, scene), "license": 1} for scene in scenes]
    rows = [
        {"image_id": coco_id(split, scene), "id": coco_id(split, scene) * 10 + number, "caption": caption}
        for scene in scenes
        for number, caption in enumerate(captions(scene, SEED))
    ]
    return {"info": INFO, "licenses": [LICENSE], "images": images, "annotations": rows}


def preference_rows(captions: dict[str, Any]) -> list[dict[str, Any]]:
    """Pairs of captions: of each image its first one, which is right, and the first one of the next image.

    Each caption is chosen once and rejected once, so that texts alone say nothing about which of a pair is right.

    Args:
        captions: The content of a file of COCO captions.
    """
    first = {row["image_id"]: row["caption"] for row in reversed(captions["annotations"])}
    names, said = [image["file_name"] for image in captions["images"]], [first[i["id"]] for i in captions["images"]]
    return [
        {"prompt": DESCRIBE, "chosen": right, "rejected": wrong, "images": [name]}
        for name, right, wrong in zip(names, said, [*said[1:], said[0]], strict=True)
    ]


def gqa_id(split: str, scene: Scene) -> str:
    return str(2_000_000 + FIRST_IDS[split] + scene.index)


def gqa_file(things: Sequence[Thing], split: str, num_images: int, num_questions: int) -> dict[str, Any]:
    """The content of GQA's file of questions of a split."""
    scenes = scenes_of(things, "gqa", split, num_images)
    chosen = gqa_questions(things, scenes, num_questions, SEED)
    return gqa_entries(chosen, [gqa_id(split, question.scene) for question in chosen], 10 * FIRST_IDS[split])


def nlvr2_file(
    things: Sequence[Thing], split: str, num_sets: int
) -> tuple[list[dict[str, str]], list[tuple[str, Scene]]]:
    """The rows of NLVR2's file of a split, and the file name and scene of every image."""
    rows, scenes = [], []
    for number, made in enumerate(pair_sets(things, SEED, f"nlvr2/{split}", num_sets)):
        for pair, both in enumerate(made.pairs):
            scenes += [(f"{split}-{number}-{pair}-img{side}.png", scene) for side, scene in enumerate(both)]
        for sentence, (text, labels) in enumerate(made.sentences):
            for pair, label in enumerate(labels):
                identifier = f"{split}-{number}-{pair}-{sentence}"
                rows.append({"identifier": identifier, "sentence": text, "label": str(label)})
    return rows, scenes
