"""Bad rows: "stop" raises one sentence with file and place, "skip" skips, counts and names all of them."""

import json
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.readers import read_source
from dora_mm.data.vl.readers.video import split_subtitles
from dora_mm.data.vl.rows import BadRows
from dora_mm.data.vl.tables import open_table
from tests.shared.data import chats
from tests.shared.data import vl_files as files
from tests.shared.data.text_rows import question

TEN = ("net",) * 10


def message_of(source: SourceConfig) -> str:
    """The error with on_bad_data "stop"."""
    with pytest.raises(ValueError, match=r"\S") as caught:
        list(read_source(source, BadRows("stop")))
    message = str(caught.value)
    assert "\n" not in message
    return message


def skipped_rows(source: SourceConfig) -> tuple[list[str], dict[str, list[str]]]:
    """The ids of the good rows, and the places of the others by reason, without their folder."""
    bad = BadRows("skip")
    rows = [row.id for row in read_source(source, bad)]
    folder = str(Path(source.file).parent) + "/"
    return rows, {
        reason.replace(folder, ""): [place.removeprefix(folder) for place in places]
        for reason, places in bad.found.items()
    }


def with_bad_row(tmp_path, form: str, row: dict) -> SourceConfig:
    """A source of this format with one good row, followed by this one."""
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
        ("vqa_karpathy", {"question_id": 2, "label": {"he": 1.5}}, "label is not valid in this format"),
        ("vqa_karpathy", {"question_id": 2, "label": ["he"]}, "label is not valid in this format"),
        ("vqa_karpathy", {"question_id": 2, "sent": ""}, "sent is not valid in this format"),
        ("vqa_karpathy", {"question_id": 2, "answers": [{"answer": "x"}] * 9}, "must have exactly ten answers"),
        ("vqa_karpathy", {}, "has a duplicate id"),
        ("gqa", {"imageId": "1", "question": "Who?", "answer": 3}, "answer is not valid in this format"),
        ("gqa", {"question": "Who?"}, "imageId is missing"),
        ("gqa", "Who?", "does not have the structure of this format's rows"),
        ("gqa_vlt5", {"question_id": "2", "label": "he"}, "label is not valid in this format"),
        ("gqa_vlt5", {"question_id": "2", "img_id": 7}, "img_id is not valid in this format"),
        ("nlvr2", {"identifier": "dev-1-0-0", "label": "true"}, "label is not valid in this format"),
        ("nlvr2", {"identifier": "alone"}, "has an identifier that does not name a pair of images"),
        ("nlvr2_vlt5", {"identifier": "a-1-0-1", "label": 2}, "label is not valid in this format"),
        ("coco_karpathy", {"split": "restvol"}, "split is not valid in this format"),
        ("coco_karpathy", {"sentences": []}, "has no caption"),
        ("coco_karpathy", {"sentences": [{"raw": " \n"}]}, "sentences is not valid in this format"),
        ("video_qa", {"qid": 2, "answer_idx": 5}, "has an answer_idx that is not the index of a choice"),
        ("video_qa", {"qid": 2, "answer_idx": "2"}, "answer_idx is not valid in this format"),
        ("video_qa", {}, "has a duplicate id"),
        ("video_captions", {"clip_id": 2, "descs": []}, "descs is not valid in this format"),
        ("video_captions", {"clip_id": 2, "descs": [{}]}, "desc is missing"),
    ],
)
def test_rows_that_do_not_fit_their_format(tmp_path, form, row, reason):
    source = with_bad_row(tmp_path, form, row)
    message = message_of(source)
    place = "id '2'" if form == "gqa" else "line 2" if form in ("nlvr2", "video_qa", "video_captions") else "item 2"
    assert message.startswith(f"{source.file}, {place}")
    assert f": {reason}" in message
    ids, found = skipped_rows(source)
    assert len(ids) == 1
    ((found_reason, places),) = found.items()
    assert found_reason.startswith(reason)
    assert len(places) == 1
    assert places[0].startswith(f"file.json, {place}")


def test_a_missing_key_is_named(tmp_path):
    rows = [files.GQA["02930152"]]
    path = files.write_json(tmp_path / "train.json", rows)
    assert message_of(SourceConfig(format="gqa_vlt5", file=str(path))) == f"{path}, item 1: question_id is missing"


@pytest.mark.parametrize("count", [0, 9, 11])
def test_the_number_of_answers_must_be_ten(tmp_path, count):
    annotations = [files.vqa_annotation(0), files.vqa_annotation(1) | {"answers": [{"answer": "a"}] * count}]
    source = files.vqa_v2(tmp_path, [files.vqa_question(0), files.vqa_question(1)], annotations)
    assert message_of(source) == f"{source.annotations}, item 2 (question_id 42001): must have exactly ten answers"
    assert skipped_rows(source) == (
        ["42000"],
        {
            "must have exactly ten answers": ["v2_mscoco_val2014_annotations.json, item 2 (question_id 42001)"],
            "has no usable annotation in v2_mscoco_val2014_annotations.json": [
                "v2_OpenEnded_mscoco_val2014_questions.json, item 2 (question_id 42001)"
            ],
        },
    )


def test_questions_and_annotations_must_correspond_one_to_one(tmp_path):
    questions = [files.vqa_question(number) for number in (0, 1, 2)]
    annotations = [files.vqa_annotation(number) for number in (3, 0, 2, 4)]
    source = files.vqa_v2(tmp_path, questions, annotations)
    assert message_of(source) == (
        f"{source.file}, item 2 (question_id 42001): has no usable annotation in {source.annotations}"
    )
    assert message_of(files.vqa_v2(tmp_path, questions[:1] + questions[2:], annotations)) == (
        f"{source.annotations}, question_id 42003: has no usable question in {source.file}"
    )
    ids, found = skipped_rows(files.vqa_v2(tmp_path, questions, annotations))
    assert ids == ["42000", "42002"]
    assert [len(places) for places in found.values()] == [1, 2]


def test_an_annotation_of_another_image(tmp_path):
    source = files.vqa_v2(tmp_path, [files.vqa_question(0)], [files.vqa_annotation(0, image_id=7)])
    assert "has another image_id than its annotation" in message_of(source)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"img_id": "COCO_val2014_000000000041"}, "has another image_id than its annotation"),
        ({"img_id": "x"}, "has an img_id without a number"),
        ({"question_id": 7}, "has no usable annotation"),
    ],
)
def test_a_karpathy_row_that_does_not_fit_its_annotation(tmp_path, changes, reason):
    row = {"img_id": "COCO_val2014_000000000042", "question_id": 42000, "sent": "Why?", "label": {}} | changes
    annotations = files.write_json(tmp_path / "annotations.json", {"annotations": [files.vqa_annotation(0)]})
    file = files.write_json(tmp_path / "karpathy_val.json", [row])
    source = SourceConfig(format="vqa_karpathy", file=str(file), annotations=str(annotations))
    assert message_of(source).startswith(f"{file}, item 1")
    assert reason in message_of(source)


def test_duplicate_ids(tmp_path):
    duplicate = files.vqa_v2(tmp_path, [files.vqa_question(0)] * 2, [files.vqa_annotation(0), files.vqa_annotation(1)])
    assert "has no usable annotation" in message_of(duplicate)
    ids, found = skipped_rows(files.vqa_v2(tmp_path, [files.vqa_question(0)], [files.vqa_annotation(0)] * 2))
    assert ids == ["42000"]
    assert found == {"has a duplicate id": ["v2_mscoco_val2014_annotations.json, item 2 (question_id 42000)"]}
    path = tmp_path / "duplicate.json"
    path.write_text('{"1": %s, "1": %s}' % ((json.dumps(files.GQA["07333408"]),) * 2))
    assert message_of(SourceConfig(format="gqa", file=str(path))) == f"{path}, id '1': has a duplicate id"


def test_captions_and_images_must_correspond(tmp_path):
    content = files.CAPTIONS | {"images": files.CAPTIONS["images"][:1]}
    source = SourceConfig(format="coco_captions", file=str(files.write_json(tmp_path / "captions.json", content)))
    assert message_of(source) == (f"{source.file}, item 1 (id 1): is a caption of an image_id that no usable image has")
    assert skipped_rows(source)[0] == ["57870"]
    content = files.CAPTIONS | {"annotations": files.CAPTIONS["annotations"][1:2]}
    files.write_json(tmp_path / "captions.json", content)
    assert message_of(source) == f"{source.file}, image id 384029: has no usable caption"
    files.write_json(tmp_path / "captions.json", {"images": files.CAPTIONS["images"]})
    assert "has no rows: it must contain an object with a list 'annotations'" in message_of(source)


def test_a_split_that_karpathys_file_does_not_have(tmp_path):
    path = files.write_json(tmp_path / "dataset_coco.json", files.KARPATHY)
    message = message_of(SourceConfig(format="coco_karpathy", file=str(path), split="valid"))
    assert message.startswith(f"{path} has the splits train")
    assert "split 'valid' does not exist" in message


def test_a_clip_without_subtitles(tmp_path):
    path = files.write_lines(tmp_path / "tvc.jsonl", files.TVC)
    subtitles = files.write_lines(tmp_path / "subtitles.jsonl", [*files.SUBTITLES[:1], "not an object"])
    source = SourceConfig(format="video_captions", file=str(path), subtitles=str(subtitles))
    assert message_of(source).startswith(f"{subtitles}, line 2: does not have the structure of this format's rows")
    assert skipped_rows(source)[0] == ["87613", "87614"]


def test_a_clip_without_subtitles_has_empty_ones_and_is_counted(tmp_path, caplog):
    """As some clips of How2QA have none; but none at all is a wrong file."""
    rows = [files.TVQA[0] | {"qid": number, "vid_name": f"clip{number}"} for number in range(3)]
    path = files.write_lines(tmp_path / "how2qa.jsonl", rows)
    subtitles = files.write_lines(tmp_path / "subtitles.jsonl", [files.SUBTITLES[0] | {"vid_name": "clip1"}])
    source = SourceConfig(format="video_qa", file=str(path), subtitles=str(subtitles))
    texts = [split_subtitles(row.text)[0] for row in read_source(source, BadRows("stop"))]
    assert texts == ["[Subs]", "[Subs] Monica : Hi, you. Joey: Hey!", "[Subs]"]
    assert f"{path}: 2 of 3 clips have no subtitles in {subtitles}, so theirs are empty (one is clip0)" in caplog.text

    caplog.clear()
    assert len(open_table(source.model_copy(update={"limit": 1}), tmp_path / "tables", on_bad_data="stop")) == 1
    assert "1 of 1 clips have no subtitles" in caplog.text

    files.write_lines(subtitles, files.SUBTITLES)
    assert message_of(source).startswith(f"{subtitles} has no subtitles of any clip in {path}")


def test_choices_with_a_gap(tmp_path):
    row = {key: value for key, value in files.TVQA[0].items() if key != "a2"}
    path = files.write_lines(tmp_path / "tvqa.jsonl", [row])
    assert "has a gap in its choices" in message_of(SourceConfig(format="video_qa", file=str(path)))


def test_a_vqa_file_that_does_not_name_the_split_of_its_images(tmp_path):
    path = files.write_json(tmp_path / "questions.json", {"questions": [files.vqa_question(0)]})
    assert message_of(SourceConfig(format="vqa_v2", file=str(path))).startswith(
        f"{path} does not name the COCO split of its images"
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
    "commonsense": [question(0), question(1)],
    "chat": [
        {"id": 1, "image": "a.jpg", "conversations": chats.said("<image>Q", "A")},
        {"conversations": chats.said("Q", "A", loss=None), "images": [chats.packed(chats.image())]},
    ],
}
INTACT = {
    form: b"".join(json.dumps(row).encode() + b"\n" for row in content)
    if form in ("nlvr2", "video_qa", "video_captions")
    else json.dumps(content).encode()
    for form, content in CONTENTS.items()
}
INTACT["choices"] = b'index\tquestion\tA\tB\tanswer\timage\n1\t"Q\nq"\ta\tb\tA\t2\n2\tQ\ta\tb\t\t' + (
    chats.packed(chats.image()).encode() + b"\n"
)
INSERTIONS = (
    st.binary(max_size=3)
    | st.sampled_from([c.encode() for c in string.punctuation + string.digits])
    | (st.sampled_from([b"null", b"-1", b"1e400", b'"\\ud800"', b"NaN", b"[]", b"9" * 30, b'"\\u0000"', b"true"]))
)


@st.composite
def damaged(draw):
    """A format, and a file of it that is truncated or changed somewhere."""
    form = draw(st.sampled_from(sorted(INTACT)))
    content = INTACT[form]
    start = draw(st.integers(0, len(content)))
    if draw(st.booleans()):
        return form, content[:start]
    return form, content[:start] + draw(INSERTIONS) + content[start + draw(st.integers(0, 3)) :]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


def outcome(source: SourceConfig, on_bad_data) -> tuple[list[Example], str]:
    """The rows, or the error message."""
    try:
        return list(read_source(source, BadRows(on_bad_data))), ""
    except ValueError as error:  # any other kind fails the test
        return [], f"{type(error).__name__}: {error}"


@settings(max_examples=500)
@given(damaged())
def test_a_damaged_file_gives_examples_or_one_sentence(folder, case):
    form, content = case
    path = folder / "file.json"
    path.write_bytes(content)
    source = SourceConfig(format=form, file=str(path), split="train" if form == "coco_karpathy" else None)
    stop_rows, stop_error = outcome(source, "stop")
    skip_rows, skip_error = outcome(source, "skip")
    for message in filter(None, (stop_error, skip_error)):
        assert message.startswith("ValueError: ")
        assert str(path) in message
    if skip_error:
        assert stop_error  # an error that cannot be skipped also stops
    if not stop_error:
        assert skip_rows == stop_rows
    for row in skip_rows:
        texts = (row.text, *row.answers, *row.kinds, *row.options, *(turn.text for turn in row.turns))
        " ".join((row.id, *row.images, *texts)).encode()  # no lone surrogates
