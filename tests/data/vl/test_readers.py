"""Every format of data files, laid out as published, gives the right examples."""

import json
from pathlib import Path

import easy_vqa
import pytest

from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import Example, stem
from dora_mm.data.vl.readers import read_source
from dora_mm.data.vl.readers.commonsense import named_option
from dora_mm.data.vl.readers.video import split_subtitles, video_text
from dora_mm.data.vl.rows import BadRows
from tests.shared.data import vl_files as files
from tests.shared.data.text_rows import question


def read(source: SourceConfig) -> list[Example]:
    return list(read_source(source, BadRows("stop")))


def test_vqa_v2(tmp_path):
    rows = read(files.vqa_v2(tmp_path))
    assert [row.id for row in rows] == ["42000", "42001", "42002", "42003"]
    assert rows[2] == Example(
        id="42002",
        images=("COCO_val2014_000000000043.jpg",),
        text="What is 2?",
        answers=("net", "mesh"),
        scores=(1.0, 0.3),
        raw_answers=("net",) * 9 + ("mesh",),
        kinds=("other", "what is"),
    )
    assert stem(rows[2].images[0]) == "COCO_val2014_000000000043"


def test_vqa_v2_pairs_questions_and_annotations_by_id(tmp_path):
    annotations = [files.vqa_annotation(number, (f"a{number}",) * 10) for number in (3, 0, 2, 1)]
    rows = read(files.vqa_v2(tmp_path, annotations=annotations))
    assert [(row.id, row.answers) for row in rows] == [(f"4200{number}", (f"a{number}",)) for number in range(4)]


@pytest.mark.parametrize(
    ("name", "stated", "images"),
    [
        ("v2_OpenEnded_mscoco_train2014_questions.json", None, "COCO_train2014_000000000042.jpg"),
        ("v2_OpenEnded_mscoco_test-dev2015_questions.json", "test-dev2015", "COCO_test2015_000000000042.jpg"),
        ("mine.json", "val2014", "COCO_val2014_000000000042.jpg"),
    ],
)
def test_vqa_v2_without_answers_and_the_names_of_its_images(tmp_path, name, stated, images):
    content = {"questions": [files.vqa_question(0)]} | ({"data_subtype": stated} if stated else {})
    rows = read(SourceConfig(format="vqa_v2", file=str(files.write_json(tmp_path / name, content))))
    assert rows == [Example("42000", (images,), "What is 0?")]


def test_vqa_karpathy(tmp_path):
    rows = [
        {
            "answer_type": "other",
            "img_id": "COCO_train2014_000000458752",
            "label": {"net": 1, "mesh": 0.3, "rope": 0},
            "question_id": 458752000,
            "question_type": "what is this",
            "sent": "What is this photo taken looking through?",
        },
        {"img_id": "COCO_val2014_000000000042.png", "question_id": "x1", "sent": "Why?", "label": {}},
        {"img_id": "a", "question_id": 1, "sent": "Who?", "answers": files.vqa_annotation(0)["answers"]},
    ]
    source = SourceConfig(format="vqa_karpathy", file=str(files.write_json(tmp_path / "karpathy_train.json", rows)))
    assert read(source) == [
        Example(
            id="458752000",
            images=("COCO_train2014_000000458752.jpg",),
            text="What is this photo taken looking through?",
            answers=("net", "mesh"),
            scores=(1.0, 0.3),
            kinds=("other", "what is this"),
        ),
        Example("x1", ("COCO_val2014_000000000042.png",), "Why?"),
        Example("1", ("a.jpg",), "Who?", raw_answers=("net",) * 9 + ("mesh",)),
    ]


def test_vqa_karpathy_with_the_official_annotations(tmp_path):
    """Which have more questions, in another order, and those without a label."""
    label = {"net": 1, "mesh": 0.3}
    names = ("COCO_val2014_000000000042", "COCO_val2014_000000000043.jpg")
    rows = [
        {"img_id": names[0], "question_id": 42001, "sent": "Why?", "label": label, "question_type": "why"},
        {"img_id": names[1], "question_id": 42002, "sent": "Who?", "label": {}},
    ]
    annotations = [files.vqa_annotation(number, (f"a{number}",) * 10) for number in (3, 2, 0, 1)]
    source = SourceConfig(
        format="vqa_karpathy",
        file=str(files.write_json(tmp_path / "karpathy_val.json", rows)),
        annotations=str(files.write_json(tmp_path / "annotations.json", {"annotations": annotations})),
    )
    kinds = ("other", "what is")
    assert read(source) == [
        Example("42001", (f"{names[0]}.jpg",), "Why?", ("net", "mesh"), (1.0, 0.3), ("a1",) * 10, kinds),
        Example("42002", (names[1],), "Who?", (), (), ("a2",) * 10, kinds),
    ]


@pytest.mark.parametrize(("split", "count"), [("train", 38575), ("test", 9673)])
def test_easy_vqa_from_its_package(split, count):
    folder = Path(easy_vqa.__file__).parent / "data"
    rows = read(SourceConfig(format="easy_vqa", file=str(folder / split / "questions.json")))
    assert len(rows) == count
    assert len({row.id for row in rows}) == count
    assert {row.answers[0] for row in rows} == set((folder / "answers.txt").read_text().split())
    assert len({row.answers[0] for row in rows}) == 13
    assert {row.images[0] for row in rows} == {path.name for path in (folder / split / "images").iterdir()}
    if split == "train":
        assert rows[1] == Example("1", ("0.png",), "what color is the shape?", ("blue",), (1.0,))


def test_gqa(tmp_path):
    unanswered = {"9": {"imageId": "1", "question": "Who?"}}
    path = files.write_json(tmp_path / "val_balanced_questions.json", files.GQA | unanswered)
    assert read(SourceConfig(format="gqa", file=str(path))) == [
        Example("02930152", ("2354786.jpg",), "Is the sky dark?", ("yes",), (1.0,), kinds=("verify", "attr")),
        Example("07333408", ("n375429.jpg",), "What is on the white wall?", ("pipe",), (1.0,), kinds=("query", "rel")),
        Example("9", ("1.jpg",), "Who?"),
    ]


def test_gqa_vlt5(tmp_path):
    rows = [
        {"img_id": "2375429", "label": {"pipe": 1.0}, "question_id": "07333408", "sent": "What is on the wall?"},
        {"img_id": "n1", "question_id": "2", "sent": "Who?"},
    ]
    path = files.write_json(tmp_path / "testdev.json", rows)
    assert read(SourceConfig(format="gqa_vlt5", file=str(path))) == [
        Example("07333408", ("2375429.jpg",), "What is on the wall?", ("pipe",), (1.0,)),
        Example("2", ("n1.jpg",), "Who?"),
    ]


def test_nlvr2(tmp_path):
    unanswered = {"identifier": "test2-1-0-0", "sentence": "Is it?"}
    path = files.write_lines(tmp_path / "dev.json", [*files.NLVR2, unanswered])
    first, second, third = read(SourceConfig(format="nlvr2", file=str(path)))
    assert first == Example(
        "train-850-0-0",
        ("train-850-0-img0.png", "train-850-0-img1.png"),
        "One image shows exactly two brown acorns.",
        ("true",),
        (1.0,),
    )
    assert (second.images, second.answers) == (("dev-12-3-img0.png", "dev-12-3-img1.png"), ("false",))
    assert third.answers == ()


def test_nlvr2_vlt5(tmp_path):
    pair = {"img0": "train-10171-0-img0", "img1": "train-10171-0-img1", "sent": "A case."}
    rows = [
        {"identifier": f"train-10171-0-{label}", "label": label, "uid": f"nlvr2_train_{label}"} | pair
        for label in (0, 1)
    ]
    path = files.write_json(tmp_path / "train.json", rows)
    found = read(SourceConfig(format="nlvr2_vlt5", file=str(path)))
    images = ("train-10171-0-img0.png", "train-10171-0-img1.png")
    assert found == [
        Example("train-10171-0-0", images, "A case.", ("false",), (1.0,)),
        Example("train-10171-0-1", images, "A case.", ("true",), (1.0,)),
    ]


def test_coco_captions(tmp_path):
    path = files.write_json(tmp_path / "captions_train2014.json", files.CAPTIONS)
    assert read(SourceConfig(format="coco_captions", file=str(path))) == [
        Example("57870", ("COCO_train2014_000000057870.jpg",), "", ("A table in a restaurant.",), (1.0,)),
        Example(
            "384029",
            ("COCO_train2014_000000384029.jpg",),
            "",
            ("A kitchen with a stove.", "A stove in a kitchen."),
            (1.0, 1.0),
        ),
    ]


@pytest.mark.parametrize(("split", "ids"), [("train", ["60623", "522418"]), ("val", ["184613"]), ("test", ["391895"])])
def test_coco_karpathy(tmp_path, split, ids):
    path = files.write_json(tmp_path / "dataset_coco.json", files.KARPATHY)
    rows = read(SourceConfig(format="coco_karpathy", file=str(path), split=split))
    assert [row.id for row in rows] == ids  # restval counts as train
    if split == "val":
        assert rows == [Example("184613", ("COCO_val2014_000000184613.jpg",), "", ("A val 184613.",), (1.0,))]


def test_video_questions(tmp_path):
    four = {key: value for key, value in files.TVQA[0].items() if key not in ("a4", "answer_idx")}
    path = files.write_lines(tmp_path / "tvqa_train.jsonl", [*files.TVQA, four | {"qid": "h1", "ts": [1.5, 2.0]}])
    subtitles = files.write_lines(tmp_path / "tv_subtitles.jsonl", files.SUBTITLES)
    first, second = read(SourceConfig(format="video_qa", file=str(path), subtitles=str(subtitles)))
    assert split_subtitles(first.text) == (
        "[Subs] Monica : Hi, you. Joey: Hey!",
        "[Q] What is Joey holding? [TS] (76.01-84.2) "
        "[Choices] a0: A cup. a1: A hat. a2: A book. a3: A dog. a4: Nothing.",
    )
    assert (first.id, first.images, first.answers) == ("122039", ("friends_s01e03_seg02_clip_19",), ("a2",))
    assert second.answers == ()
    assert second.text.endswith("[TS] ([1.5, 2.0]) [Choices] a0: A cup. a1: A hat. a2: A book. a3: A dog.")
    (without_subtitles, _) = read(SourceConfig(format="video_qa", file=str(path)))
    assert split_subtitles(without_subtitles.text) == ("", split_subtitles(first.text)[1])


def test_video_captions(tmp_path):
    path = files.write_lines(tmp_path / "tvc_train.jsonl", files.TVC)
    subtitles = files.write_lines(tmp_path / "tv_subtitles.jsonl", files.SUBTITLES)
    first, second = read(SourceConfig(format="video_captions", file=str(path), subtitles=str(subtitles)))
    assert (first.id, first.images) == ("87613", ("friends_s01e03_seg02_clip_19",))
    assert split_subtitles(first.text) == ("[Subs] Monica : Hi, you. Joey: Hey!", "[TS] ([12.1, 20.5])")
    assert (first.answers, first.scores, first.kinds) == (("Joey waves.", "They talk."), (1.0, 1.0), ("v", "vt"))
    assert (split_subtitles(second.text), second.answers) == (("[Subs]", "[TS] ([0, 3.5])"), ())


def test_subtitles_are_separated_from_the_rest_whatever_they_contain():
    subtitles = "[Q] \n who? \r\n [TS] \u2028 (a)\tb"
    assert split_subtitles(video_text(subtitles, " why?\n ")) == ("[Subs] [Q] who? [TS] (a) b", "why?")
    assert split_subtitles(video_text(None, "why?")) == ("", "why?")


def test_text_beyond_ascii_is_kept(tmp_path):
    text = 'Est-ce "déjà" 日本 \U0001f436?'
    source = files.vqa_v2(tmp_path, [files.vqa_question(0, question=text)], [files.vqa_annotation(0)])
    assert read(source)[0].text == text
    path = tmp_path / "dev.json"
    path.write_text(json.dumps(files.NLVR2[0] | {"sentence": text}, ensure_ascii=False), encoding="utf-8")
    assert read(SourceConfig(format="nlvr2", file=str(path)))[0].text == text


# --- commonsense questions, in the layout of LLM-Adapters -------------------------------------------------------------


def read_texts(path, rows):
    return read(SourceConfig(format="commonsense", file=str(files.write_json(path / "rows.json", rows))))


def test_commonsense_rows_as_they_are_published(tmp_path):
    """Of winogrande, whose options stand in the line of the format, and of the others, where they do not."""
    asked = "Please choose: Sarah was better, so _ won.\n\nOption1: Sarah Option2: Maria Answer format: option1/option2"
    winogrande = {"instruction": asked, "input": "", "output": "the correct answer is option2", "answer": "option2"}
    words = "ending1/ending2/ending3/ending4"
    ending = {"output": "the correct answer is ending4", "answer": "ending4"}
    hellaswag = question(0, instruction=f"Complete it.\n\nAnswer format: {words}", **ending)
    said, options = ("the correct answer is option2",), ("option1", "option2")
    first, second = read_texts(tmp_path, [winogrande, hellaswag])
    assert first == Example("item 1", (), asked, said, (1.0,), options=options)
    assert second.options == tuple(words.split("/"))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"answer": None}, "answer is not valid"),
        ({"input": "some context"}, "has an input, which the published rows leave empty"),
        ({"instruction": "Is it?"}, "has no end of its instruction as in Answer format: answer1/answer2/answer3"),
        ({"instruction": "Is it? Answer format: A/B"}, "has no end of its instruction"),
        ({"answer": "yes"}, "has an answer that is not one of its options"),
        ({"output": "the correct answer is false"}, "has an output that does not name its answer first"),
    ],
)
def test_other_rows_than_commonsense_are_refused(changed, reason, tmp_path):
    with pytest.raises(ValueError, match=rf"rows\.json, item 2: {reason}"):
        read_texts(tmp_path, [question(0), question(0) | changed])


def test_other_layouts_than_commonsense_are_refused(tmp_path):
    alpaca = {name: text for name, text in question(0).items() if name != "answer"}
    with pytest.raises(ValueError, match=r"rows\.json, item 1: answer is missing"):
        read_texts(tmp_path, [alpaca])
    with pytest.raises(ValueError, match="it must contain a list"):
        read_texts(tmp_path, {"data": [question(0)]})
    with pytest.raises(ValueError, match="does not have the structure of this format's rows"):
        read_texts(tmp_path, ["a text"])


def test_the_first_word_for_an_option_counts():
    four = ("answer1", "answer2", "answer3", "answer4")
    assert named_option("not answer2 but answer1", four) == "answer2"
    assert named_option("answer5", four) == "answer5"  # as the official pattern, for rows of four options, too
    assert named_option("Answer1", four) is None
    assert named_option("it is untrue", ("true", "false")) == "true"
    assert named_option("", ("option1", "option2")) is None
