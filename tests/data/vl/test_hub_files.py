"""Which files of a folder are of which split, beside the library `datasets` on the same folder."""

import json
from pathlib import Path

import pytest

from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.readers.chat import read_chat
from dora_mm.data.vl.readers.hub_files import files_of
from dora_mm.data.vl.rows import BadRows
from dora_mm.data.vl.tables import open_table
from tests.shared.data.chats import messages

GPU = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: rows/part-*
  - split: test
    path: [rows/held.jsonl, rows/more.jsonl]
---
# Card
"""
SUBSETS = "---\nconfigs:\n- config_name: vqa\n  data_dir: vqa\n- config_name: ocr\n  data_files: ocr/*.jsonl\n---\n"
DEFAULT = SUBSETS.replace("config_name: ocr", "config_name: ocr\n  default: true")
LAYOUTS = {  # the files of a folder, and the splits that they are
    "one file": (["rows.jsonl"], {"train": ["rows.jsonl"]}),
    "no names": (["a.jsonl", "deep/b.jsonl"], {"train": ["a.jsonl", "deep/b.jsonl"]}),
    "the hub's shards": (
        ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"],
        {
            "train": ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
            "test": ["data/test-00000-of-00001.jsonl"],
        },
    ),
    "shards of other splits": (
        ["data/train_sft-00000-of-00001.jsonl", "data/test_sft-00000-of-00001.jsonl"],
        {"test_sft": ["data/test_sft-00000-of-00001.jsonl"], "train_sft": ["data/train_sft-00000-of-00001.jsonl"]},
    ),
    "shards beside data": (
        ["train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"],
        {"train": ["train-00000-of-00001.jsonl"], "test": ["test-00000-of-00001.jsonl"]},
    ),
    "names": (
        ["my_train.jsonl", "my-dev-2.jsonl", "evaluation.jsonl"],
        {"train": ["my_train.jsonl"], "validation": ["my-dev-2.jsonl"], "test": ["evaluation.jsonl"]},
    ),
    "names in words": (["trainer.jsonl", "contest.jsonl"], {"train": ["contest.jsonl", "trainer.jsonl"]}),
    "folders before names": (
        ["train/test.jsonl", "my val/a.jsonl"],
        {"train": ["train/test.jsonl"], "validation": ["my val/a.jsonl"]},
    ),
    "one split": (["chartqa/train-00000-of-00001.jsonl"], {"train": ["chartqa/train-00000-of-00001.jsonl"]}),
    "hidden": ([".cache/train.jsonl", "__x/train.jsonl", ".train.jsonl", "a.jsonl"], {"train": ["a.jsonl"]}),
    "a GPU": (
        ["rows/part-1.jsonl", "rows/part-2.jsonl", "rows/held.jsonl", "rows/more.jsonl", "rows/test.jsonl", GPU],
        {"train": ["rows/part-1.jsonl", "rows/part-2.jsonl"], "test": ["rows/held.jsonl", "rows/more.jsonl"]},
    ),
    "a GPU with a default": (["vqa/a.jsonl", "ocr/b.jsonl", DEFAULT], {"train": ["ocr/b.jsonl"]}),
}


def write(folder: Path, files: list[str]) -> Path:
    """Files with a row each, whose id is the file's name; a text with a header is the README.md."""
    for name in files:
        path = folder / ("README.md" if name.startswith("---") else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name if name.startswith("---") else json.dumps({"id": name, "messages": messages("Q", "A")}))
    return folder


def ids(folder: Path, split: str | None) -> list[str]:
    source = SourceConfig(format="chat", file=str(folder), split=split)
    return [example.id for example in read_chat(source, BadRows("stop"))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_are_found_by_names(tmp_path, layout):
    files, splits = LAYOUTS[layout]
    write(tmp_path, files)
    for split, expected in splits.items():
        assert ids(tmp_path, split) == expected
    if len(splits) == 1:
        assert ids(tmp_path, None) == next(iter(splits.values()))
    else:
        with pytest.raises(ValueError, match=rf"has several splits: choose one, as in split: {next(iter(splits))}; "):
            files_of(tmp_path)
    with pytest.raises(ValueError, match=rf"has no split 'other': it has {', '.join(splits)}$"):
        files_of(tmp_path, "other")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_library_datasets_finds_the_same(tmp_path, layout):
    datasets = pytest.importorskip("datasets", reason="datasets is not a dependency")
    files, splits = LAYOUTS[layout]
    loaded = datasets.load_dataset(str(write(tmp_path, files)), streaming=True)
    assert {split: [row["id"] for row in rows] for split, rows in loaded.items()} == splits


def test_a_snapshot_with_a_test_split_is_not_trained_on_it(tmp_path):
    """Both files were read, and the test split trained on."""
    write(tmp_path / "snapshot", ["train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"])
    source = SourceConfig(format="chat", file=str(tmp_path / "snapshot"))
    with pytest.raises(ValueError, match=r"snapshot has several splits: choose one, as in split: train; there are "):
        open_table(source, tmp_path / "tables", on_bad_data="stop")
    for split in ("train", "test"):
        table = open_table(source.model_copy(update={"split": split}), tmp_path / "tables", on_bad_data="stop")
        assert [row.id for row in table] == [f"{split}-00000-of-00001.jsonl"]
    pattern = SourceConfig(format="chat", file=str(tmp_path / "snapshot" / "*.jsonl"), split="test")
    assert [row.id for row in open_table(pattern, tmp_path / "tables", on_bad_data="stop")] == [table[0].id]
    with pytest.raises(ValueError, match=r"\*\.jsonl has several splits"):
        files_of(tmp_path / "snapshot" / "*.jsonl")


def test_what_is_unclear_is_refused(tmp_path):
    write(tmp_path / "mixed", ["train.jsonl", "others.jsonl"])
    with pytest.raises(ValueError, match=r"has files of the split train \(train\.jsonl\) and others of none \(others"):
        files_of(tmp_path / "mixed")
    assert [file.name for file in files_of(tmp_path / "mixed", "train")] == ["train.jsonl"]
    write(tmp_path / "subsets", ["vqa/a.jsonl", "ocr/b.jsonl", SUBSETS])
    with pytest.raises(
        ValueError, match=r"subsets has several data sets \(vqa, ocr\): give the folder or a pattern of"
    ):
        files_of(tmp_path / "subsets")
    with pytest.raises(ValueError, match=r"train\.jsonl is one file: split 'train' chooses among those of a folder"):
        files_of(tmp_path / "mixed" / "train.jsonl", "train")


def test_a_subset_that_was_downloaded_alone_is_the_data_set(tmp_path):
    assert ids(write(tmp_path, ["ocr/b.jsonl", SUBSETS]), None) == ["ocr/b.jsonl"]


def test_usual_names_of_splits_are_understood(tmp_path):
    assert ids(write(tmp_path, ["train.jsonl", "dev.jsonl"]), "val") == ["dev.jsonl"]


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    (tmp_path / "train.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match=r"train\.parquet is a pointer of Git LFS, not the file itself: get it with"):
        ids(tmp_path, None)


@pytest.mark.parametrize("pattern", ["/**", "../**", "data/../../*", "data/" + "[" * 2000])
@pytest.mark.parametrize("key", ["data_files", "data_dir"])
def test_a_readme_looks_for_no_files_elsewhere(tmp_path, pattern, key):
    header = f"---\nconfigs:\n- config_name: default\n  {key}: {json.dumps(pattern)}\n---\n"
    with pytest.raises(ValueError, match=r"README\.md names files by .*, which is no pattern of its folder"):
        files_of(write(tmp_path, [header, "data/train.jsonl"]))
