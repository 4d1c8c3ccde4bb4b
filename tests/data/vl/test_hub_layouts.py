"""Benchmarks as the hub holds them: each layout is read with its published columns, by format or by suite."""

import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dora_mm.cli import main
from dora_mm.config.vl import DecodeConfig
from dora_mm.config.vl_data import SourceConfig, VLDataConfig
from dora_mm.data.vl.readers import read_source
from dora_mm.data.vl.readers.hub_layouts import LAYOUTS
from dora_mm.data.vl.report import learned_answers
from dora_mm.data.vl.rows import BadRows
from dora_mm.data.vl.splits import AllRows, open_training, open_validation
from dora_mm.data.vl.tables import open_table
from dora_mm.eval.vl.predictions.joining import references_of
from dora_mm.registries.readers import READERS
from dora_mm.registries.vl_tasks import TASKS
from tests.shared.data import hub_layouts as hub
from tests.shared.data import suite_files
from tests.shared.data import vl_files as files


def form_of(published: hub.Published) -> str:
    return next(form for form in TASKS[published.suite].formats if READERS[form].hub)


def about(example) -> tuple:
    return example.id, example.text, example.answers, example.kinds, len(example.images)


@pytest.mark.parametrize("name", hub.LAYOUTS)
def test_a_published_layout_is_read_for_the_score_and_for_training(name, tmp_path):
    published = hub.LAYOUTS[name]
    path = hub.write(published, tmp_path)
    assert [about(row) for row in references_of(published.suite, str(path), None)] == published.expected
    table = open_table(SourceConfig(format=form_of(published), file=str(path)), tmp_path / "t", on_bad_data="stop")
    assert [about(row) for row in table] == published.expected
    stored = [image for row in table for image in row.images if name != "gqa"]
    assert all(Path(image).is_file() for image in stored)
    assert table.unread == {}


@pytest.mark.parametrize("name", hub.LAYOUTS)
def test_a_published_layout_is_scored_and_trained_on_by_its_suite(name, tmp_path, capsys, monkeypatch):
    published = hub.LAYOUTS[name]
    path = hub.write(published, tmp_path)
    rows = [{"id": row[0], "prediction": row[2][0]} for row in published.expected if row[2]]
    train = {"format": form_of(published), "file": str(path)}
    data = VLDataConfig.model_validate({"task": published.suite, "train": train, "tables": str(tmp_path / "t")})
    if not rows:
        with pytest.raises(ValueError, match="has no answers to learn"):
            open_training(data, 1, AllRows())
        return
    assert len(open_training(data, 1, AllRows())[published.suite].table) == len(rows)
    monkeypatch.setattr(shutil, "which", lambda name: None)  # of Java, which takes 20 s for captions
    predictions = files.write_lines(tmp_path / "predictions.jsonl", rows)
    command = ["score", str(predictions), "--data", str(path), "--suite", published.suite, "--partial"]
    assert main(command) == 0
    assert f"## {predictions}: {published.suite}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "learned", "said"),
    [
        ({}, ("0.28",), "the first of 1 rows"),
        ({"answers": "first"}, ("0.28",), "the first of 1 rows"),
        ({"answers": "sampled"}, ("0.28", ".28"), "one drawn at each step of 1 rows"),
    ],
)
def test_one_of_several_answers_is_learned_and_all_are_scored(tmp_path, settings, learned, said):
    rows = [hub.DOCUMENTS.rows[0], hub.DOCUMENTS.rows[0] | {"questionId": "2", "answers": ["1"]}]
    source = {"format": "docvqa", "file": str(hub.write(hub.DOCUMENTS._replace(rows=rows), tmp_path))}
    config = {"task": "docvqa", "train": source | settings, "valid": source, "tables": str(tmp_path / "t")}
    data = VLDataConfig.model_validate(config)
    first, second = (table := open_training(data, 1, AllRows())["docvqa"].table)
    assert (first.answers, len(first.scores), second.answers) == (learned, len(learned), ("1",))
    assert list(learned_answers(table).values()) == [said]
    valid = open_validation(data, DecodeConfig(), AllRows())["docvqa"].table
    assert valid[0].answers == ("0.28", ".28")


def test_each_source_of_a_training_split_has_its_own_choice_of_answers(tmp_path):
    source = {"format": "docvqa", "file": str(hub.write(hub.DOCUMENTS, tmp_path))}
    config = {
        "task": "docvqa",
        "train": source,
        "more": [source | {"answers": "sampled"}],
        "tables": str(tmp_path / "t"),
    }
    first, second = open_training(VLDataConfig.model_validate(config), 1, AllRows())["docvqa"].table
    assert (first.answers, second.answers) == (("0.28",), ("0.28", ".28"))


def test_answers_of_people_are_drawn_by_their_scores_unless_the_first_is_asked_for(tmp_path):
    source = {"format": "textvqa", "file": str(hub.write(hub.PHOTOGRAPHS, tmp_path))}
    for settings, learned in (({}, ("dakota", "nous")), ({"answers": "first"}, ("dakota",))):
        config = {"task": "textvqa", "train": source | settings, "tables": str(tmp_path / "t")}
        (row,) = open_training(VLDataConfig.model_validate(config), 1, AllRows())["textvqa"].table
        assert row.answers == learned
        assert len(row.raw_answers) == 10


def test_a_choice_of_answers_has_no_effect_on_a_score(tmp_path):
    with pytest.raises(ValueError, match="valid.answers has no effect: all answers count for the score"):
        VLDataConfig.model_validate({"task": "docvqa", "valid": {"format": "docvqa", "file": "a", "answers": "first"}})
    with pytest.raises(ValueError, match="answers is only for format"):
        SourceConfig(format="chat", file="a", answers="first")


def read(form: str, path: Path | list[Path], **settings) -> list:
    file = [*map(str, path)] if isinstance(path, list) else str(path)
    return list(read_source(SourceConfig(format=form, file=file, **settings), BadRows("stop")))


def test_every_format_that_reads_the_hub_has_layouts():
    assert {form for form, reader in READERS.items() if reader.hub} == LAYOUTS.keys()


def test_what_a_file_is_its_first_bytes_say(tmp_path):
    """A Parquet file was "truncated or not valid JSON", and the official file under any name is read as before."""
    renamed = hub.write(hub.DOCUMENTS, tmp_path).rename(tmp_path / "data.json")
    assert [row.id for row in references_of("docvqa", str(renamed), None)] == ["49153"]
    official = Path(suite_files.source("docvqa", tmp_path).path).rename(tmp_path / "val.parquet")
    assert [row.id for row in references_of("docvqa", str(official), None)] == ["337"]


def test_shards_of_a_snapshot_are_one_split(tmp_path):
    folder = tmp_path / "DocVQA"
    folder.mkdir()
    for split, number in (("validation", 0), ("validation", 1), ("test", 0)):
        published = hub.DOCUMENTS._replace(name=f"{split}-{number:05}-of-00002.parquet")
        hub.write(published._replace(rows=[published.rows[0] | {"questionId": f"{split}{number}"}]), folder)
    assert [row.id for row in references_of("docvqa", str(folder), None, split="validation")] == [
        "validation0",
        "validation1",
    ]
    with pytest.raises(ValueError, match="has several splits: choose one, as in split: validation"):
        references_of("docvqa", str(folder), None)
    shards = sorted(folder.glob("validation*"))
    assert len(read("docvqa", shards)) == 2
    assert [row.id for row in read("docvqa", [shards[0], shards[0]])] == [
        "validation0",
        "validation0 (row 1 of file 2)",
    ]
    with pytest.raises(ValueError, match="is one file: split 'test' chooses among those of a folder"):
        read("docvqa", shards[0], split="test")


def test_a_column_of_splits_chooses_rows(tmp_path):
    path = hub.write(hub.MMBENCH, tmp_path)
    assert [row.id for row in read("choices", path, split="dev")] == ["241"]
    with pytest.raises(ValueError, match="has no rows of the split 'test': it has dev"):
        read("choices", path, split="test")


@pytest.mark.parametrize(
    ("form", "name", "content", "message"),
    [
        ("nlvr2", "a.parquet", None, "a.parquet is Parquet; nlvr2 reads JSON (github.com/lil-lab/nlvr)"),
        (
            "docvqa",
            "a.tsv",
            b"index\tquestion\n1\tb\n",
            "a.tsv is a table; docvqa reads JSON (Robust Reading Competition,",
        ),
        ("docvqa", "a.json", b"PK\x03\x04", "a.json is a zip archive; docvqa reads JSON"),
        ("chat", "a.json", b"PK\x03\x04", "a.json is a zip archive: unpack it"),
        ("choices", "a.txt", b'[{"index": 1}]', "a.txt is JSON; choices reads a table with tabs"),
        (
            "docvqa",
            "a.parquet",
            None,
            "a.parquet has the columns type, question, answer, image; docvqa reads JSON (Robust Reading Competition, "
            "rrc.cvc.uab.es/?ch=17) or Parquet with the columns question, answers, image, questionId (lmms-lab/DocVQA)",
        ),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path, form, name, content, message):
    path = tmp_path / name
    if content is None:
        hub.write(hub.CHARTS, tmp_path).rename(path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read(form, path)


def test_several_official_files_are_not_read_as_one(tmp_path):
    paths = [files.write_json(tmp_path / f"{name}.json", {"data": []}) for name in "ab"]
    with pytest.raises(ValueError, match="names 2 files that are not Parquet; docvqa reads JSON"):
        read("docvqa", paths)


def test_only_files_without_images_need_a_folder(tmp_path):
    official = suite_files.source("docvqa", tmp_path)
    assert official.lacks_images
    assert not official.model_copy(update={"images": str(tmp_path)}).lacks_images
    path = hub.write(hub.DOCUMENTS, tmp_path)
    assert not official.model_copy(update={"file": str(path)}).lacks_images
    assert not official.model_copy(update={"file": "missing.parquet"}).lacks_images
    gqa = hub.write(hub.GQA._replace(name="gqa.parquet"), tmp_path)
    assert SourceConfig(format="gqa", file=str(gqa)).lacks_images


def test_images_that_are_files_are_named_from_the_columns(tmp_path):
    (row,) = read("gqa", hub.write(hub.GQA, tmp_path))
    assert row.images == ("n161313.jpg",)


def test_bad_rows_are_named_and_the_others_read(tmp_path):
    rows = [{"question": "a", "answer": ["x"]}, {"question": None, "answer": ["x"]}, {"question": "b", "answer": []}]
    path = hub.write(hub.RECOGNITION._replace(rows=rows), tmp_path)
    bad = BadRows("skip")
    source = SourceConfig(format="ocrbench", file=str(path))
    assert [(row.id, row.answers) for row in read_source(source, bad)] == [("0", ("x",)), ("2", ())]
    assert bad.found == {"question is missing, or not a text": [f"{path}, row 2"]}


def test_references_hold_no_images(tmp_path):
    """Two rows about one image stay a group, whatever their images weigh."""
    rows = [
        {"question": name, "image": hub.image(colour)} for name, colour in (("a", "red"), ("b", "red"), ("c", "blue"))
    ]
    path = hub.write(hub.MEDICINE._replace(rows=rows), tmp_path)
    first, second, third = (row.images for row in references_of("short_answers", str(path), None))
    assert first == second != third
    assert len(first[0]) < 100


def test_arrow_files_are_read_too(tmp_path):
    table = pq.read_table(hub.write(hub.CHARTS, tmp_path))
    path = tmp_path / "data-00000-of-00001.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    assert [about(row) for row in read("chartqa", path)] == hub.CHARTS.expected
