"""Bad rows: one sentence with file and place that stops, or all of them left out, counted and named."""

import json
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_mm.config.vl import SourceConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.readers import READERS
from dora_mm.data.vl.rows import BadRows
from tests.data.vl import files as files

TEN = ("net",) * 10


def stopped(source: SourceConfig) -> str:
    with pytest.raises(ValueError, match=r"\S") as caught:
        list(READERS[source.format](source, BadRows("stop")))
    message = str(caught.value)
    assert "\n" not in message
    return message


def left_out(source: SourceConfig) -> tuple[list[str], dict[str, list[str]]]:
    """Ids of the rows that stay, and the places of the others by reason, without their folder."""
    bad = BadRows("skip")
    rows = [row.id for row in READERS[source.format](source, bad)]
    folder = str(Path(source.file).parent) + "/"
    return rows, {
        reason.replace(folder, ""): [place.removeprefix(folder) for place in places]
        for reason, places in bad.found.items()
    }


def with_bad_row(tmp_path, form: str, row: dict) -> SourceConfig:
    """A source of this form with one good row, and then this one."""
    if form == "gqa":
        path = files.write_json(tmp_path / "file.json", {"1": files.GQA["02930152"], "2": row})
    elif form in ("nlvr2", "video_qa", "video_captions"):
        good = {"nlvr2": files.NLVR2, "video_qa": files.TVQA, "video_captions": files.TVC}[form][0]
        path = files.write_lines(tmp_path / "file.json", [good, good | row])
    elif form == "coco_karpathy":
        good = files.KARPATHY["images"][2]
        path = files.write_json(tmp_path / "file.json", {"images": [good, good | {"cocoid": 2} | row]})
        return SourceConfig(format=form, file=str(path), split="train")
    else:
        good = {
            "vqa_karpathy": {"img_id": "a", "question_id": 1, "sent": "Who?", "label": {"he": 1}},
            "gqa_vlt5": {"img_id": "a", "question_id": "1", "sent": "Who?", "label": {"he": 1.0}},
            "nlvr2_vlt5": {"identifier": "a-1-0-0", "img0": "a", "img1": "b", "sent": "It is.", "label": 1},
        }[form]
        path = files.write_json(tmp_path / "file.json", [good, good | row])
    return SourceConfig(format=form, file=str(path))


@pytest.mark.parametrize(
    ("form", "row", "reason"),
    [
        ("vqa_karpathy", {"question_id": 2, "label": {"he": 1.5}}, "label is not as this format has it"),
        ("vqa_karpathy", {"question_id": 2, "label": ["he"]}, "label is not as this format has it"),
        ("vqa_karpathy", {"question_id": 2, "sent": ""}, "sent is not as this format has it"),
        ("vqa_karpathy", {"question_id": 2, "answers": [{"answer": "x"}] * 9}, "has not exactly ten answers"),
        ("vqa_karpathy", {}, "its id was there before"),
        ("gqa", {"imageId": "1", "question": "Who?", "answer": 3}, "answer is not as this format has it"),
        ("gqa", {"question": "Who?"}, "imageId is missing"),
        ("gqa", "Who?", "has another form than this format's rows"),
        ("gqa_vlt5", {"question_id": "2", "label": "he"}, "label is not as this format has it"),
        ("gqa_vlt5", {"question_id": "2", "img_id": 7}, "img_id is not as this format has it"),
        ("nlvr2", {"identifier": "dev-1-0-0", "label": "true"}, "label is not as this format has it"),
        ("nlvr2", {"identifier": "alone"}, "its identifier does not name a pair of pictures, as dev-850-0-1 does"),
        ("nlvr2_vlt5", {"identifier": "a-1-0-1", "label": 2}, "label is not as this format has it"),
        ("coco_karpathy", {"split": "restvol"}, "split is not as this format has it"),
        ("coco_karpathy", {"sentences": []}, "has no caption"),
        ("coco_karpathy", {"sentences": [{"raw": " \n"}]}, "sentences is not as this format has it"),
        ("video_qa", {"qid": 2, "answer_idx": 5}, "answer_idx points at none of its choices"),
        ("video_qa", {"qid": 2, "answer_idx": "2"}, "answer_idx is not as this format has it"),
        ("video_qa", {}, "its id was there before"),
        ("video_captions", {"clip_id": 2, "descs": []}, "descs is not as this format has it"),
        ("video_captions", {"clip_id": 2, "descs": [{}]}, "desc is missing"),
    ],
)
def test_rows_outside_their_format(tmp_path, form, row, reason):
    source = with_bad_row(tmp_path, form, row)
    message = stopped(source)
    place = "id '2'" if form == "gqa" else "line 2" if form in ("nlvr2", "video_qa", "video_captions") else "item 2"
    assert message.startswith(f"{source.file}, {place}")
    assert f": {reason}" in message
    ids, found = left_out(source)
    assert len(ids) == 1
    ((said, places),) = found.items()
    assert said.startswith(reason)
    assert len(places) == 1
    assert places[0].startswith(f"file.json, {place}")


def test_a_key_that_is_missing_is_named(tmp_path):
    rows = [files.GQA["02930152"]]
    path = files.write_json(tmp_path / "train.json", rows)
    assert stopped(SourceConfig(format="gqa_vlt5", file=str(path))) == f"{path}, item 1: question_id is missing"


@pytest.mark.parametrize("count", [0, 9, 11])
def test_ten_answers_that_are_not_ten(tmp_path, count):
    annotations = [files.vqa_annotation(0), files.vqa_annotation(1) | {"answers": [{"answer": "a"}] * count}]
    source = files.vqa_v2(tmp_path, [files.vqa_question(0), files.vqa_question(1)], annotations)
    assert stopped(source) == f"{source.annotations}, item 2 (question_id 42001): has not exactly ten answers"
    assert left_out(source) == (
        ["42000"],
        {
            "has not exactly ten answers": ["v2_mscoco_val2014_annotations.json, item 2 (question_id 42001)"],
            "has no usable annotation in v2_mscoco_val2014_annotations.json": [
                "v2_OpenEnded_mscoco_val2014_questions.json, item 2 (question_id 42001)"
            ],
        },
    )


def test_questions_and_annotations_must_be_as_many(tmp_path):
    questions = [files.vqa_question(number) for number in (0, 1, 2)]
    annotations = [files.vqa_annotation(number) for number in (3, 0, 2, 4)]
    source = files.vqa_v2(tmp_path, questions, annotations)
    assert stopped(source) == (
        f"{source.file}, item 2 (question_id 42001): has no usable annotation in {source.annotations}"
    )
    assert stopped(files.vqa_v2(tmp_path, questions[:1] + questions[2:], annotations)) == (
        f"{source.annotations}, question_id 42003: has no usable question in {source.file}"
    )
    ids, found = left_out(files.vqa_v2(tmp_path, questions, annotations))
    assert ids == ["42000", "42002"]
    assert [len(places) for places in found.values()] == [1, 2]


def test_an_annotation_of_another_picture(tmp_path):
    source = files.vqa_v2(tmp_path, [files.vqa_question(0)], [files.vqa_annotation(0, image_id=7)])
    assert "is about another picture than its annotation" in stopped(source)


def test_ids_that_stand_there_twice(tmp_path):
    twice = files.vqa_v2(tmp_path, [files.vqa_question(0)] * 2, [files.vqa_annotation(0), files.vqa_annotation(1)])
    assert "has no usable annotation" in stopped(twice)
    ids, found = left_out(files.vqa_v2(tmp_path, [files.vqa_question(0)], [files.vqa_annotation(0)] * 2))
    assert ids == ["42000"]
    assert found == {"its id was there before": ["v2_mscoco_val2014_annotations.json, item 2 (question_id 42000)"]}
    path = tmp_path / "twice.json"
    path.write_text('{"1": %s, "1": %s}' % ((json.dumps(files.GQA["07333408"]),) * 2))
    assert stopped(SourceConfig(format="gqa", file=str(path))) == f"{path}, id '1': its id was there before"


def test_captions_and_pictures_must_fit(tmp_path):
    content = files.CAPTIONS | {"images": files.CAPTIONS["images"][:1]}
    source = SourceConfig(format="coco_captions", file=str(files.write_json(tmp_path / "captions.json", content)))
    assert stopped(source) == (f"{source.file}, item 1 (id 1): is a caption of an image_id that no usable picture has")
    assert left_out(source)[0] == ["57870"]
    content = files.CAPTIONS | {"annotations": files.CAPTIONS["annotations"][1:2]}
    files.write_json(tmp_path / "captions.json", content)
    assert stopped(source) == f"{source.file}, image id 384029: has no usable caption"
    files.write_json(tmp_path / "captions.json", {"images": files.CAPTIONS["images"]})
    assert "holds no rows: an object with a list 'annotations' is expected" in stopped(source)


def test_a_split_that_karpathys_file_does_not_have(tmp_path):
    path = files.write_json(tmp_path / "dataset_coco.json", files.KARPATHY)
    message = stopped(SourceConfig(format="coco_karpathy", file=str(path), split="valid"))
    assert message == f"{path} has the splits train (restval included), val and test: valid is none"


def test_a_clip_without_subtitles(tmp_path):
    path = files.write_lines(tmp_path / "tvc.jsonl", files.TVC)
    subtitles = files.write_lines(tmp_path / "subtitles.jsonl", [*files.SUBTITLES[:1], "no object"])
    source = SourceConfig(format="video_captions", file=str(path), subtitles=str(subtitles))
    assert stopped(source).startswith(f"{subtitles}, line 2: has another form than this format's rows")
    ids, found = left_out(source)
    assert ids == ["87613"]
    assert found["is about a clip that has no usable line among the subtitles"] == ["tvc.jsonl, line 2"]


def test_choices_with_a_gap(tmp_path):
    row = {key: value for key, value in files.TVQA[0].items() if key != "a2"}
    path = files.write_lines(tmp_path / "tvqa.jsonl", [row])
    assert "has a gap in its choices" in stopped(SourceConfig(format="video_qa", file=str(path)))


def test_a_vqa_file_that_does_not_say_of_what_pictures(tmp_path):
    path = files.write_json(tmp_path / "questions.json", {"questions": [files.vqa_question(0)]})
    assert stopped(SourceConfig(format="vqa_v2", file=str(path))).startswith(
        f"{path} does not say of which part of COCO its pictures are"
    )


CONTENTS = {
    "vqa_v2": {"data_subtype": "val2014", "questions": [files.vqa_question(number) for number in range(3)]},
    "easy_vqa": [["what is it?", "circle", 0], ["is it red?", "no", 1]],
    "gqa": files.GQA,
    "nlvr2": files.NLVR2,
    "coco_captions": files.CAPTIONS,
    "coco_karpathy": files.KARPATHY,
    "video_qa": files.TVQA,
    "video_captions": files.TVC,
}
WHOLE = {
    form: b"".join(json.dumps(row).encode() + b"\n" for row in content)
    if form in ("nlvr2", "video_qa", "video_captions")
    else json.dumps(content).encode()
    for form, content in CONTENTS.items()
}
PIECES = (
    st.binary(max_size=3)
    | st.sampled_from([c.encode() for c in string.punctuation + string.digits])
    | (st.sampled_from([b"null", b"-1", b"1e400", b'"\\ud800"', b"NaN", b"[]", b"9" * 30, b'"\\u0000"', b"true"]))
)


@st.composite
def damaged(draw):
    """A form, and a file of it that is cut off or changed somewhere."""
    form = draw(st.sampled_from(sorted(WHOLE)))
    whole = WHOLE[form]
    start = draw(st.integers(0, len(whole)))
    if draw(st.booleans()):
        return form, whole[:start]
    return form, whole[:start] + draw(PIECES) + whole[start + draw(st.integers(0, 3)) :]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


def outcome(source: SourceConfig, on_bad_data) -> tuple[list[Example], str]:
    """The rows, or else what the error says."""
    try:
        return list(READERS[source.format](source, BadRows(on_bad_data))), ""
    except ValueError as error:  # any other kind fails the test
        return [], f"{type(error).__name__}: {error}"


@settings(max_examples=500)
@given(damaged())
def test_a_damaged_file_gives_examples_or_one_sentence(folder, case):
    form, content = case
    path = folder / "file.json"
    path.write_bytes(content)
    source = SourceConfig(format=form, file=str(path), split="train" if form == "coco_karpathy" else None)
    stop, stopped_by = outcome(source, "stop")
    skip, refused_for = outcome(source, "skip")
    for message in filter(None, (stopped_by, refused_for)):
        assert message.startswith("ValueError: ")
        assert str(path) in message
    if refused_for:
        assert stopped_by  # what cannot be skipped stops
    if not stopped_by:
        assert skip == stop
    for row in skip:
        " ".join((row.id, row.text, *row.images, *row.answers, *row.kinds)).encode()  # no halves of characters
