"""Several sources of one training split: their rows as one table, and how often the rows of each are drawn."""

from collections import Counter
from pathlib import Path

import pytest

from dora_mm.config.vl_data import SourceConfig, VLDataConfig
from dora_mm.data.vl.mixing import Mixture, TaskBatches
from dora_mm.data.vl.splits import open_split, open_training, training_texts
from dora_mm.preview.vl_data import AllRows
from tests.shared.data.chats import as_json, as_lines, messages, said


@pytest.fixture
def data(tmp_path):
    """A file of LLaVA's with four rows and one of Hugging Face's with six; both have an image of the same name."""
    sources = []
    for number, (write, size) in enumerate([(as_json, 4), (as_lines, 6)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "a.jpg").touch()
        rows = [{"id": f"{number}-{n}", "image": "a.jpg"} for n in range(size)]
        for row in rows:
            row |= {"messages": messages("Q", "A")} if number else {"conversations": said("<image>Q", "A")}
        sources.append(write(folder, rows, images=str(folder), weight=(1.0, 0.5)[number]).model_dump())
    return {"train": sources[0], "more": sources[1:], "tables": str(tmp_path / "tables"), "on_bad_data": "skip"}


def test_the_rows_of_all_sources_are_one_table_with_their_own_images(data, tmp_path):
    config = VLDataConfig.model_validate(data)
    found = open_training(config, 2, AllRows())["chat"]
    assert [row.id for row in found.table] == [f"{n}-{m}" for n, size in enumerate((4, 6)) for m in range(size)]
    assert {row.images for row in found.table[:4]} == {(str(tmp_path / "0" / "a.jpg"),)}
    assert {row.images for row in found.table[4:]} == {(str(tmp_path / "1" / "a.jpg"),)}
    assert found.images is None
    assert [len(rows) for rows in found.table.by_source()] == [4, 6]
    assert [len(rows) for rows in found.table.select([9, 0, 8]).by_source()] == [1, 2]
    assert [len(rows) for rows in found.table.without_rows({0: "is bad"}).by_source()] == [3, 6]
    bad = found.table.without_rows({1: "is bad", 5: "is bad"}).skipped["is bad"]
    assert [Path(place.partition(",")[0]).parent.name for place in bad] == ["0", "1"]
    texts = training_texts(config.all_tasks[0], config)
    assert [row.images for row in texts] == [("a.jpg",)] * 10


def test_a_share_is_held_out_of_all_sources(data):
    config = VLDataConfig.model_validate({**data, "valid": {"share": 0.4}})
    (task,) = config.all_tasks
    trained, held = (open_split(task, split, config, AllRows()) for split in ("train", "valid"))
    assert {len(trained), len(held)} == {4, 6}
    assert [len(rows) for rows in trained.by_source()] in ([0, 6], [4, 0])


def test_ids_that_repeat_in_a_later_file_are_told_apart(data, tmp_path):
    data["more"] = [data["more"][0], data["train"], data["more"][0]]
    table = open_training(VLDataConfig.model_validate(data | {"train": data["train"]}), 2, AllRows())["chat"].table
    ids = [row.id for row in table]
    assert ids[:10] == [f"{n}-{m}" for n, size in enumerate((4, 6)) for m in range(size)]
    assert ids[10:14] == [f"0-{n} (file 3)" for n in range(4)]
    assert ids[14:] == [f"1-{n} (file 4)" for n in range(6)]
    assert len(set(ids)) == len(ids)


def test_the_identity_is_that_of_all_files(data, tmp_path):
    one, other = (
        open_training(VLDataConfig.model_validate(data | {"more": more}), 2, AllRows())["chat"].table.identity
        for more in (data["more"], data["more"] * 2)
    )
    assert one != other
    assert one == open_training(VLDataConfig.model_validate(data), 2, AllRows())["chat"].table.identity


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_each_source_occurs_as_often_as_its_weight_says(data, batch_size):
    table = open_training(VLDataConfig.model_validate(data), 2, AllRows())["chat"].table
    mixture = Mixture("chat", table.by_source(), (1.0, 0.5), seed=3)
    assert len(mixture) == 7
    batches = TaskBatches({"chat": mixture}, {"chat": batch_size}, seed=3)
    count = 2 * 7 * batch_size
    rows = [row for number in range(count // batch_size) for row in batches(number)[1]]
    for start in range(0, count, 7):
        epoch = Counter(row >= 4 for row in rows[start : start + 7])
        assert epoch == {False: 4, True: 3}
    for start in range(0, count, 14):  # each row of the second source once in two epochs
        twice = Counter(rows[start : start + 14])
        assert twice == {row: 2 if row < 4 else 1 for row in range(10)}
    again = TaskBatches({"chat": Mixture("chat", table.by_source(), (1.0, 0.5), seed=3)}, {"chat": batch_size}, seed=3)
    assert again(5) == batches(5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": None}, "more is beside train, which is missing"),
        ({"more": []}, "train.weight has no effect"),
        ({"valid": {"format": "chat", "file": "a.json", "weight": 2.0}}, "valid.weight has no effect"),
        ({"more": [{"format": "gqa", "file": "a.json"}]}, r"more\[0\].format gqa is only for gqa, not for chat"),
    ],
)
def test_mistakes_are_named(data, changes, message):
    data["train"]["weight"] = 2.0
    with pytest.raises(ValueError, match=message):
        VLDataConfig.model_validate(data | changes)


def test_columns_are_of_conversations():
    with pytest.raises(ValueError, match="columns is only for format chat, preferences and captions, not for gqa"):
        SourceConfig.model_validate({"format": "gqa", "file": "a.json", "columns": {"query": "q"}})
