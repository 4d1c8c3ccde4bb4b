"""Tables, folders of images with metadata, Arrow files and archives, beside the library `datasets` on the same."""

import csv
import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.readers import read_source
from dora_mm.data.vl.readers.file_rows import file_items
from dora_mm.data.vl.rows import BadRows
from dora_mm.data.vl.tables import open_table
from tests.shared.data.chats import image, messages, packed, read, refusal, turns

COLUMNS = {"query": "question", "response": "answer", "image": "picture"}
DATASETS = {"reason": "datasets is not a dependency"}


def write_table(path: Path, rows: list[dict[str, Any]]) -> SourceConfig:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if ".tsv" in path.suffixes else ",")
    writer.writeheader()
    writer.writerows(rows)
    content = text.getvalue().encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return SourceConfig(format="chat", file=str(path))


def write_archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def image_folder(folder: Path, rows: list[dict[str, Any]], metadata: str = "metadata.jsonl") -> Path:
    """A folder of images, all red, with what is said of them."""
    names = [
        name for row in rows for key in row if key.endswith(("file_name", "file_names")) for name in _list(row[key])
    ]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image())
    if metadata.endswith(".csv"):
        write_table(folder / metadata, rows)
    else:
        (folder / metadata).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def examples(folder: Path, tables: Path, form: str = "chat", **settings: Any) -> list[Example]:
    source = SourceConfig.model_validate({"format": form, "file": str(folder), **settings})
    return list(open_table(source, tables, on_bad_data="stop"))


# --- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.CSV", "rows.csv.gz"])
def test_tables_are_read_by_their_columns(tmp_path, name):
    rows = [
        {"question": 'What is "it",\tor\nthis?', "answer": "A dog, é.", "picture": "a.jpg"},
        {"question": "And?", "answer": "", "picture": ""},
    ]
    source = write_table(tmp_path / name, rows)
    assert "say which of them is what, as in columns: {query: question, response: answer" in refusal(source)
    first, second = read(source.model_copy(update={"columns": COLUMNS}))
    assert (first.images, first.turns) == (("a.jpg",), turns(f"<image>{rows[0]['question']}", rows[0]["answer"]))
    assert (second.images, second.turns) == ((), turns("And?"))


def test_cells_hold_lists_and_conversations(tmp_path):
    said = messages("<image><image>Q", "A")
    rows = [
        {"messages": json.dumps(said), "images": "['a.jpg', 'b.jpg']"},
        {"messages": str(said), "images": '["a.jpg", "b.jpg"]'},
    ]
    for row in read(write_table(tmp_path / "rows.csv", rows)):
        assert (row.images, row.turns) == (("a.jpg", "b.jpg"), turns("<image><image>Q", "A"))
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]))  # as a column of Parquet has them, too
    (row,) = read(SourceConfig(format="chat", file=str(tmp_path / "rows.jsonl")))
    assert row.turns == turns("<image><image>Q", "A")


def test_damaged_tables_are_named(tmp_path):
    source = SourceConfig(format="chat", file=str(tmp_path / "rows.csv"))
    (tmp_path / "rows.csv").write_text("query,response\nQ,A\nQ,A,B\nQ,A\n")
    assert refusal(source) == ", line 3: has 3 cells, and the header 2"
    assert len(list(read_source(source, BadRows("skip")))) == 2
    for text, reason in (
        ('query,response\n"Q,A\n', " is damaged or not a table with commas, at line 2"),
        ("query,query\nQ,A\n", " has two columns of the same name"),
        ("query,response\n", " has no rows"),
    ):
        (tmp_path / "rows.csv").write_text(text)
        assert refusal(source).startswith(reason)


# --- folders of images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metadata", ["metadata.jsonl", "metadata.csv"])
def test_a_folder_of_images_with_captions(tmp_path, metadata):
    rows = [{"file_name": "a.png", "text": "A red dot."}, {"file_name": "deep/b.png", "text": "Another."}]
    folder = image_folder(tmp_path / "folder", rows, metadata)
    found = examples(folder, tmp_path / "tables")
    assert [row.images for row in found] == [(str(folder / row["file_name"]),) for row in rows]
    assert [row.turns for row in found] == [turns("<image>", row["text"]) for row in rows]
    captions = examples(folder, tmp_path / "tables", "captions")
    assert captions == [Example(row.id, row.images, "", row.answers, row.scores) for row in found]
    moved = folder.rename(tmp_path / "moved")
    assert examples(moved, tmp_path / "tables")[0].images == (str(moved / "a.png"),)


def test_metadata_of_conversations_and_of_splits(tmp_path):
    row = {"file_names": ["a.png", "b.png"], "messages": messages("<image> or <image>?", "Both.")}
    image_folder(tmp_path / "data" / "train", [row])
    image_folder(tmp_path / "data" / "test", [{"chart_file_name": "c.png", "query": "Q", "response": "A"}])
    (found,) = examples(tmp_path / "data", tmp_path / "tables", split="train")
    assert found.images == tuple(str(tmp_path / "data" / "train" / name) for name in ("a.png", "b.png"))
    (other,) = examples(tmp_path / "data", tmp_path / "tables", split="test", columns={"image": "chart"})
    assert other.images == (str(tmp_path / "data" / "test" / "c.png"),)


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "https://x.org/a.png", 7])
def test_metadata_names_no_file_elsewhere(tmp_path, name):
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "A"}))
    assert "has a `file_name` that is not the name of a file beside the metadata" in refusal(
        SourceConfig(format="chat", file=str(tmp_path / "metadata.jsonl"))
    )


def test_captions_may_be_several_and_have_other_names(tmp_path):
    rows = [{"picture": "a.png", "said": ["One.", "Two."]}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]))
    source = {"format": "captions", "file": str(tmp_path / "rows.jsonl")}
    columns = {"image": "picture", "caption": "said"}
    (found,) = read_source(SourceConfig.model_validate(source | {"columns": columns}), BadRows("stop"))
    assert (found.images, found.answers, found.turns) == (("a.png",), ("One.", "Two."), ())
    with pytest.raises(ValueError, match=r"has the keys 'picture', 'said'; say which of them is what, as in columns"):
        list(read_source(SourceConfig.model_validate(source), BadRows("stop")))
    with pytest.raises(
        ValueError, match=r"has several captions, of which `format: chat` reads one: `format: captions`"
    ):
        list(read_source(SourceConfig.model_validate(source | {"format": "chat", "columns": columns}), BadRows("stop")))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages("Q", "A")}))
    with pytest.raises(ValueError, match=r"has rows of another shape, Hugging Face \(messages\): say where image and"):
        list(read_source(SourceConfig.model_validate(source), BadRows("stop")))


def test_datasets_reads_the_same_folder_of_images(tmp_path):
    datasets = pytest.importorskip("datasets", **DATASETS)
    for split in ("train", "test"):
        rows = [{"file_name": f"{split}{n}.png", "text": f"{split} {n}"} for n in range(3)]
        image_folder(tmp_path / "data" / split, rows)
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "data"), streaming=True)
    for split in ("train", "test"):
        ours = examples(tmp_path / "data", tmp_path / "tables", "captions", split=split)
        assert [(row.images[0], row.answers[0]) for row in ours] == [
            (row["image"]["path"], row["text"]) for row in loaded[split].decode(False)
        ]


# --- Arrow -----------------------------------------------------------------------------------------------------------

ROWS = [{"images": [{"bytes": image(), "path": None}], "messages": messages("<image>Q", f"A{n}")} for n in range(130)]


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow_files_are_read_as_they_are(tmp_path, kind):
    table, path = pa.Table.from_pylist(ROWS), tmp_path / "rows.arrow"
    writer = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as file, writer(file, table.schema) as out:
        out.write_table(table, 100)
    found = examples(path, tmp_path / "tables")
    assert [row.answers for row in found] == [(f"A{n}",) for n in range(130)]
    assert Path(found[0].images[0]).read_bytes() == image()
    path.write_bytes(path.read_bytes()[:2000])
    assert refusal(SourceConfig(format="chat", file=str(path))).startswith(" is truncated or not a valid Arrow file")


def test_folders_of_save_to_disk_are_read_and_nothing_is_copied(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", **DATASETS)
    images = datasets.Features(
        {"images": datasets.List(datasets.Image()), "messages": datasets.List({"role": datasets.Value("string"),
         "content": datasets.Value("string")})}
    )  # fmt: skip
    whole = datasets.Dataset.from_list(ROWS, features=images)
    whole.save_to_disk(str(tmp_path / "one"), num_shards=3)
    datasets.DatasetDict(train_sft=whole.select(range(5)), held=whole.select([9, 7])).save_to_disk(
        str(tmp_path / "two")
    )
    assert [row.answers[0] for row in examples(tmp_path / "one", tmp_path / "tables")] == [
        row["messages"][-1]["content"] for row in datasets.load_from_disk(str(tmp_path / "one"))
    ]
    with pytest.raises(ValueError, match=r"two has several splits: choose one, as in split: train_sft"):
        examples(tmp_path / "two", tmp_path / "tables")
    held = examples(tmp_path / "two", tmp_path / "tables", split="held")
    assert [row.answers[0] for row in held] == ["A9", "A7"]
    assert sorted(path.name for path in (tmp_path / "tables" / "images").iterdir()) == [Path(held[0].images[0]).name]


# --- archives --------------------------------------------------------------------------------------------------------

ARCHIVE = {
    "a/0001.jpg": image("red", "JPEG"),
    "a/0001.json": json.dumps({"conversations": [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}],
                               "image": "0001.jpg"}).encode(),
    "a/0002.left.png": image("blue"),
    "a/0002.right.png": image("green"),
    "a/0002.json": json.dumps({"messages": messages("<image> or <image>?", "B")}).encode(),
}  # fmt: skip


def test_archives_of_webdataset(tmp_path):
    path = write_archive(tmp_path / "00000.tar", ARCHIVE)
    first, *_ = read(SourceConfig(format="chat", file=str(path), columns={}))
    assert (first.id, first.turns) == ("a/0001", turns("<image>Q", "A"))
    assert first.images == (f"data:image/jpeg;base64,{packed(image('red', 'JPEG'))}",)
    path.write_bytes(path.read_bytes()[:700])
    assert refusal(SourceConfig(format="chat", file=str(path))).startswith(" is truncated or not a valid archive")


def test_archives_are_rows_unless_a_table_is_beside_them(tmp_path):
    (folder := tmp_path / "folder").mkdir()
    captions = {f"{n}.{kind}": content for n in range(2) for kind, content in (("jpg", image()), ("txt", b"A dot."))}
    write_archive(folder / "00000.tar", captions)
    assert [row.answers for row in examples(folder, tmp_path / "tables", "captions")] == [("A dot.",)] * 2
    (folder / "rows.jsonl").write_text(json.dumps({"messages": messages("Q", "A")}))
    assert [row.text for row in examples(folder, tmp_path / "tables")] == ["Q"]


def test_datasets_reads_the_same_archive(tmp_path):
    datasets = pytest.importorskip("datasets", **DATASETS)
    files = {f"{n}.{kind}": content for n in range(3) for kind, content in (
        ("jpg", image("red", "JPEG")), ("json", json.dumps({"n": n}).encode()), ("txt", b"text"))}  # fmt: skip
    path = write_archive(tmp_path / "train.tar", files)
    loaded = datasets.load_dataset("webdataset", data_files=str(path), split="train", streaming=True).decode(False)
    ours = [row for _, row in file_items(path)]
    assert [{key: row[key] for key in ("jpg", "json", "txt")} | {"__key__": row["id"]} for row in ours] == [
        {key: row[key] for key in ("jpg", "json", "txt", "__key__")} for row in loaded
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl.gz", b" " * 10_000_000),
        ("rows.json.gz", b'[{"id": "' + b"a" * 10_000_000 + b'"}]'),
        ("rows.csv.gz", b"query,response\n" + b"a" * 10_000_000),
    ],
)
def test_what_a_gzip_file_unpacks_to_is_bounded(name, content, tmp_path, monkeypatch):
    """1.5 MB can be one line of 1.5 GB."""
    monkeypatch.setattr("dora_mm.data.vl.json_items.LEAST_UNPACKED", 1_000_000)
    (tmp_path / name).write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=f"{name} holds more than .* bytes, 100 times its own size"):
        list(file_items(tmp_path / name))
