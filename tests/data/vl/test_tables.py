"""Tables: read once, opened at once, looked up without being held, and honest about what they left out."""

import json
import logging
import random
from pathlib import Path

import easy_vqa
import pyarrow as pa
import pytest

from dora_mm.config.vl import SourceConfig
from dora_mm.data.vl.image_folder import Pictures
from dora_mm.data.vl.readers import READERS
from dora_mm.data.vl.rows import BadRows
from dora_mm.data.vl.tables import BATCH_ROWS, open_table
from tests.data.vl import files as files


def many(folder: Path, count: int) -> SourceConfig:
    rng = random.Random(0)
    words = ["yes", "no", "2", "a dog", "red"]
    annotations = [files.vqa_annotation(number, rng.choices(words, k=10)) for number in range(count)]
    return files.vqa_v2(folder, [files.vqa_question(number) for number in range(count)], annotations)


def with_pictures(source: SourceConfig, folder: Path, names: list[str]) -> SourceConfig:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return source.model_copy(update={"images": str(folder)})


def test_a_table_holds_what_the_reader_gives(tmp_path):
    source = many(tmp_path, 2 * BATCH_ROWS + 7)
    table = open_table(source, tmp_path / "tables", on_bad_data="stop")
    rows = list(READERS["vqa_v2"](source, BadRows("stop")))
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


@pytest.mark.parametrize("form", sorted(set(READERS) - {"vqa_v2"}))
def test_every_format_comes_back_from_the_disk(tmp_path, form):
    folder = Path(easy_vqa.__file__).parent / "data" / "test"
    rows = [{"img_id": "a", "question_id": number, "sent": "Who?", "label": {"he": 1}} for number in range(2)]
    pair = {"identifier": "a-1-0-0", "img0": "a", "img1": "b", "sent": "It is.", "label": 1}
    path = {
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
    }[form]()
    source = SourceConfig(format=form, file=str(path), split="train" if form == "coco_karpathy" else None)
    table = open_table(source, tmp_path / "tables", on_bad_data="stop")
    assert list(table) == list(READERS[form](source, BadRows("stop")))


def test_the_second_opening_reads_no_source(tmp_path, monkeypatch):
    source = many(tmp_path, 5)
    rows = list(open_table(source, tmp_path / "tables", on_bad_data="stop"))
    monkeypatch.setitem(READERS, "vqa_v2", None)
    table = open_table(source, tmp_path / "tables", on_bad_data="skip")
    assert list(table) == rows
    assert table.path.parent == tmp_path / "tables"
    assert sorted(path.suffix for path in table.path.parent.iterdir()) == [".arrow", ".json"]


def test_other_content_another_table(tmp_path):
    source = many(tmp_path, 5)
    first = open_table(source, tmp_path / "tables", on_bad_data="stop")
    second = open_table(source.model_copy(update={"limit": 3}), tmp_path / "tables", on_bad_data="stop")
    assert (len(first), len(second)) == (5, 3)
    assert list(second) == list(first[:3])
    rest = open_table(source.model_copy(update={"skip": 3}), tmp_path / "tables", on_bad_data="stop")
    assert list(rest) == list(first[3:])
    middle = source.model_copy(update={"skip": 1, "limit": 3})
    assert list(open_table(middle, tmp_path / "tables", on_bad_data="stop")) == list(first[1:4])
    with pytest.raises(ValueError, match="has no row that can be used after the first 5"):
        open_table(source.model_copy(update={"skip": 5}), tmp_path / "tables", on_bad_data="stop")
    source = many(tmp_path, 6)
    assert len(open_table(source, tmp_path / "tables", on_bad_data="stop")) == 6
    Path(source.annotations or "").write_text(json.dumps({"annotations": [files.vqa_annotation(0)]}))
    with pytest.raises(ValueError, match="has no usable annotation"):
        open_table(source, tmp_path / "tables", on_bad_data="stop")


@pytest.mark.parametrize("damage", ["cut", "nonsense", "no report"])
def test_a_damaged_table_is_made_again(tmp_path, caplog, damage):
    source = many(tmp_path, 2 * BATCH_ROWS)
    table = open_table(source, tmp_path / "tables", on_bad_data="stop")
    rows, content = list(table), table.path.read_bytes()
    if damage == "no report":
        table.path.with_suffix(".json").unlink()
    else:
        table.path.unlink()  # not written into: `table` has it mapped
        table.path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"nonsense" * 100)
    again = open_table(source, tmp_path / "tables", on_bad_data="stop")
    assert list(again) == rows
    assert "A damaged table is read anew" in caplog.text


def test_a_table_appears_whole_or_not_at_all(tmp_path):
    source = many(tmp_path, 5)
    Path(source.annotations or "").write_text('{"annotations": [' + json.dumps(files.vqa_annotation(0)) + ", {")
    with pytest.raises(
        ValueError, match=r"annotations\.json is cut off .*, after item 1 \(question_id 42000\), the last"
    ):
        open_table(source, tmp_path / "tables", on_bad_data="skip")
    assert list((tmp_path / "tables").iterdir()) == []


def test_rows_left_out_are_warned_of_whenever_the_table_is_opened(tmp_path, caplog):
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
        assert record.message.count("question_id") == 5  # the first few by name
    with pytest.raises(ValueError, match=r"item 1 \(question_id 42000\): has no usable annotation"):
        open_table(source, tmp_path / "tables", on_bad_data="stop")


def test_nothing_left(tmp_path):
    source = files.vqa_v2(tmp_path, [files.vqa_question(0)], [files.vqa_annotation(1)])
    with pytest.raises(ValueError, match=r"questions\.json has no row that can be used"):
        open_table(source, tmp_path / "tables", on_bad_data="skip")


def test_pictures_are_looked_for_at_every_opening(tmp_path, caplog):
    source = with_pictures(many(tmp_path, 6), tmp_path / "pictures", ["COCO_val2014_000000000042.jpg"])
    with pytest.raises(ValueError, match=r"id 42002, picture COCO_val2014_000000000043\.jpg: is not in .*pictures"):
        open_table(source, tmp_path / "tables", on_bad_data="stop")
    table = open_table(source, tmp_path / "tables", on_bad_data="skip")
    assert [row.id for row in table] == ["42000", "42001"]
    assert table.images() == ["COCO_val2014_000000000042.jpg"]
    assert "4 x is not in" in caplog.text
    names = ["COCO_val2014_000000000043.jpg", "val2014/COCO_val2014_000000000044.jpg"]
    with_pictures(source, tmp_path / "pictures", names)
    table = open_table(source, tmp_path / "tables", on_bad_data="stop")
    assert len(table) == 6
    assert table[5].images == ("val2014/COCO_val2014_000000000044.jpg",)
    assert table.images() == ["COCO_val2014_000000000042.jpg", *names]


def test_pairs_need_both_pictures(tmp_path):
    path = files.write_lines(tmp_path / "dev.json", files.NLVR2)
    names = ["40/train-850-0-img0.png", "40/train-850-0-img1.png", "dev-12-3-img0.png"]
    source = with_pictures(SourceConfig(format="nlvr2", file=str(path)), tmp_path / "pictures", names)
    table = open_table(source, tmp_path / "tables", on_bad_data="skip")
    assert [row.images for row in table] == [tuple(names[:2])]
    ((place,),) = table.skipped.values()
    assert place.endswith("id dev-12-3-1, picture dev-12-3-img1.png")


def test_a_folder_with_none_of_the_pictures_is_the_wrong_one(tmp_path):
    source = with_pictures(many(tmp_path, 6), tmp_path / "pictures", ["other.jpg"])
    with pytest.raises(ValueError, match="none of its 3 pictures is in .*pictures"):
        open_table(source, tmp_path / "tables", on_bad_data="skip")
    with pytest.raises(ValueError, match="is no folder of pictures"):
        open_table(source.model_copy(update={"images": source.file}), tmp_path / "tables", on_bad_data="skip")


def test_any_source_of_pictures_can_be_asked(tmp_path):
    """Feature files know pictures by their stems."""
    table = open_table(many(tmp_path, 6), tmp_path / "tables", on_bad_data="skip")
    known = {"COCO_val2014_000000000043.jpg"}
    kept = table.with_pictures(lambda name: name if name in known else None, "features.h5")
    assert [row.id for row in kept] == ["42002", "42003"]
    assert [len(places) for places in kept.skipped.values()] == [4]
    assert table.skipped == {}
    assert len(table) == 6


def test_only_answered_rows_can_be_trained_on(tmp_path):
    labels = [{"he": 1}, {}, {"she": 0}, {"it": 0.3}]
    rows = [{"img_id": "a", "question_id": n, "sent": "Who?", "label": label} for n, label in enumerate(labels)]
    source = SourceConfig(format="vqa_karpathy", file=str(files.write_json(tmp_path / "karpathy.json", rows)))
    table = open_table(source, tmp_path / "tables", on_bad_data="stop")
    assert [row.id for row in table.answered()] == ["0", "3"]
    assert [row.id for row in table.select([3, 1]).answered()] == ["3"]


def test_files_that_are_not_there(tmp_path):
    source = SourceConfig(format="gqa", file=str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"none\.json does not exist"):
        open_table(source, tmp_path / "tables", on_bad_data="stop")
    with pytest.raises(ValueError, match="cannot be read"):
        open_table(source.model_copy(update={"file": str(tmp_path)}), tmp_path / "tables", on_bad_data="stop")


def test_the_file_is_an_arrow_stream_that_others_read(tmp_path):
    table = open_table(many(tmp_path, 5), tmp_path / "tables", on_bad_data="stop")
    with pa.ipc.open_stream(table.path) as reader:
        assert reader.read_all().column("text").to_pylist() == [f"What is {number}?" for number in range(5)]


def test_datasets_opens_the_file(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not a dependency")
    table = open_table(many(tmp_path, 5), tmp_path / "tables", on_bad_data="stop")
    assert datasets.Dataset.from_file(str(table.path))[3]["id"] == "42003"


def test_pictures_by_name(tmp_path):
    for name in ("a.jpg", "x/a.jpg", "x/b.jpg", "y/b.jpg", "y/c.jpg", "clip_1.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    pictures = Pictures(tmp_path)
    names = ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "clip_1")
    assert [pictures.find(name) for name in names] == ["a.jpg", None, "y/c.jpg", None, "clip_1.mp4"]
