"""Suites are tasks in YAML files, those of the package by name and others by their paths."""

from pathlib import Path

import pytest

from dora_mm.config.vl_data import VLDataConfig
from dora_mm.registries.suites import file_stem, packaged_suites
from dora_mm.registries.vl_tasks import TASKS

SUITE = 'title: mine\nreaders: [answers]\nmetric: exact\nprompt: "{text} Be short."\n'


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_a_suite_of_a_file_is_a_task_without_code(tmp_path):
    name = write(tmp_path, SUITE + "images: any\nmax_answer: 5\n")
    task = TASKS[name]
    assert (task.title, task.formats, task.scorer, task.prompt) == ("mine", ("answers",), "exact", "{text} Be short.")
    assert (task.images, task.max_answer, task.kind) == (None, 5, "questions")
    assert file_stem(name) == "mine"
    data = VLDataConfig.model_validate({"task": name, "valid": {"format": "answers", "file": "a.tsv"}})
    assert data.all_tasks[0].task == name
    assert name not in list(TASKS)


def test_all_packaged_suites_can_be_read():
    assert {TASKS[name].title for name in packaged_suites()} >= {"DocVQA", "MMMU", "POPE", "RefCOCO"}
    assert all(name in list(TASKS) for name in packaged_suites())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SUITE.replace("metric", "metrics"), "a suite has no key metrics, did you mean 'metric'?"),
        (SUITE.replace("title: mine\n", ""), "title is missing"),
        (SUITE.replace("exact", "exakt"), "must be .*, got 'exakt', did you mean 'exact'?"),
        (SUITE.replace("[answers]", "[answer]"), "got 'answer', did you mean 'answers'?"),
        (SUITE.replace("{text}", ""), "prompt has no {text}"),
        (SUITE + "images: some\n", "images is a number, or any"),
        (SUITE + "max_answer: many\n", "max_answer has the wrong type: 'many'"),
        (SUITE + "x: [", "cannot be read as YAML"),
        ("- a\n", "is not a suite"),
    ],
)
def test_what_is_wrong_with_a_suite_is_said_in_one_sentence(tmp_path, text, message):
    name = write(tmp_path, text)
    with pytest.raises(ValueError, match=message.replace("?", r"\?").replace("{", r"\{")) as caught:
        TASKS.check(name)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_a_suite_that_is_not_there_is_refused_like_any_other_task(tmp_path):
    with pytest.raises(ValueError, match="got 'docvqq', did you mean 'docvqa'"):
        TASKS.check("docvqq")
    with pytest.raises(ValueError, match="got"):
        TASKS.check(str(tmp_path / "none.yaml"))
