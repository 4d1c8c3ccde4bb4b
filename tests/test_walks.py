"""The walks through the code in docs/architecture.md: their files exist, and have the names that are said of them."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
CHAPTER, RECORDS = "Four walks", "Records on the way"
MOST_FILES = 12
ITEM = re.compile(r"(\d+)\. `([^`]+)`: (.+)")


def sections() -> dict[str, str]:
    """The sections of the chapter by their titles."""
    _, found, chapter = PAGE.read_text(encoding="utf-8").partition(f"\n## {CHAPTER}\n")
    assert found
    parts = re.split(r"^### (.+)\n", chapter.partition("\n## ")[0], flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def items(section: str) -> list[tuple[str, list[str]]]:
    """The files of a walk in order, each with the names that are said to be in it."""
    lines = re.sub(r"\n +", " ", section).strip().splitlines()
    found = [ITEM.fullmatch(line) for line in lines]
    assert None not in found, "each item is a number, a file, and a sentence"
    numbered = [match.groups() for match in found if match]
    assert [int(number) for number, _, _ in numbered] == list(range(1, len(numbered) + 1))
    return [(file, re.findall(r"`([^`]+)`", text)) for _, file, text in numbered]


@cache
def names_in(source: str) -> frozenset[str]:
    """The names that a file defines or imports; those in the body of a class also behind its name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        found |= _bound(node)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}" for child in node.body for name in _bound(child)}
            found |= {f"{node.name}.{child.target.id}" for child in node.body if _is_field(child)}
    return frozenset(found)


def _bound(node: ast.AST) -> set[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
            return {name}
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            return {alias.asname or alias.name for alias in names}
        case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
            return {name}
    return set()


def _is_field(node: ast.AST) -> bool:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)


WALKS = {title: items(text) for title, text in sections().items() if not title.startswith(RECORDS)}


def test_there_are_four_walks():
    assert len(WALKS) == 4


@pytest.mark.parametrize("title", WALKS)
def test_a_walk_is_short(title):
    files = [file for file, _ in WALKS[title]]
    assert 2 <= len(files) <= MOST_FILES
    assert len(set(files)) == len(files)


@pytest.mark.parametrize(("file", "names"), [item for walk in WALKS.values() for item in walk])
def test_a_file_has_the_names(file, names):
    assert (ROOT / file).is_file()
    known = names_in((ROOT / file).read_text(encoding="utf-8"))
    commands = [name for name in names if name.startswith("dora-mm ")]
    assert len(names) > len(commands), "an item names a function or a record"
    assert [name for name in names if name not in commands and name not in known] == []


def test_the_records_are_on_the_way():
    (table,) = (text for title, text in sections().items() if title.startswith(RECORDS))
    rows = [line.strip("|").split(" | ") for line in table.strip().splitlines()[2:]]
    walked = [(ROOT / file).read_text(encoding="utf-8") for walk in WALKS.values() for file, _ in walk]
    known = frozenset().union(*map(names_in, walked))
    assert len(rows) > 10
    assert {len(row) for row in rows} == {4}
    assert [row[1] for row in rows if row[1].strip().strip("`") not in known] == []


def test_wrong_names_are_found():
    known = names_in("from a import b as c\n\nclass D:\n    e: int\n\n    def f(self, g):\n        self.h = k\n")
    assert known == {"c", "D", "D.e", "D.f", "e", "f", "self", "g", "h"}


@pytest.mark.parametrize("wrong", ["1. `a.py` does it.", "2. `a.py`: `b` does it.", "`a.py`: `b` does it."])
def test_wrong_items_are_found(wrong):
    with pytest.raises(AssertionError):
        items(wrong)
