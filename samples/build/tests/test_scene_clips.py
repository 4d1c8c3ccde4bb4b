"""Clips made of scenes, with their questions, subtitles and descriptions."""

import json
from itertools import pairwise

import numpy as np

from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.readers.video import read_video_captions, read_video_qa
from dora_mm.data.vl.rows import BadRows
from samples.build.scenes.clips import clip_rows, frame_features, frames, make_clip, subtitles, write_clips
from samples.build.scenes.pictures import Artist
from samples.build.tests.scene_things import OTHERS, plain_photos, shape_icons, some_things

THINGS = some_things(*OTHERS)


def test_a_clip_is_a_function_of_its_index_and_no_object_is_in_two_shots():
    for index in range(10):
        clip = make_clip(THINGS, 0, "train", index)
        assert clip == make_clip(THINGS, 0, "train", index)
        named = [name for shot in clip.shots for name in {placed.name for placed in shot.scene.objects}]
        assert len(named) == len(set(named))
        assert len(list(frames(clip))) * 1.5 == clip.duration
        for shot in clip.shots:
            assert [p.name for p in shot.scene.objects].count(shot.star.name) == 1
            assert f"{shot.star.color} {shot.star.name}" in shot.line


def test_answers_are_those_of_the_shot_in_the_span():
    for index in range(10):
        clip = make_clip(THINGS, 0, "train", index)
        rows = clip_rows(THINGS, clip, index)
        for task, num_choices in (("tvqa", 5), ("how2qa", 4)):
            for row in rows[task]:
                choices = [row[f"a{number}"] for number in range(num_choices)]
                assert f"a{num_choices}" not in row
                assert len(set(choices)) == num_choices
                start, end = map(float, row["ts"].split("-"))
                shots = [s for k, s in enumerate(clip.shots) if start <= clip.span(k)[0] and clip.span(k)[1] <= end]
                answer = choices[row["answer_idx"]]
                assert shots[-1].star.color == answer or answer.endswith(f" {shots[-1].star.name}")
        lines = subtitles(clip)["sub"]
        assert [line["text"] for line in lines] == [shot.line for shot in clip.shots]
        assert all(one["end"] < other["start"] for one, other in pairwise(lines))
        assert lines[-1]["end"] < clip.duration


def test_features_are_reproducible_and_differ_between_frames():
    artist = Artist(shape_icons(), plain_photos())
    images = [artist.draw(scene) for scene in frames(make_clip(THINGS, 0, "train", 0))]
    features = frame_features(images)
    assert (features.shape, features.dtype) == ((len(images), 512), np.float16)
    assert np.array_equal(features[3:5], frame_features(images[3:5]))
    assert np.isfinite(features).all()
    assert np.abs(features[0].astype(float) - features[-1]).max() > 0.1


def test_the_files_are_read_by_the_readers_of_value(tmp_path):
    write_clips(tmp_path, THINGS, Artist(shape_icons(), plain_photos()), {"train": 2, "val": 1}, seed=0)
    first = {path.name: path.read_bytes() for path in tmp_path.rglob("*.*")}
    write_clips(tmp_path, THINGS, Artist(shape_icons(), plain_photos()), {"train": 2, "val": 1}, seed=0)
    assert first == {path.name: path.read_bytes() for path in tmp_path.rglob("*.*")}
    subtitles_file = str(tmp_path / "subtitles.jsonl")
    assert len([json.loads(line) for line in (tmp_path / "subtitles.jsonl").read_text().splitlines()]) == 3
    for task in ("tvqa", "how2qa"):
        source = SourceConfig(format="video_qa", file=str(tmp_path / f"{task}_train.jsonl"), subtitles=subtitles_file)
        examples = list(read_video_qa(source, BadRows("stop")))
        assert len(examples) > 10
        assert {image for example in examples for image in example.images} == {"clips_train_000", "clips_train_001"}
    for task in ("tvc", "yc2c"):
        source = SourceConfig(
            format="video_captions", file=str(tmp_path / f"{task}_val.jsonl"), subtitles=subtitles_file
        )
        examples = list(read_video_captions(source, BadRows("stop")))
        assert {len(example.answers) for example in examples} == {4 if task == "tvc" else 1}
    with np.load(tmp_path / "features" / "clips_val_000.npz") as stored:
        assert stored["features"].shape[1] == 512
