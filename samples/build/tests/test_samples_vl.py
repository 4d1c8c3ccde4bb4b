"""samples/vl: the committed files are those that the generator makes, and readers of the official formats read them."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.json_items import open_data
from dora_mm.data.vl.readers import read_source
from dora_mm.data.vl.rows import BadRows
from dora_mm.eval.vl.question_only import mean_accuracy, question_only_answers
from samples.build.packages import SAMPLES
from samples.build.scenes.build import CLIPS, SETS
from samples.build.scenes.clips import clip_rows, make_clip, subtitles
from samples.build.scenes.colors import PAINTS, PALE, color_shares
from samples.build.scenes.files import SEED, coco_name, gqa_file, nlvr2_file, preference_rows, scenes_of, vqa_files
from samples.build.scenes.scenes import SIZE
from samples.build.scenes.sentences import pair_sets
from samples.build.scenes.things import read_things

VL = SAMPLES / "vl"
SIZES = SETS[VL]


@pytest.fixture(scope="module")
def things():
    return read_things(VL / "things.jsonl")


def read(kind: str, file: str, **paths):
    source = SourceConfig(format=kind, file=str(VL / file), **{key: str(VL / name) for key, name in paths.items()})
    return list(read_source(source, BadRows("stop")))


def vqa(split: str):
    return read(
        "vqa_v2",
        f"vqa/v2_OpenEnded_mscoco_{split}2014_questions.json",
        annotations=f"vqa/v2_mscoco_{split}2014_annotations.json.gz",
        images="images",
    )


def guessed_accuracy(train, valid) -> float:
    """The accuracy without images, in per cent."""
    return mean_accuracy(list(zip(valid, question_only_answers(train, valid), strict=True)))


def test_it_is_small_has_no_pickles_and_names_its_sources():
    files = [path for path in VL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 9e6
    assert sum(path.stat().st_size for path in (VL / "video").rglob("*") if path.is_file()) < 3e5
    assert {path.suffix for path in files} == {".json", ".gz", ".jsonl", ".jpg", ".png", ".npz", ".md"}
    sources = (VL / "SOURCES.md").read_text()
    assert all(words in sources for words in ("CC-BY-4.0", "Apache-2.0", "MIT", "CC0", "random projection"))


def test_the_generator_reproduces_every_file_of_questions(things):
    for split, (num_images, num_questions) in SIZES.vqa.items():
        for name, content in vqa_files(things, split, num_images, num_questions).items():
            with open_data(VL / name) as file:
                assert json.load(file) == content, name
        lines = (VL / f"preferences/preferences_{split}2014.jsonl").read_text().splitlines()
        pairs = [json.loads(line) for line in lines]
        assert pairs == preference_rows(json.loads((VL / f"captions/captions_{split}2014.json").read_text()))
        assert Counter(pair["chosen"] for pair in pairs) == Counter(pair["rejected"] for pair in pairs)
        assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
    for split, (num_images, num_questions) in SIZES.gqa.items():
        stored = json.loads((VL / f"gqa/{split}_balanced_questions.json").read_text())
        assert stored == gqa_file(things, split, num_images, num_questions)
    for split, num_sets in SIZES.nlvr2.items():
        stored = [json.loads(line) for line in (VL / f"nlvr2/{split}.json").read_text().splitlines()]
        assert stored == nlvr2_file(things, split, num_sets)[0]


def test_the_generator_reproduces_the_clips(things):
    clips = [(split, make_clip(things, SEED, split, index)) for split, count in CLIPS.items() for index in range(count)]
    made = {"subtitles": [subtitles(clip) for _, clip in clips]}
    for number, (split, clip) in enumerate(clips):
        for task, rows in clip_rows(things, clip, number).items():
            made.setdefault(f"{task}_{split}", []).extend(rows)
        with np.load(VL / "video/features" / f"{clip.name}.npz") as stored:
            assert stored["features"].shape == (clip.duration / 1.5, 512)
    for name, rows in made.items():
        assert [json.loads(line) for line in (VL / f"video/{name}.jsonl").read_text().splitlines()] == rows


def test_the_readers_of_the_official_formats_read_it_and_no_image_is_missing():
    rows = {f"vqa {split}": (vqa(split), "images") for split in SIZES.vqa}
    for split in SIZES.gqa:
        rows[f"gqa {split}"] = (read("gqa", f"gqa/{split}_balanced_questions.json", images="gqa/images"), "gqa/images")
    for split in SIZES.nlvr2:
        rows[f"nlvr2 {split}"] = (read("nlvr2", f"nlvr2/{split}.json", images="nlvr2/images"), "nlvr2/images")
    for split in SIZES.vqa:
        captions = read("coco_captions", f"captions/captions_{split}2014.json", images="images")
        assert {len(example.answers) for example in captions} == {5}
        rows[f"captions {split}"] = (captions, "images")
    for name, (examples, folder) in rows.items():
        assert examples, name
        assert all((VL / folder / image).is_file() for example in examples for image in example.images), name
    counts = {name: len(examples) for name, (examples, _) in rows.items()}
    assert counts["vqa train"] >= 3600
    assert counts["vqa val"] >= 720
    assert (counts["captions train"], counts["captions val"]) == (500, 120)


def test_the_answer_cannot_be_guessed_from_the_question():
    assert 25 < guessed_accuracy(vqa("train"), vqa("val")) < 45
    train, valid = (read("gqa", f"gqa/{split}_balanced_questions.json") for split in ("train", "val"))
    assert guessed_accuracy(train, valid) < 45
    for split in SIZES.nlvr2:
        labels = [example.answers for example in read("nlvr2", f"nlvr2/{split}.json")]
        assert labels.count(("true",)) == labels.count(("false",))


def test_training_and_validation_share_no_scene(things):
    seen = [scenes_of(things, "vqa", split, number) for split, (number, _) in SIZES.vqa.items()]
    images = [{scene.objects for scene in scenes} for scenes in seen]
    assert not images[0] & images[1]
    assert [len(objects) for objects in images] == [number for number, _ in SIZES.vqa.values()]
    sets = [{made.pairs for made in pair_sets(things, SEED, f"nlvr2/{split}", 2)} for split in SIZES.nlvr2]
    assert not set.intersection(*sets)


def test_images_show_the_colours_of_their_scenes(things):
    """A background by its pixels, a painted object by the share of its colour among the pixels around its centre."""
    checked = 0
    for scene in scenes_of(things, "vqa", "val", SIZES.vqa["val"][0]):
        with Image.open(VL / "images" / coco_name("val", scene)) as file:
            assert (file.size, file.mode, file.format) == ((SIZE, SIZE), "RGB", "JPEG")
            image = file.copy()
        if scene.background.color:
            pixels = np.asarray(image, dtype=int)
            similar = np.abs(pixels - PALE[scene.background.color]).max(axis=-1) < 8
            assert similar.mean() > 0.2, scene.index
        for placed in scene.objects:
            if placed.painted and placed.color in PAINTS:
                reach = placed.size // 2
                around = image.crop((placed.x - reach, placed.y - reach, placed.x + reach, placed.y + reach))
                assert color_shares(around).get(placed.color, 0) > 0.05, (scene.index, placed.name, placed.color)
                checked += 1
    assert checked > 150
