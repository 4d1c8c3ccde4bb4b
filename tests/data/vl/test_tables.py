"""Tables: parsed once, opened quickly, read row by row from disk, with every skipped row reported."""

import json
import logging
import random
import re
from dataclasses import replace
from pathlib import Path

import easy_vqa
import numpy as np
import pyarrow as pa
import pytest

from dora_mm.config.vl import DecodeConfig
from dora_mm.config.vl_data import SourceConfig, VLDataConfig
from dora_mm.data.vl.image_folder import ImageFolder
from dora_mm.data.vl.readers import read_source
from dora_mm.data.vl.rows import BadRows
from dora_mm.data.vl.splits import open_training, open_validation
from dora_mm.data.vl.tables import BATCH_ROWS, open_table
from dora_mm.registries.readers import READERS
from tests.shared.data import chats, suite_files
from tests.shared.data import vl_files as files
from tests.shared.data.text_rows import question


def many(folder: Path, count: int) -> SourceConfig:
    rng = random.Random(0)
    words = ["yes", "no", "2", "a dog", "red"]
    annotations = [files.vqa_annotation(number, rng.choices(words, k=10)) for number in range(count)]
    return files.vqa_v2(folder, [files.vqa_question(number) for number in range(count)], annotations)


def with_image_files(source: SourceConfig, folder: Path, names: list[str]) -> SourceConfig:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return source.model_copy(update={"images": str(folder)})


def test_a_table_contains_the_examples_of_the_reader(tmp_path):
    source = many(tmp_path, 2 * BATCH_ROWS + 7)
    table = open_table(source, tmp_path / "tables", on_bad_data="stop")
    rows = list(read_source(source, BadRows("stop")))
    assert list(table) == rows
    assert table[-1] == rows[-1]
    assert list(table[BATCH_ROWS - 2 : BATCH_ROWS + 2]) == rows[BATCH_ROWS - 2 : BATCH_ROWS + 2]
    assert list(table.select([2000, 3, 3])) == [rows[2000], rows[3], rows[3]]
    assert list(table.select([5, 6, 7]).select([2])) == [rows[7]]
    assert table.images() == sorted({row.images[0] for row in rows})
    assert table.select([4, 5]).images() == ["COCO_val2014_000000000044.jpg"]
    assert table.skipped == {}
    with pytest.raises(IndexError):
        table[len(rows)]


def clips_with_descriptions(folder: Path, counts: list[int]) -> SourceConfig:
    """A clip with each of these numbers of descriptions; none: a row of a test split."""
    rows = [
        {"clip_id": clip, "vid_name": f"clip{clip}", "ts": "1-2"}
        | ({"descs": [{"desc": f"{clip}.{number}"} for number in range(count)]} if count else {})
        for clip, count in enumerate(counts)
    ]
    return SourceConfig(format="video_captions", file=str(files.write_lines(folder / "tvc_train.jsonl", rows)))


def test_a_table_has_a_row_for_each_answer_where_that_is_wanted(tmp_path):
    table = open_table(clips_with_descriptions(tmp_path, [2, 0, 1, 3]), tmp_path / "tables", on_bad_data="stop")
    split = table.per_answer()
    rows = [("0", "0.0"), ("0", "0.1"), ("2", "2.0"), ("3", "3.0"), ("3", "3.1"), ("3", "3.2")]
    assert [(row.id, *row.answers) for row in split] == rows
    assert [(row.id, *row.answers) for row in split.select([5, 1, 1])] == [rows[5], rows[1], rows[1]]
    assert [(row.id, *row.answers) for row in split[-2:]] == rows[-2:]
    assert {row.scores for row in split} == {(1.0,)}
    assert split.identity not in (table.identity, split.select([0, 0, 2, 3, 4, 5]).identity)
    assert len(table.select([1]).per_answer()) == 0
    assert list(split.answered()) == list(split)
    bad = np.array([row.id == "0" for row in split])
    skipping = replace(split, on_bad_data="skip").without(bad, "has no features")
    assert [(row.id, *row.answers) for row in skipping] == rows[2:]


class AllReadable:
    def check_rows(self, table):
        return table


@pytest.mark.parametrize(("task", "trained"), [("tvc", 6), ("yc2c", 6)])
def test_each_description_of_a_clip_is_trained_and_references_stay_together(tmp_path, task, trained):
    source = clips_with_descriptions(tmp_path, [2, 1, 3])
    data = VLDataConfig(task=task, train=source, valid=source, tables=str(tmp_path / "tables"))
    assert len(open_training(data, 4, AllReadable())[task].table) == trained
    valid = open_validation(data, DecodeConfig(), AllReadable())[task].table
    assert [len(row.answers) for row in valid] == [2, 1, 3]


def test_a_captioned_image_is_one_row(tmp_path):
    captions = files.write_json(tmp_path / "captions_train2014.json", files.CAPTIONS)
    source = SourceConfig(format="coco_captions", file=str(captions))
    data = VLDataConfig(task="caption", train=source, tables=str(tmp_path / "tables"))
    assert sorted(len(row.answers) for row in open_training(data, 4, AllReadable())["caption"].table) == [1, 2]


WITH_IMAGES = ("ai2d", "ai2d_questions", "mmmu")  # inside the rows


@pytest.mark.parametrize("form", sorted(set(READERS) - {"vqa_v2", *WITH_IMAGES}))
def test_every_format_is_read_back_from_disk(tmp_path, form):
    folder = Path(easy_vqa.__file__).parent / "data" / "test"
    rows = [{"img_id": "a", "question_id": number, "sent": "Who?", "label": {"he": 1}} for number in range(2)]
    pair = {"identifier": "a-1-0-0", "img0": "a", "img1": "b", "sent": "It is.", "label": 1}
    writers = {
        "vqa_karpathy": lambda: files.write_json(tmp_path / "file.json", rows),
        "easy_vqa": lambda: folder / "questions.json",
        "gqa": lambda: files.write_json(tmp_path / "file.json", files.GQA),
        "gqa_vlt5": lambda: files.write_json(tmp_path / "file.json", rows),
        "nlvr2": lambda: files.write_lines(tmp_path / "file.json", files.NLVR2),
        "nlvr2_vlt5": lambda: files.write_json(tmp_path / "file.json", [pair]),
        "coco_captions": lambda: files.write_json(tmp_path / "file.json", files.CAPTIONS),
        "coco_karpathy": lambda: files.write_json(tmp_path / "file.json", files.KARPATHY),
        "video_qa": lambda: files.write_lines(tmp_path / "file.json", files.TVQA),
        "video_captions": lambda: files.write_lines(tmp_path / "file.json", files.TVC),
        "chat": lambda: files.write_lines(tmp_path / "file.json", [{"conversations": chats.said("Q", "A")}]),
        "preferences": lambda: files.write_lines(
            tmp_path / "file.json", [{"prompt": "Q", "chosen": "A", "rejected": "B"}]
        ),
        "captions": lambda: files.write_lines(tmp_path / "file.json", [{"image": str(Path(__file__)), "text": "A"}]),
        "commonsense": lambda: files.write_json(tmp_path / "file.json", [question(0), question(1)]),
        "answers": lambda: files.write_text(tmp_path / "file.tsv", "index\tquestion\tanswer\n1\tQ\ta\n"),
        "choices": lambda: files.write_text(tmp_path / "file.tsv", "index\tquestion\tA\tB\n1\tQ\ta\tb\n"),
    }
    if form in writers:
        split = "train" if form == "coco_karpathy" else None
        source = SourceConfig(format=form, file=str(writers[form]()), split=split)
    else:
        source = suite_files.refs(tmp_path) if form == "refcoco_refs" else suite_files.source(form, tmp_path)
    table = open_table(source, tmp_path / "tables", on_bad_data="stop", absolute_paths=True)
    assert list(table) == list(read_source(source, BadRows("stop")))


def test_opening_a_table_again_does_not_read_the_source(tmp_path, monkeypatch):
    source = many(tmp_path, 5)
    rows = list(open_table(source, tmp_path / "tables", on_bad_data="stop"))
    monkeypatch.setattr("dora_mm.data.vl.tables.read_source", None)
    table = open_table(source, tmp_path / "tables", on_bad_data="skip")
    assert list(table) == rows
    assert table.path.parent == tmp_path / "tables"
    assert sorted(path.suffix for path in table.path.parent.iterdir()) == [".arrow", ".json"]


def test_different_content_gives_another_table(tmp_path):
    source = many(tmp_path, 5)
    first = open_table(source, tmp_path / "tables", on_bad_data="stop")
    second = open_table(source.model_copy(update={"limit": 3}), tmp_path / "tables", on_bad_data="stop")
    assert (len(first), len(second)) == (5, 3)
    assert list(second) == list(first[:3])
    rest = open_table(source.model_copy(update={"skip": 3}), tmp_path / "tables", on_bad_data="stop")
    assert list(rest) == list(first[3:])
    middle = source.model_copy(update={"skip": 1, "limit": 3})
    assert list(open_table(middle, tmp_path / "tables", on_bad_data="stop")) == list(first[1:4])
    with pytest.raises(ValueError, match=r"questions\.json .*after the first 5"):
        open_table(source.model_copy(update={"skip": 5}), tmp_path / "tables", on_bad_data="stop")
    source = many(tmp_path, 6)
    assert len(open_table(source, tmp_path / "tables", on_bad_data="stop")) == 6
    Path(source.annotations or "").write_text(json.dumps({"annotations": [files.vqa_annotation(0)]}))
    with pytest.raises(ValueError, match=r"annotation in .*annotations\.json"):
        open_table(source, tmp_path / "tables", on_bad_data="stop")


@pytest.mark.parametrize("damage", ["truncated", "nonsense", "no summary", "an edited word", "flipped bits"])
def test_a_damaged_table_is_written_again(tmp_path, caplog, damage):
    source = many(tmp_path, 2 * BATCH_ROWS)
    table = open_table(source, tmp_path / "tables", on_bad_data="stop")
    rows, content = list(table), table.path.read_bytes()
    if damage == "no summary":
        table.path.with_suffix(".json").unlink()
    else:
        table.path.unlink()  # not overwritten in place: `table` has it mapped
        broken = {
            "truncated": content[: len(content) // 2],
            "nonsense": b"nonsense" * 100,
            "an edited word": content.replace(rows[0].text.encode(), rows[0].text.swapcase().encode()),
            "flipped bits": content[:3000] + bytes(byte ^ 0x40 for byte in content[3000:3300]) + content[3300:],
        }[damage]
        assert broken != content
        table.path.write_bytes(broken)
    again = open_table(source, tmp_path / "tables", on_bad_data="stop")
    assert list(again) == rows
    assert f"{table.path} is damaged" in caplog.text


def test_a_table_is_written_completely_or_not_at_all(tmp_path):
    source = many(tmp_path, 5)
    Path(source.annotations or "").write_text('{"annotations": [' + json.dumps(files.vqa_annotation(0)) + ", {")
    with pytest.raises(ValueError, match=r"annotations\.json is truncated .* after item 1 \(question_id 42000\)"):
        open_table(source, tmp_path / "tables", on_bad_data="skip")
    assert list((tmp_path / "tables").iterdir()) == []


def test_every_opening_warns_of_skipped_rows(tmp_path, caplog):
    questions = [files.vqa_question(number) for number in range(9)]
    source = files.vqa_v2(tmp_path, questions, [files.vqa_annotation(number) for number in (2, 8)])
    for _ in range(2):
        caplog.clear()
        table = open_table(source, tmp_path / "tables", on_bad_data="skip")
        assert [row.id for row in table] == ["42002", "42008"]
        ((reason, places),) = table.skipped.items()
        assert reason == f"has no usable annotation in {source.annotations}"
        assert len(places) == 7
        (record,) = (record for record in caplog.records if record.levelno == logging.WARNING)
        assert f"7 x {reason}" in record.message
        assert record.message.count("question_id") == 5  # only the first few are named
    with pytest.raises(ValueError, match=r"item 1 \(question_id 42000\): .*annotation"):
        open_table(source, tmp_path / "tables", on_bad_data="stop")


def test_no_usable_row(tmp_path):
    source = files.vqa_v2(tmp_path, [files.vqa_question(0)], [files.vqa_annotation(1)])
    with pytest.raises(ValueError, match=r"questions\.json has no usable row"):
        open_table(source, tmp_path / "tables", on_bad_data="skip")


def test_image_files_are_checked_at_every_opening(tmp_path, caplog):
    source = with_image_files(many(tmp_path, 6), tmp_path / "images", ["COCO_val2014_000000000042.jpg"])
    with pytest.raises(ValueError, match=r"id 42002, image COCO_val2014_000000000043\.jpg: is not in .*images"):
        open_table(source, tmp_path / "tables", on_bad_data="stop")
    table = open_table(source, tmp_path / "tables", on_bad_data="skip")
    assert [row.id for row in table] == ["42000", "42001"]
    assert table.images() == ["COCO_val2014_000000000042.jpg"]
    assert "4 x is not in" in caplog.text
    names = ["COCO_val2014_000000000043.jpg", "val2014/COCO_val2014_000000000044.jpg"]
    with_image_files(source, tmp_path / "images", names)
    table = open_table(source, tmp_path / "tables", on_bad_data="stop")
    assert len(table) == 6
    assert table[5].images == ("val2014/COCO_val2014_000000000044.jpg",)
    assert table.images() == ["COCO_val2014_000000000042.jpg", *names]


def test_pairs_need_both_images(tmp_path):
    path = files.write_lines(tmp_path / "dev.json", files.NLVR2)
    names = ["40/train-850-0-img0.png", "40/train-850-0-img1.png", "dev-12-3-img0.png"]
    source = with_image_files(SourceConfig(format="nlvr2", file=str(path)), tmp_path / "images", names)
    table = open_table(source, tmp_path / "tables", on_bad_data="skip")
    assert [row.images for row in table] == [tuple(names[:2])]
    ((place,),) = table.skipped.values()
    assert place.endswith("id dev-12-3-1, image dev-12-3-img1.png")


def test_a_folder_with_none_of_the_images_is_refused(tmp_path):
    source = with_image_files(many(tmp_path, 6), tmp_path / "images", ["other.jpg"])
    with pytest.raises(ValueError, match="none of its 3 images is in .*images"):
        open_table(source, tmp_path / "tables", on_bad_data="skip")
    with pytest.raises(ValueError, match=r"questions\.json is not a folder"):
        open_table(source.model_copy(update={"images": source.file}), tmp_path / "tables", on_bad_data="skip")


def test_images_can_be_looked_up_in_any_source(tmp_path):
    """For example in feature files, which have them by stem."""
    table = open_table(many(tmp_path, 6), tmp_path / "tables", on_bad_data="skip")
    known = {"COCO_val2014_000000000043.jpg"}
    kept = table.with_images(lambda name: name if name in known else None, "features.h5")
    assert [row.id for row in kept] == ["42002", "42003"]
    assert [len(places) for places in kept.skipped.values()] == [4]
    assert table.skipped == {}
    assert len(table) == 6


def test_answered_selects_the_rows_with_an_answer(tmp_path):
    labels = [{"he": 1}, {}, {"she": 0}, {"it": 0.3}]
    rows = [{"img_id": "a", "question_id": n, "sent": "Who?", "label": label} for n, label in enumerate(labels)]
    source = SourceConfig(format="vqa_karpathy", file=str(files.write_json(tmp_path / "karpathy.json", rows)))
    table = open_table(source, tmp_path / "tables", on_bad_data="stop")
    assert [row.id for row in table.answered()] == ["0", "3"]
    assert [row.id for row in table.select([3, 1]).answered()] == ["3"]


def test_files_that_do_not_exist(tmp_path):
    source = SourceConfig(format="gqa", file=str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"none\.json does not exist"):
        open_table(source, tmp_path / "tables", on_bad_data="stop")
    with pytest.raises(ValueError, match=f"{tmp_path} is a folder without files"):
        open_table(source.model_copy(update={"file": str(tmp_path)}), tmp_path / "tables", on_bad_data="stop")


def test_the_file_is_a_standard_arrow_stream(tmp_path):
    table = open_table(many(tmp_path, 5), tmp_path / "tables", on_bad_data="stop")
    with pa.ipc.open_stream(table.path) as reader:
        assert reader.read_all().column("text").to_pylist() == [f"What is {number}?" for number in range(5)]


def test_datasets_can_open_the_file(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not a dependency")
    table = open_table(many(tmp_path, 5), tmp_path / "tables", on_bad_data="stop")
    assert datasets.Dataset.from_file(str(table.path))[3]["id"] == "42003"


def test_images_are_found_by_name_or_stem(tmp_path):
    for name in ("a.jpg", "x/a.jpg", "x/b.jpg", "y/b.jpg", "y/c.jpg", "clip_1.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    folder = ImageFolder(tmp_path)
    names = ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "clip_1")
    assert [folder.find(name) for name in names] == ["a.jpg", None, "y/c.jpg", None, "clip_1.mp4"]
    assert re.search(
        r"is in several folders in .* \([xy]/b.jpg, [xy]/b.jpg\): name it with its folder", folder.refusal("b.jpg")
    )


def test_images_are_found_by_path(tmp_path):
    for name in ("in/x/a.jpg", "in/y/a.jpg", "out/b.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    folder, outside = ImageFolder(tmp_path / "in"), str(tmp_path / "out/b.jpg")
    names = ("x/a.jpg", "./y//a.jpg", "z/a.jpg", "../out/b.jpg", "y", outside, f"{outside}x", "/no/b.jpg", "/\0/b")
    found = ["x/a.jpg", "y/a.jpg", None, None, None, None, None, None, None]
    assert [folder.find(name) for name in names] == found
    anywhere = ImageFolder(None, anywhere=True)
    assert [anywhere.find(name) for name in ("a.jpg", "x/a.jpg", outside)] == [None, None, outside]
    assert ImageFolder(None).find(outside) is None
