"""The documents: their links lead somewhere, their commands name configs and keys that exist, their examples run."""

import re
import shlex
from pathlib import Path

import pytest

from dora_mm.config import load_config

ROOT = Path(__file__).parents[1]
TOP = [path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if path.is_file()]
DOCUMENTS = [*TOP, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "samples").rglob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language; the language of a bare fence is ""."""
    fences = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE)
    return [body for _, named, body in fences if named == language]
