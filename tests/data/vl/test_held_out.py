"""Rows that are held out for validation: whole images, whatever the order of the rows and wherever the files are."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_mm.config.vl_data import HeldOutConfig
from dora_mm.data.vl.arrow import record_batch
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.held_out import fitting, split_held_out
from dora_mm.data.vl.tables import STORED_IMAGES, ExampleTable, open_table
from tests.shared.data.chats import as_json, data_url, image, said

FEW = st.integers(0, 12).map(lambda number: f"{number}.png")
ROWS = st.lists(st.tuples(st.lists(FEW, max_size=3), st.sampled_from("abc")), min_size=2, max_size=40)
SHARES = st.floats(0.01, 0.99)


def table_of(rows: list[Example]) -> ExampleTable:
    return ExampleTable(Path("tables/a.arrow"), "a.json", [record_batch(rows)], np.arange(len(rows)), "stop")


def examples(rows) -> list[Example]:
    return [Example(str(number), tuple(images), text) for number, (images, text) in enumerate(rows)]


def ids(table: ExampleTable) -> list[str]:
    return [example.id for example in table]


@given(ROWS, SHARES)
def test_no_image_is_on_both_sides_and_every_row_is_on_one(rows, share):
    table = table_of(examples(rows))
    try:
        trained, held = split_held_out(table, HeldOutConfig(share=share))
    except ValueError:
        assert is_one_group(rows)
        return
    assert sorted(ids(trained) + ids(held)) == sorted(ids(table))
    assert ids(trained) == sorted(ids(trained), key=int)
    assert not set(trained.images()) & set(held.images())
    alone = [{row.text for row in side if not row.images} for side in (trained, held)]
    assert not alone[0] & alone[1]
    assert len(trained)
    assert len(held)


def is_one_group(rows) -> bool:
    """Whether images join all rows, found by adding what is joined until nothing is left to add."""
    keys = [set(images) or {f"text {text}"} for images, text in rows]
    joined = set(keys[0])
    while more := [row for row in keys if row & joined and not row <= joined]:
        joined.update(*more)
    return all(row <= joined for row in keys)


@given(st.permutations(range(60)), SHARES)
def test_the_share_is_met_and_the_order_of_the_rows_does_not_matter(order, share):
    rows = [Example(f"row {number}", (f"{number // 2}.png",), "what") for number in range(60)]
    trained, held = split_held_out(table_of([rows[number] for number in order]), HeldOutConfig(share=share))
    wanted = max(2, min(58, round(share * 60) // 2 * 2))  # of images with two rows each
    assert len(held) == wanted
    assert set(ids(held)) == set(ids(split_held_out(table_of(rows), HeldOutConfig(share=share))[1]))
    assert set(ids(trained)) == {row.id for row in rows} - set(ids(held))


def test_no_more_rows_than_the_limit_are_held_out():
    table = table_of([Example(str(number), (f"{number // 3}.png",), "what") for number in range(300)])
    trained, held = split_held_out(table, HeldOutConfig(share=0.5, limit=30))
    assert (len(trained), len(held)) == (270, 30)
    trained, held = split_held_out(table, HeldOutConfig(share=0.5, limit=2))
    assert (len(trained), len(held)) == (297, 2)  # the image of these two has a third row


def test_the_smallest_image_is_held_out_where_none_fits():
    table = table_of([Example(str(number), ("large.png" if number < 9 else "small.png",), "") for number in range(14)])
    _, held = split_held_out(table, HeldOutConfig(share=0.05))
    assert ids(held) == ["9", "10", "11", "12", "13"]
    assert fitting(np.array([5, 2, 3, 1]), 4) == [1, 3]
    assert fitting(np.array([5, 2, 2]), 1) == [1]


def test_rows_about_one_image_cannot_be_split():
    table = table_of([Example("1", ("a", "b"), "x"), Example("2", ("b", "c"), "y"), Example("3", ("c",), "z")])
    with pytest.raises(ValueError, match=r"a\.json: no rows can be held out \(data\.valid\.share\)"):
        split_held_out(table, HeldOutConfig(share=0.5))


def test_the_choice_does_not_depend_on_the_names_of_folders(tmp_path):
    """Also not of the folder of tables, in which embedded images are kept."""

    def chosen(folder: Path, prefix: str = "") -> list[str]:
        (folder / "images").mkdir(parents=True)
        rows = []
        for number in range(20):
            (folder / "images" / f"{number}.png").write_bytes(image())
            embedded = data_url(image(f"#{number:06x}"))
            rows += [{"id": number, "image": f"{prefix}{number}.png", "conversations": said("<image>a", "b")}]
            rows += [{"id": 100 + number, "image": embedded, "conversations": said("<image>a", "b")}]
        source = as_json(folder, rows, images=str(folder / "images"))
        table = open_table(source, folder / "tables", on_bad_data="stop")
        return ids(split_held_out(table, HeldOutConfig(share=0.5), source.images)[1])

    first = chosen(tmp_path / "one")
    assert len(first) == 20
    assert {int(row) >= 100 for row in first} == {True, False}
    assert chosen(tmp_path / "other") == first
    assert chosen(tmp_path / "absolute", f"{tmp_path}/absolute/images/") == first
    assert (tmp_path / "one" / "tables" / STORED_IMAGES).is_dir()


def test_skipped_rows_are_told_of_the_training_side_alone(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(image())
    rows = [{"image": f"{name}.png", "conversations": said("<image>a", "b")} for name in "abcd"]
    source = as_json(tmp_path, rows, images=str(tmp_path))
    table = open_table(source, tmp_path / "tables", on_bad_data="skip")
    trained, held = split_held_out(table, HeldOutConfig(share=0.4), source.images)
    assert (len(trained), len(held), len(trained.skipped), held.skipped) == (2, 1, 1, {})
