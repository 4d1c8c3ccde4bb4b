"""The commands that the documents and the heads of configs name."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```[ ]*$", re.DOTALL | re.MULTILINE)
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PROGRAM = "dora-mm "


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    """The contents of all fenced blocks."""
    return [body for _, _, body in FENCE.findall(text)]


def commands(text: str, start: str = PROGRAM) -> list[list[str]]:
    """The arguments of all commands in fenced blocks that begin with `start`; lines that end in a backslash go on."""
    bodies = [re.sub(r"\\\n\s*", " ", body) for body in blocks(text)]
    lines = [line.strip().removeprefix("$ ") for body in bodies for line in body.splitlines()]
    return [shlex.split(line.removeprefix(start), comments=True) for line in lines if line.startswith(start)]


def head_commands(text: str) -> list[list[str]]:
    """The arguments of all commands in the comment at the head of a config; remarks in parentheses follow some."""
    head = re.split(r"^(?!#)", text, maxsplit=1, flags=re.MULTILINE)[0]
    comments = re.sub(r"\\\n#\s*", " ", head)
    lines = [line.removeprefix("#").strip().partition("   (")[0] for line in comments.splitlines()]
    return [shlex.split(line.removeprefix(PROGRAM)) for line in lines if line.startswith(PROGRAM)]


def is_synopsis(arguments: list[str]) -> bool:
    """Whether a line shows which arguments a command takes, as in `merge MODEL ADAPTER OUT`."""
    return any(re.fullmatch(r"[A-Z]{2,}", argument) for argument in arguments)


def configs() -> list[Path]:
    return sorted((ROOT / "configs").glob("*/*.yaml"))
