"""The doors to what is scored: predictions of any program, suites with their data, and Parquet files of the hub."""

import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from random import Random
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq

from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.answers import ModelAnswer
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.readers import read_source
from dora_mm.data.vl.rows import BadRows
from dora_mm.eval.vl.metrics import score
from dora_mm.eval.vl.predictions.scored import About, write_scored
from dora_mm.recipes import PIPELINES
from dora_mm.registries.suites import read_suite
from tests.fuzz.door import Door
from tests.fuzz.mutations import changed_value, other_yaml
from tests.shared.data import chats, suite_files

SCORE = PIPELINES.load("score")
EXAMPLES = [
    Example(str(number), (f"{number}.png",), f"What is {number}?", ("a dog", "dog"), (1.0, 1.0)) for number in range(4)
]
ANSWERED = [(example, f"a dog {example.id}") for example in EXAMPLES]
PLAIN = [{"id": example.id, "prediction": text} for example, text in ANSWERED]
SAMPLES = [
    {"doc_id": number, "input": example.text, "target": "['a dog', 'dog']", "filtered_resps": [text]}
    for number, (example, text) in enumerate(ANSWERED)
]
BATCH = [
    {"custom_id": row["id"], "response": {"body": {"choices": [{"message": {"content": row["prediction"]}}]}}}
    for row in PLAIN
]
HEADER = ("index", "question", "hint", "A", "B", "C", "answer", "category", "split", "image_path")
CHOICES = [
    (
        number,
        f"What is {number}?",
        "Look.",
        "a dog",
        "a cat",
        "['a', 'b']",
        "AB"[number % 2],
        "animals",
        "test",
        f"['{number}.png']",
    )
    for number in range(3)
]
SUITE = """\
# A suite of a person's
title: Animals
readers: [choices, answers]
metric: choices
prompt: "{text}\\nAnswer with a letter."
plain: "{text}"
max_answer: 8
images: 1
row_mean: true
letters: true
"""
README = """\
---
license: mit
configs:
- config_name: default
  default: true
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: "data/test-*"
- config_name: other
  data_dir: data
---
# Dogs
"""


# --- predictions ------------------------------------------------------------------------------------------------------


def scored(**settings: Any) -> Callable[[Path], object]:
    """Scores, with all paths in a folder, and without what is said."""

    def read(folder: Path) -> None:
        read_suite.cache_clear()  # one process reads many files of this name
        given = {key: str(folder / value) if key != "form" else value for key, value in settings.items()}
        file, suite = given.pop("predictions"), given.pop("suite", None)
        with redirect_stdout(io.StringIO()):
            SCORE.main([file], suite=suite or "docvqa", page=folder / "page.html", **given)

    return read


def make_predictions(folder: Path) -> None:
    about = About("docvqa", settings={"model": {"path": "a"}}, digests={"data": "0" * 64}, day="2026-12-01")
    write_scored(
        folder / "ours.jsonl", [(e, ModelAnswer(text, "So.")) for e, text in ANSWERED], score("docvqa", ANSWERED), about
    )
    (folder / "samples.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in SAMPLES))
    (folder / "batch.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in BATCH))
    (folder / "plain.json").write_text(json.dumps(PLAIN))
    (folder / "plain.csv").write_text(
        "id,prediction\n" + "".join(f"{row['id']},{row['prediction']}\n" for row in PLAIN)
    )
    pq.write_table(pa.Table.from_pylist(PLAIN), folder / "plain.parquet")
    table = [
        ("index", "question", "answer", "prediction"),
        *((e.id, e.text, "['a dog', 'dog']", t) for e, t in ANSWERED),
    ]
    (folder / "table.tsv").write_text("".join("\t".join(row) + "\n" for row in table))
    book = openpyxl.Workbook()
    for row in table:
        book.active.append(row)  # type: ignore[union-attr]
    book.save(folder / "table.xlsx")
    data = [{"questionId": int(e.id), "question": e.text, "image": e.images[0], "answers": e.answers} for e in EXAMPLES]
    (folder / "data.json").write_text(json.dumps({"dataset_name": "it", "dataset_version": "1.0", "data": data}))


def predictions(file: str, **settings: str) -> Door:
    name = f"predictions {file}"
    return Door(name, make_predictions, (file,), scored(predictions=file, **settings))


# --- suites -----------------------------------------------------------------------------------------------------------


def make_suite(folder: Path) -> None:
    (folder / "suite.yaml").write_text(SUITE)
    rows = [HEADER, *CHOICES]
    (folder / "data.tsv").write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    answers = [{"id": str(row[0]), "prediction": "The answer is A."} for row in CHOICES]
    (folder / "answers.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in answers))


# --- the hub ----------------------------------------------------------------------------------------------------------


def make_hub(folder: Path) -> None:
    """A snapshot with a README, shards of two splits, and the file of a suite."""
    (folder / "data").mkdir()
    image = {"bytes": chats.image(), "path": "a.png"}
    talk = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A dog."}]
    table = pa.Table.from_pylist([{"id": str(number), "images": [image], "messages": talk} for number in range(4)])
    for shard in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        pq.write_table(table, folder / "data" / f"{shard}.parquet", row_group_size=2)
    (folder / "README.md").write_text(README)


def read_hub(folder: Path) -> None:
    source = SourceConfig(format="chat", file=str(folder), split="train")
    assert all(example.turns for example in read_source(source, BadRows("skip")))


def make_suites(folder: Path) -> None:
    suite_files.mmmu(folder)
    suite_files.ai2d(folder)


def read_suites(folder: Path) -> None:
    for form, name in (("mmmu", "validation-00000-of-00001"), ("ai2d", "test")):
        list(read_source(SourceConfig(format=form, file=str(folder / f"{name}.parquet")), BadRows("skip")))


def other_values(content: bytes, random: Random) -> bytes:
    """A Parquet file with another value, column, type, compression or encoding."""
    try:
        rows = pq.read_table(io.BytesIO(content), use_threads=False).to_pylist()
    except (pa.ArrowException, OSError, ValueError):
        return content[: random.randrange(len(content) + 1)]
    changed = _as_rows(changed_value(_as_texts(rows), random))
    changed = changed[:50] if isinstance(changed, list) else changed
    settings = {
        "compression": random.choice(("NONE", "SNAPPY", "GZIP", "ZSTD")),
        "use_dictionary": random.random() < 0.5,
        "row_group_size": random.choice((2, 3, 1000)),
    }
    file = io.BytesIO()
    try:
        pq.write_table(pa.Table.from_pylist(changed), file, **settings)
    except (pa.ArrowException, ValueError, TypeError, OverflowError, AttributeError, KeyError):  # Arrow has no such
        without = [{**row, random.choice(("id", "images", "question")): None} for row in rows]
        pq.write_table(pa.Table.from_pylist(without), file := io.BytesIO(), **settings)
    return file.getvalue()


def _as_texts(value: Any) -> Any:
    """A value as JSON has it: bytes as texts of Latin-1."""
    if isinstance(value, dict):
        return {key: _as_texts(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_as_texts(each) for each in value]
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _as_rows(value: Any) -> list[dict[str, Any]]:
    """Rows with the bytes of images."""
    if isinstance(value, list):
        return [_as_rows(each) for each in value]
    if isinstance(value, dict):
        return {  # type: ignore[return-value]
            key: each.encode("latin-1", "replace") if key == "bytes" and isinstance(each, str) else _as_rows(each)
            for key, each in value.items()
        }
    return value


SHARDS = ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet")
SCORE_DOORS = (
    predictions("ours.jsonl"),
    predictions("samples.jsonl", data="data.json"),
    predictions("batch.jsonl", data="data.json"),
    predictions("plain.json", data="data.json"),
    predictions("plain.csv", data="data.json"),
    predictions("plain.parquet", data="data.json"),
    predictions("table.tsv"),
    predictions("table.xlsx"),
    Door("predictions data", make_predictions, ("data.json",), scored(predictions="plain.json", data="data.json")),
    Door("suite", make_suite, ("suite.yaml", "suite.yaml", "data.tsv"),
         scored(predictions="answers.jsonl", suite="suite.yaml", data="data.tsv"), (other_yaml,)),
    Door("hub Parquet", make_hub, (*SHARDS, *SHARDS, "README.md"), read_hub, (other_values,)),
    Door("suites' Parquet", make_suites, ("test.parquet", "validation-00000-of-00001.parquet"), read_suites,
         (other_values,)),
)  # fmt: skip
