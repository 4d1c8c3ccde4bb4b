"""The official files of suites, laid out as published, give the right examples."""

import json
import pickle
from pathlib import Path

import pytest
from PIL import Image

from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.embedded import data_url
from dora_mm.data.vl.example import Example, Turn
from dora_mm.data.vl.readers import read_source
from dora_mm.data.vl.rows import BadRows
from dora_mm.data.vl.tables import open_table
from dora_mm.registries.vl_tasks import TASKS
from tests.shared.data import chats, suite_files
from tests.shared.data import vl_files as files


def read(suite: str, folder: Path, **settings) -> list[Example]:
    return list(read_source(suite_files.source(suite, folder, **settings), BadRows("stop")))


def test_documents_are_groups_of_their_pages(tmp_path):
    assert read("docvqa", tmp_path) == [
        Example(
            id="337",
            images=("documents/xnbl0037_1.png",),
            text="what is the date mentioned in this letter?",
            answers=("1/8/93", "1/8/1993"),
            scores=(1.0, 1.0),
            kinds=("handwritten", "form"),
            group="document 279",
        )
    ]
    (row,) = read("infographicvqa", tmp_path)
    assert (row.images, row.kinds, row.group) == (("30021.jpeg",), ("single span",), "")


def test_text_in_photographs(tmp_path):
    (row,) = read("stvqa", tmp_path)
    assert (row.images, row.answers, row.kinds) == (
        (suite_files.STVQA["file_path"],),
        ("2.99", "$2.99"),
        ("coco-text",),
    )
    (row,) = read("textvqa", tmp_path)
    assert row.images == ("003a8ae2ef43b901.jpg",)
    assert dict(zip(row.answers, row.scores, strict=True)) == {"nous les gosses": 1.0, "dakota": 1.0}
    assert row.raw_answers == tuple(suite_files.TEXTVQA["answers"])
    first, second = read("ocrbench", tmp_path)
    assert (first.id, first.kinds) == ("0", ("Regular Text Recognition", "IIIT5K"))
    assert (second.id, second.answers, second.kinds[1]) == ("1", ("x ^ { 2 }",), "HME100k")


def test_charts(tmp_path):
    assert read("chartqa", tmp_path) == [
        Example("human_0", ("41699051005347.png",), "How many food items?", ("14",), (1.0,), kinds=("human",))
    ]
    (row,) = read("plotqa", tmp_path)
    assert (row.id, row.images, row.answers, row.kinds) == ("11", ("7.png",), ("28.9",), ("data_retrieval",))


def test_questions_of_mmmu_have_options_or_words(tmp_path):
    choice, words, unknown = read("mmmu", tmp_path)
    assert choice.text == "What is <image 1>?\nA. a fresco\nB. it's an oil"
    assert (choice.answers, choice.options, choice.kinds) == (("B",), ("a fresco", "it's an oil"), ("Art_Theory",))
    assert choice.images == (chats.data_url(chats.image("red")),)
    assert (words.answers, words.options, len(words.images)) == (("4", "four"), (), 2)
    assert unknown.answers == ()


def test_scienceqa_and_ai2d(tmp_path):
    assert read("scienceqa", tmp_path, split="test") == [
        Example(
            id="1",
            images=("test/1/image.png",),
            text="Which of these states is farthest north?\nA. West Virginia\nB. Louisiana",
            answers=("A",),
            scores=(1.0,),
            kinds=("social science", "image", "grade2"),
            options=("West Virginia", "Louisiana"),
        )
    ]
    assert read("scienceqa", tmp_path)[1].text == "Read.\nWhich is right?\nA. a\nB. b"
    with pytest.raises(ValueError, match="has no rows of the split 'val': it has test, train"):
        read("scienceqa", tmp_path, split="val")
    (row,) = read("ai2d", tmp_path)
    assert (row.id, row.answers, row.options) == ("0", ("C",), ("a", "b", "c"))


def test_aokvqa_asks_with_choices_and_directly(tmp_path):
    (row,) = read("aokvqa", tmp_path)
    assert (row.images, row.answers, row.raw_answers) == (("000000461751.jpg",), ("D",), ())
    (row,) = read("aokvqa_direct", tmp_path)
    assert (row.answers, row.options) == (("cigarette", "stick"), ())
    assert row.raw_answers == ("cigarette",) * 9 + ("Stick",)
    hard = [suite_files.AOKVQA | {"difficult_direct_answer": True}, suite_files.AOKVQA | {"question_id": "x"}]
    path = files.write_json(tmp_path / "hard.json", hard)
    rows = read_source(SourceConfig(format="aokvqa_direct", file=str(path)), BadRows("stop"))
    assert [row.id for row in rows] == ["x"]


def test_pope_and_refcoco(tmp_path):
    assert read("pope", tmp_path) == [
        Example(
            "1", ("COCO_val2014_000000310196.jpg",), "Is there a snowboard?", ("yes",), (1.0,), kinds=("adversarial",)
        )
    ]
    (row,) = read("refcoco", tmp_path)
    assert row.answers == ("[0.241, 0.467, 0.556, 0.745]",)
    about = json.loads(row.boxes)
    assert (about["bbox"], about["size"]) == ([suite_files.REFCOCO["bbox"]], [428, 640])


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_the_official_refs_of_refcoco(tmp_path, protocol):
    source = suite_files.refs(tmp_path, protocol=protocol)
    rows = list(read_source(source, BadRows("stop")))
    assert [row.text for row in rows] == ["the lady", "lady with the blue shirt"] * 2
    (first, second) = read_source(source.model_copy(update={"split": "testA"}), BadRows("stop"))
    assert [first.id, second.id] == ["2", "3"]
    (same,) = read("refcoco", tmp_path)
    assert (second.text, second.answers, json.loads(second.boxes)) == (
        "lady with the blue shirt",
        same.answers,
        json.loads(same.boxes),
    )
    assert second.images == ("COCO_train2014_000000581857.jpg",)
    with pytest.raises(ValueError, match=r"refs\(unc\).p has no rows of the split 'val': it has testA, train"):
        list(read_source(source.model_copy(update={"split": "val"}), BadRows("stop")))


class Planted:
    """Would create a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", range(6))
def test_no_code_of_a_pickle_file_runs(tmp_path, protocol):
    planted = tmp_path / "planted"
    source = suite_files.refs(tmp_path, [*suite_files.REFS, Planted(planted)], protocol)
    with pytest.raises(ValueError, match="holds other things than lists, dicts, texts and numbers"):
        list(read_source(source, BadRows("skip")))
    assert not planted.exists()
    pickle.loads(source.path.read_bytes())
    assert planted.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ann_id": 9}, "item 1.*: has an image or a box that is not in instances.json"),
        ({"sentences": "the lady"}, "item 1.*: sentence is not valid"),
    ],
)
def test_refs_that_cannot_be_used_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=rf"refs\(unc\).p, {message}"):
        list(read_source(suite_files.refs(tmp_path, [suite_files.REFS[0] | change]), BadRows("stop")))
    bad = BadRows("skip")
    assert len(list(read_source(suite_files.refs(tmp_path, [suite_files.REFS[0] | change, suite_files.REFS[1]]), bad)))


@pytest.mark.parametrize("content", [b"", b"\x80\x02]q\x00(K\x01", b"L9\n", b"h\x05.", b"<html>"])
def test_a_damaged_pickle_file_is_named(tmp_path, content):
    source = suite_files.refs(tmp_path)
    source.path.write_bytes(content)
    with pytest.raises(ValueError, match=r"refs\(unc\).p: (is damaged|holds other things)"):
        list(read_source(source, BadRows("stop")))


def test_the_diagrams_of_ai2d_have_letters_where_options_are_letters(tmp_path):
    lettered, plain = read_source(suite_files.ai2d_questions(tmp_path), BadRows("stop"))
    assert (plain.id, lettered.id) == ("3.png-0", "10.png-0")
    assert (plain.images, plain.answers) == ((str(tmp_path / "images" / "3.png"),), ("C",))
    assert plain.text == "Which one is it?\nA. a\nB. b\nC. C\nD. d"
    assert (plain.group, lettered.group) == ("diagram 3.png", "diagram 10.png")
    assert plain.kinds != lettered.kinds
    source = suite_files.ai2d_questions(tmp_path)
    table = open_table(source, tmp_path / "tables", on_bad_data="stop")
    (drawn,) = (row for row in table if row.id == "10.png-0")
    image = Image.open(drawn.images[0]).convert("RGB")
    colours = {colour for _, colour in image.crop((20, 30, 80, 70)).getcolors(10_000)}
    assert {(255, 255, 255), (0, 0, 0)} <= colours
    assert (255, 0, 0) not in colours
    assert image.getpixel((10, 10)) == (255, 0, 0)
    for split, name in (("train", "3.png-0"), ("test", "10.png-0")):
        settings = {"split": split, "annotations": str(tmp_path / "ai2d_test_ids.csv")}
        assert [row.id for row in read_source(suite_files.ai2d_questions(tmp_path, **settings), BadRows("stop"))] == [
            name
        ]
    with pytest.raises(ValueError, match="split is train or test, with annotations"):
        list(read_source(suite_files.ai2d_questions(tmp_path, split="test"), BadRows("stop")))


def test_a_diagram_without_its_letters_is_a_bad_row(tmp_path):
    source, bad = suite_files.ai2d_questions(tmp_path), BadRows("skip")
    (tmp_path / "annotations" / "10.png.json").unlink()
    assert [row.id for row in read_source(source, bad)] == ["3.png-0"]
    assert list(bad.found) == ["has letters in its diagram, whose image or annotations cannot be read"]


def test_images_stand_where_a_question_of_mmmu_names_them(tmp_path):
    """Out of order, twice, in options; those that are not named come first."""
    names = [f"image_{number}" for number in (1, 2, 3)]
    images = {name: suite_files.image(colour) for name, colour in zip(names, ("red", "green", "blue"), strict=True)}
    row = {"id": "validation_Art_1", "question": "Is <image 3> like <image 1>?", "options": "['<image 3>', 'no']"}
    path = suite_files.parquet(tmp_path / "a.parquet", [row | images | {"answer": "A"}])
    (found,) = read_source(SourceConfig(format="mmmu", file=str(path)), BadRows("stop"))
    asked = "<image>Is <image> like <image>?\nA. <image>\nB. no"
    assert found.turns == (Turn("user", asked, False), Turn("assistant", "A", True))
    red, green, blue = (data_url(images[name]["bytes"]) for name in names)
    assert found.images == (green, blue, red, blue)
    assert (found.text, found.answers) == ("Is <image 3> like <image 1>?\nA. <image 3>\nB. no", ("A",))
    suite_files.parquet(path, [row | images | {"answer": "A", "question": "What is <image 4>?"}])
    with pytest.raises(ValueError, match="row 1.*: names an image by a number that it does not have"):
        list(read_source(SourceConfig(format="mmmu", file=str(path)), BadRows("stop")))


def test_images_of_vlmevalkits_tables_stand_where_they_are_named(tmp_path):
    path = files.write_text(
        tmp_path / "MMMU_DEV_VAL.tsv",
        "index\timage_path\tquestion\tA\tB\tanswer\n1\t['a.jpg', 'b.jpg']\t<image 2> or <image 1>?\tx\ty\tB\n",
    )
    (row,) = read_source(SourceConfig(format="choices", file=str(path)), BadRows("stop"))
    assert (row.images, row.turns[0].text) == (("b.jpg", "a.jpg"), "<image> or <image>?\nA. x\nB. y")


def test_vlmevalkit_tables_with_answers_in_words(tmp_path):
    path = tmp_path / "TextVQA_VAL.tsv"
    ten = str(["nokia"] * 9 + ["Nokia"])
    lines = ["index\timage_path\tquestion\tanswer\tsplit\tA\tB"]
    lines += [f"1\ta.jpg\tWhat?\t{ten}\tval\t\t", "2\tb.jpg\tWhich?\tno list\tval\t\t", "3\tc.jpg\tWho?\tA\ttest\tx\ty"]
    files.write_text(path, "\n".join(lines) + "\n")
    ten_answers, one, choice = read_source(SourceConfig(format="answers", file=str(path)), BadRows("stop"))
    assert (ten_answers.answers, ten_answers.raw_answers) == (("nokia",) * 9 + ("Nokia",),) * 2
    assert (one.images, one.answers, one.raw_answers, one.kinds) == (("b.jpg",), ("no list",), (), ("val",))
    assert (choice.answers, choice.options) == (("A",), ("x", "y"))


@pytest.mark.parametrize(
    ("suite", "change", "message"),
    [
        ("docvqa", {"image": None}, "image is not valid"),
        ("textvqa", {"answers": ["a"]}, "must have exactly ten answers"),
    ],
)
def test_bad_rows_of_official_files_are_named(tmp_path, suite, change, message):
    rows = {"docvqa": suite_files.DOCVQA, "textvqa": suite_files.TEXTVQA}
    path = files.write_json(tmp_path / "bad.json", {"data": [rows[suite] | change]})
    with pytest.raises(ValueError, match=rf"bad.json, item 1.*: {message}"):
        list(read_source(SourceConfig(format=suite, file=str(path)), BadRows("stop")))


def test_a_box_has_to_be_inside_of_its_image(tmp_path):
    path = files.write_lines(tmp_path / "boxes.jsonl", [suite_files.REFCOCO | {"bbox": [1.0, 2.0, 500.0, 4.0]}])
    with pytest.raises(ValueError, match="line 1: has a bbox that is no box"):
        list(read_source(SourceConfig(format="refcoco", file=str(path)), BadRows("stop")))


@pytest.mark.parametrize("suite", suite_files.MAKERS)
def test_official_files_become_tables_to_train_on(tmp_path, suite):
    source = suite_files.source(suite, tmp_path)
    assert source.format in TASKS[suite].formats
    table = open_table(source, tmp_path / "tables", on_bad_data="stop", check_images=False)
    rows = list(read_source(source, BadRows("stop")))
    assert [row.group for row in table] == [row.group for row in rows]
    assert len(table.answered()) > 0
