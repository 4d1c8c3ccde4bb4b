"""The records of tasks, readers, scorers and submission files are data, and name what is there."""

import subprocess
import sys

import pytest

from dora_mm.registries.readers import READERS
from dora_mm.registries.registry import load
from dora_mm.registries.scorers import SCORERS
from dora_mm.registries.submissions import SUBMISSIONS
from dora_mm.registries.vl_tasks import TASKS

PLACES = [reader.read for reader in READERS.values()] + [submission.text for submission in SUBMISSIONS.values()]


def test_the_records_of_tasks_use_what_is_there_and_all_of_it():
    assert {form for task in TASKS.values() for form in task.formats} == set(READERS)
    assert {task.scorer for task in TASKS.values()} == set(SCORERS)
    assert {task.submission for task in TASKS.values()} == set(SUBMISSIONS)
    assert all(task.prompt or task.bart for task in TASKS.values())


@pytest.mark.parametrize("place", PLACES)
def test_every_place_is_a_function(place):
    assert callable(load(place))


def test_every_scorer_can_be_loaded():
    assert all(callable(scorer.score) for scorer in SCORERS.values())


def test_registries_import_nothing_large():
    modules = "image_families, readers, registry, scorers, submissions, vl_families, vl_tasks"
    large = "{'torch', 'pydantic', 'numpy', 'importlib.metadata', 'dora_mm.config', 'dora_mm.eval', 'dora_mm.data'}"
    code = f"import sys; from dora_mm.registries import {modules}; print(*{large} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
