"""Workflows run targets of the Makefile and pinned actions, with no permission that they do not need."""

import re
from pathlib import Path

import pytest
import yaml

from dora_mm.cli.parser import build_parser
from tests.elsewhere import FAST

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
DEVELOPING = (ROOT / "docs" / "developing.md").read_text(encoding="utf-8")
TARGETS = dict(re.findall(r"^([a-z][a-z-]*):(.*)$", MAKEFILE, re.MULTILINE))
NEEDED = {  # beside reading the code
    ("docs.yml", "publish"): {"pages": "write", "id-token": "write"},
    ("release.yml", "publish"): {"id-token": "write"},
}


def jobs(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_each_step_is_a_target_of_the_makefile_or_an_action(path):
    steps = [step for job in jobs(path).values() for step in job["steps"]]
    runs = [step["run"] for step in steps if "run" in step]
    assert runs
    assert [run for run in runs if not re.fullmatch(r"make [a-z-]+", run)] == []
    assert {run.split()[1] for run in runs} <= TARGETS.keys()
    assert all("run" in step or "uses" in step for step in steps)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_commit_with_the_version_beside_it(path):
    lines = re.findall(r"uses: (.*)", path.read_text(encoding="utf-8"))
    assert lines
    assert [line for line in lines if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_permissions_are_the_least_and_jobs_end(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"]
    for name, job in workflow["jobs"].items():
        assert job.get("permissions") == NEEDED.get((path.name, name)), name
        assert 0 < job["timeout-minutes"] <= 90
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


def test_an_action_has_one_commit_in_all_workflows():
    found = {line for path in WORKFLOWS for line in re.findall(r"uses: (.*)", path.read_text(encoding="utf-8"))}
    assert len(found) == len({line.split("@")[0] for line in found})


def test_linux_runs_every_python_that_is_promised():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    promised = re.findall(r"Python :: (3\.\d+)", pyproject)
    (tests,) = (path for path in WORKFLOWS if path.name == "tests.yml")
    assert jobs(tests)["linux"]["strategy"]["matrix"]["python"] == promised


def test_the_fast_folders_are_those_of_test_elsewhere():
    (recipe,) = re.findall(r"^test-fast:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert re.findall(r"tests/(\w+)", recipe) == list(FAST)


def test_every_target_says_what_it_does_and_the_page_has_it():
    assert [name for name, rest in TARGETS.items() if "  ## " not in rest] == []
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert set(phony.split()) == TARGETS.keys()
    assert [name for name in TARGETS if f"`make {name}`" not in DEVELOPING] == []


def test_forms_name_commands_that_exist():
    forms = [path for path in (ROOT / ".github").rglob("*") if path.suffix in (".md", ".yml")]
    text = " ".join("\n".join(path.read_text(encoding="utf-8") for path in forms).split())
    commands = re.findall(r"`dora-mm ([^`]+)`", text)
    assert "check --report --config CONFIG" in commands
    for command in commands:
        build_parser().parse_args(command.split())
