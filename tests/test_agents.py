"""AGENTS.md and docs/llms.txt: what they name exists, and the index is that of the pages."""

import re

import pytest

from dora_mm.cli.parser import build_parser
from tests.documented import llms
from tests.documented.texts import ROOT, text_of

TEXT = text_of(ROOT / "AGENTS.md")
CODE = re.findall(r"`([^`\n]+)`", TEXT)


def test_paths_exist():
    paths = [each for each in CODE if "/" in each and " " not in each] + ["pyproject.toml", "Makefile", "CHANGELOG.md"]
    assert len(paths) > 30
    assert [each for each in paths if not (ROOT / each).exists()] == []


def test_targets_and_commands_exist():
    targets = {each.split()[1] for each in CODE if each.startswith("make ")}
    defined = set(re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    assert {"test", "lint", "docs"} <= targets <= defined
    commands = {each.split()[1] for each in CODE if each.startswith("dora-mm ")}
    (choices,) = [each.choices for each in build_parser()._actions if isinstance(each.choices, dict)]
    assert {"train", "check"} <= commands <= set(choices)


def test_every_room_has_a_line():
    rooms = {f"dora_mm/{each.parent.name}/" for each in (ROOT / "dora_mm").glob("*/__init__.py")}
    assert sorted(re.findall(r"^- `(dora_mm/\w+/)`: ", TEXT, re.MULTILINE)) == sorted(rooms)


def test_it_stays_short():
    assert len(TEXT.splitlines()) <= 80


def test_the_index_is_that_of_the_pages():
    assert text_of(llms.INDEX) == llms.index(), "python -m tests.documented.llms"


def test_the_index_has_every_page_once():
    listed = re.findall(r"^- \[[^\]]+\]\(([^)]+)\): .+\.$", llms.index(), re.MULTILINE)
    pages = [path.relative_to(llms.DOCS).as_posix() for path in llms.DOCS.rglob("*.md")]
    assert sorted(listed) == sorted([*pages, "../README.md", "../CONTRIBUTING.md", "../CHANGELOG.md"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Trains a model, by `dora_mm 0.1`. More.", "Trains a model, by `dora_mm 0.1`."),
        ("[One](#one) · [two](#two)\n\nReads [files](formats.md) of\ntools.", "Reads files of tools."),
        ("```\ncommand\n```\n\nwrites a file. `it` is small.", "Writes a file."),
        ("![image](a.png)\n\n| a |\n|---|\n\nPut it into a model:\n\n```\n```", "Put it into a model."),
    ],
)
def test_the_first_sentence_of_a_page(text, sentence, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{text}\n", encoding="utf-8")
    assert llms.summary(page) == sentence


def test_a_page_without_a_sentence_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n| a |\n|---|\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no sentence"):
        llms.summary(page)
