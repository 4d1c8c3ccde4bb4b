"""Submission files, read as the official scripts read them."""

import json
from pathlib import Path

import pytest

from dora_mm.data.vl.example import Example
from dora_mm.eval.vl.metrics import score
from dora_mm.eval.vl.submissions import suffix, write_predictions


def example(key: str, *answers: str, image: str = "a.jpg") -> Example:
    return Example(key, (image,), "?", answers, (1.0,) * len(answers))


def write(tmp_path: Path, task: str, pairs: dict[str, str], **settings) -> Path:
    path = tmp_path / "predictions" / f"{task}{suffix(task)}"
    write_predictions(task, [(example(key, **settings), prediction) for key, prediction in pairs.items()], path)
    return path


def test_vqa(tmp_path):
    answers = {"262148000": " down\n", "262148001": 'é "x"'}
    results = json.loads(write(tmp_path, "vqa", answers).read_text())
    assert {result["question_id"] for result in results} == {262148000, 262148001}  # compared with the questions' ints
    by_id = {result["question_id"]: result["answer"] for result in results}
    assert by_id == {262148000: "down", 262148001: 'é "x"'}
    assert [*results[0]] == ["question_id", "answer"]


def test_gqa(tmp_path):
    results = json.loads(write(tmp_path, "gqa", {"05515938": "yes", "201640614": "no"}).read_text())
    assert {p["questionId"]: p["prediction"] for p in results} == {"05515938": "yes", "201640614": "no"}


def test_nlvr2_gives_the_official_numbers(tmp_path):
    labels = {"dev-850-0-0": "True", "dev-850-1-0": "False", "dev-9-0-1": "True", "dev-9-1-1": "True"}
    answers = {"dev-850-0-0": "true", "dev-850-1-0": "false", "dev-9-0-1": "false", "dev-9-1-1": "what, now"}
    path = write(tmp_path, "nlvr2", answers)
    assert path.suffix == ".csv"
    predictions = {}
    for line in path.read_text().splitlines():
        fields = line.strip().split(",")
        predictions[fields[0]] = fields[1]
    assert predictions["dev-850-0-0"] == "True"
    right = {key: predictions[key].lower() == label.lower() for key, label in labels.items()}
    groups: dict[str, bool] = {}
    for key, value in right.items():
        fields = key.split("-")
        fields[2] = ""
        groups["-".join(fields)] = groups.get("-".join(fields), True) and value
    scores = score("nlvr2", [(example(key, labels[key].lower()), answers[key]) for key in labels])
    assert scores.metrics["accuracy"] == 100 * sum(right.values()) / len(right) == 50.0
    assert scores.metrics["consistency"] == 100 * sum(groups.values()) / len(groups) == 50.0


def test_captions(tmp_path):
    results = json.loads(write(tmp_path, "caption", {"391895": "a man\non a bike", "60623": "a girl"}).read_text())
    assert results == [{"image_id": 391895, "caption": "a man on a bike"}, {"image_id": 60623, "caption": "a girl"}]


@pytest.mark.parametrize("task", ["tvqa", "how2qa"])
def test_video_questions(tmp_path, task):
    submission = json.loads(write(tmp_path, task, {"122039": "a3", "122040": "a0 ", "122041": "hm"}).read_text())
    assert {int(k): int(v) for k, v in submission.items()} == {122039: 3, 122040: 0, 122041: -1}


@pytest.mark.parametrize(("task", "name"), [("tvc", "vid_name"), ("yc2c", "video_id")])
def test_video_captions(tmp_path, task, name):
    path = write(tmp_path, task, {"86618": "She sits\u2028down. é", "86619": "He stands."}, image="friends_s08_clip_00")
    lines = [json.loads(line.strip("\n")) for line in path.open().readlines()]
    assert {line["clip_id"]: line["descs"][0]["desc"] for line in lines} == {
        86618: "She sits down. é",
        86619: "He stands.",
    }
    assert {line[name] for line in lines} == {"friends_s08_clip_00"}


def test_conversations_and_choices_are_json_lines(tmp_path):
    path = write(tmp_path, "chat", {"7 (item 2)": "One.\n\nTwo \u2028 é", "8": ""})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"id": "7 (item 2)", "answer": "One.\n\nTwo \u2028 é"}, {"id": "8", "answer": ""}]
    (line,) = write(tmp_path, "choice", {"3": " B "}).read_text().splitlines()
    assert json.loads(line) == {"id": "3", "answer": "B"}
    assert path.suffix == suffix("choice") == ".jsonl"


def test_ids_of_other_data_sets_stay_text(tmp_path):
    results = json.loads(write(tmp_path, "vqa", {"train-12": "yes", "²": "no", "007": "x"}).read_text())
    assert [result["question_id"] for result in results] == ["train-12", "²", 7]


def test_two_predictions_of_an_id_are_rejected(tmp_path):
    path = tmp_path / "caption.json"
    rows = [(example("1", "a dog"), "a cat"), (example("1", "the dog"), "a cat ")]
    write_predictions("caption", rows, path)  # a row for each reference
    assert len(json.loads(path.read_text())) == 1
    with pytest.raises(ValueError, match="caption: 1 has two predictions, 'a cat' and 'a bus'"):
        write_predictions("caption", [*rows, (example("1"), "a bus")], path)
    assert len(json.loads(path.read_text())) == 1  # the previous file is complete
    assert [file.name for file in tmp_path.iterdir()] == ["caption.json"]
