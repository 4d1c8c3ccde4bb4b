"""SECURITY.md: each sentence is held by tests that exist, and the table of releases is the one that commands check."""

import ast
import re
from pathlib import Path

import pytest

from dora_mm.utils.requirements import REQUIREMENTS
from tests.audit import main, oldest_releases, problems

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return TEXT.partition(f"## {title}\n")[2].partition("\n## ")[0]


def sentences() -> dict[str, list[str]]:
    """The tests that hold each sentence."""
    items = re.split(r"^- ", section("What holds"), flags=re.MULTILINE)[1:]
    return {item.partition("\n  `tests")[0]: re.findall(r"^  `(tests[^`]+)`$", item, re.MULTILINE) for item in items}


def test_each_sentence_is_held_by_tests_that_exist():
    assert len(sentences()) > 15
    for sentence, tests in sentences().items():
        assert tests, sentence
        for test in tests:
            file, _, name = test.partition("::")
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


def test_the_oldest_releases_are_those_that_commands_check():
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| .+ \|$", section("Oldest releases"), re.MULTILINE)
    known = oldest_releases() | oldest_releases({name: REQUIREMENTS[name] for name in ("sheets", "heic")})
    assert len(rows) > 10
    assert dict(rows) == {name: known[name] for name, _ in rows}


def test_the_newest_bound_of_a_package_counts():
    assert oldest_releases({"": ["peft>=0.9"], "more": ["peft>=0.18.1"]}) == {"peft": "0.18.1"}


def test_holes_are_named_but_for_accepted_ones():
    hole = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.0"]}
    report = {
        "dependencies": [{"name": "a", "version": "1.0", "vulns": [hole]}, {"name": "b", "version": "1", "vulns": []}]
    }
    assert problems(report, "") == ["a 1.0: PYSEC-1 (fixed in: 2.0)"]
    assert problems(report, "Not used: CVE-1.") == []
    with pytest.raises(ConnectionError, match="not found"):  # which pip-audit counts as no hole
        problems({"dependencies": [{"name": "a", "skip_reason": "not found"}]}, "")


@pytest.mark.parametrize(("printed", "code", "message"), [
    ("{}", 0, "not audited"),
    ("a traceback", 0, "not audited: the index of published holes cannot be reached"),
    ('{"dependencies": []}', 0, "no published hole"),
    ('{"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "X-1", "fix_versions": []}]}]}', 1, "a 1: X-1"),
])  # fmt: skip
def test_without_an_answer_nothing_is_known(tmp_path, capsys, printed, code, message):
    (program := tmp_path / "pip-audit").write_text(f"#!/bin/sh\ncat > /dev/null\necho '{printed}'\n")
    program.chmod(0o755)
    assert main(str(program)) == code
    assert message in capsys.readouterr().out
