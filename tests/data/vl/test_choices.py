"""Multiple choice questions in VLMEvalKit's TSV files."""

import csv
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.readers.choices import read_choices
from dora_mm.data.vl.report import table_figures
from dora_mm.data.vl.rows import BadRows
from dora_mm.data.vl.tables import open_table
from tests.shared.data import chats

ROW = {"index": "1", "question": "What is it?", "A": "a dog", "B": "a cat", "answer": "B", "image_path": "a.jpg"}


def table(folder: Path, rows: list[dict[str, str]], **settings: Any) -> SourceConfig:
    """A file as pandas writes it: quotation marks where a cell needs them, nothing for missing values."""
    path = folder / "questions.tsv"
    columns = dict.fromkeys(key for row in rows for key in row)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(columns), delimiter="\t", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return SourceConfig(format="choices", file=str(path), **settings)


def read(source: SourceConfig) -> list[Example]:
    return list(read_choices(source, BadRows("stop")))


def refusal(source: SourceConfig) -> str:
    with pytest.raises(ValueError, match=r"\S") as caught:
        read(source)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(source.file)
    return message.removeprefix(source.file)


def test_the_text_has_hint_question_and_options(tmp_path):
    rows = [
        ROW | {"hint": "It barks.", "category": "animals", "l2-category": "nature"},
        ROW | {"index": "2", "C": 'a "car",\tor\ntwo', "answer": "", "image_path": ""},
    ]
    first, second = read(table(tmp_path, rows))
    assert first == Example(
        id="1",
        images=("a.jpg",),
        text="It barks.\nWhat is it?\nA. a dog\nB. a cat",
        answers=("B",),
        scores=(1.0,),
        kinds=("animals",),
        options=("a dog", "a cat"),
    )
    assert second.text == 'What is it?\nA. a dog\nB. a cat\nC. a "car",\tor\ntwo'
    assert (second.images, second.answers, second.kinds) == ((), (), ())
    assert second.options == ("a dog", "a cat", 'a "car",\tor\ntwo')


def test_images_in_base64_lists_of_them_and_references(tmp_path):
    red, blue = chats.packed(chats.image()), chats.packed(chats.image("blue"))
    rows = [
        ROW | {"index": "7", "image": "9"},
        ROW | {"index": "8", "image": str([red, blue])},
        ROW | {"index": "9", "image": red},
        ROW | {"index": "10", "image": "", "image_path": "['a.jpg', 'b.jpg']"},
    ]
    source = table(tmp_path, rows)
    found = {row.id: row.images for row in read(source)}
    assert found == {
        "7": (chats.data_url(chats.image()),),
        "8": (chats.data_url(chats.image()), chats.data_url(chats.image("blue"))),
        "9": found["7"],
        "10": ("a.jpg", "b.jpg"),
    }
    (tmp_path / "a.jpg").touch()
    (tmp_path / "b.jpg").touch()
    source = source.model_copy(update={"images": str(tmp_path)})
    stored = open_table(source, tmp_path / "tables", on_bad_data="stop")
    assert Path(stored[0].images[0]).read_bytes() == chats.image()
    assert stored[2].images == stored[0].images
    assert stored[0].options == ("a dog", "a cat")
    assert table_figures(source, stored)["images per row (lowest / median / highest)"] == "1 / 2 / 2"


def test_cells_may_be_larger_than_csv_allows_by_default(tmp_path):
    question = "x" * 200_000
    assert read(table(tmp_path, [ROW | {"question": question}]))[0].text.startswith(question)


def test_a_split_is_a_column(tmp_path):
    rows = [ROW | {"index": str(n), "split": split} for n, split in enumerate(("dev", "test", "dev"))]
    assert [row.id for row in read(table(tmp_path, rows, split="dev"))] == ["0", "2"]
    assert len(read(table(tmp_path, rows))) == 3
    assert refusal(table(tmp_path, rows, split="val")) == " has no rows of the split 'val': it has dev, test"
    assert refusal(table(tmp_path, [ROW], split="val")).startswith(" has no column split")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"C": "", "D": "a bus"}, "has a gap in its options A, B, ..., or fewer than two"),
        ({"B": ""}, "has a gap in its options A, B, ..., or fewer than two"),
        ({"answer": "C"}, "has an answer that is not the letter of an option"),
        ({"answer": "a cat"}, "has an answer that is not the letter of an option"),
        ({"question": " "}, "has no question"),
        ({"index": ""}, "has no index"),
        ({"index": "0"}, "has a duplicate id"),
        ({"image": "12"}, "has an image that is neither base64 nor the index of a row with one"),
        ({"image": "5"}, "has an image that is neither base64 nor the index of a row with one"),
        ({"image": "AAAA" * 30}, "has an embedded image that cannot be read"),
        ({"image": "[" + "1, " * 40 + "]"}, "has a list of images that is not a list of texts"),
        ({"image_path": "https://x.org/a.jpg"}, "names an image by its address on the network"),
        ({"image_path": "['a.jpg'"}, "has a list of images that is not a list of texts"),
        ({"image_path": "[" * 5000 + "]" * 5000}, "has a list of images that is not a list of texts"),
        ({"image_path": "[" + "-" * 5000 + "1]"}, "has a list of images that is not a list of texts"),
        ({"image_path": "[" + "not " * 90_000 + "1]"}, "has a list of images that is not a list of texts"),
    ],
)
def test_a_bad_row_is_named_by_its_line_and_can_be_skipped(tmp_path, changes, reason):
    rows = [ROW | {"index": "0"}, ROW | {"index": "5"} | changes, ROW | {"index": "6"}]
    source = table(tmp_path, rows)
    assert refusal(source).startswith(f", line 3: {reason}")
    bad = BadRows("skip")
    assert [row.id for row in read_choices(source, bad)] == ["0", "6"]
    assert [len(places) for places in bad.found.values()] == [1]


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    rows = [ROW | {"index": "0", "question": "one\ntwo\nthree"}, ROW | {"answer": "Z"}]
    assert refusal(table(tmp_path, rows)).startswith(", line 5: has an answer")


def test_files_that_are_no_such_table(tmp_path):
    path = tmp_path / "questions.tsv"
    source = SourceConfig(format="choices", file=str(path))
    path.write_text("index,question,A,B\n1,Q,a,b\n")
    assert refusal(source).startswith(" has no column index: multiple choice questions are a table with tabs")
    path.write_text("index\tquestion\tanswer\n1\tQ\tx\n")
    assert refusal(source).startswith(" has no column A")
    path.write_text('index\tquestion\tA\tB\n1\tQ\ta\tb\n2\t"Q\ta\tb\n')
    assert refusal(source).startswith(" is damaged or not a table with tabs, at line 3")
    path.write_text("index\tquestion\tA\tB\n1\tQ\ta\n")
    assert refusal(source) == ", line 2: has 3 cells, and the header 4"
    path.write_text("index\tquestion\tA\tB\n")
    with pytest.raises(ValueError, match=r"questions\.tsv has no usable row"):
        open_table(source, tmp_path / "tables", on_bad_data="skip")
    path.write_bytes(b"index\tquestion\tA\tB\n1\t\xff\ta\tb\n")
    assert " is damaged or not a table with tabs" in refusal(source)


CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), min_size=1, max_size=20)


@given(st.lists(CELL, min_size=2, max_size=5), CELL.filter(str.strip), CELL.map(str.strip))
def test_any_text_survives(tmp_path_factory, options, question, hint):
    row = {"index": "1", "question": question, "hint": hint, "answer": "A"} | dict(zip("ABCDE", options, strict=False))
    (example,) = read(table(tmp_path_factory.mktemp("choices"), [row]))
    assert example.options == tuple(options)
    lettered = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCDE", options, strict=False))
    assert example.text == (f"{hint}\n" if hint else "") + f"{question}\n{lettered}"
