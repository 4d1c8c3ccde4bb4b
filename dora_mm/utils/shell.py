"""Commands, comments and code that a person is told to copy: no name out of a file in them ends the text that it is."""

import os
import re
import shlex
from pathlib import Path

from dora_mm.utils.messages import UNSEEN, shown


def quoted(word: object) -> str:
    """A word as a POSIX shell reads it back, on one line, and without what a terminal would obey.

    Args:
        word: A text; or a path, of which one that looks like an option gets `./` in front.
    """
    text = str(word)
    if isinstance(word, Path) and text.startswith("-"):
        text = f"./{text}"
    body = text.rstrip("\n")  # a substitution drops line breaks at its end
    if not UNSEEN.search(body):
        return shlex.quote(text)
    escaped = UNSEEN.sub(lambda found: _octal(found[0]), body.replace("\\", "\\\\"))
    return f'"$(printf %b {shlex.quote(escaped)})"{shlex.quote(text[len(body) :]) if body != text else ""}'


def command_line(*words: object) -> str:
    """A command of several words."""
    return " ".join(map(quoted, words))


def comment(text: str) -> str:
    """A text as lines of comments in a script or a YAML file, none of which ends early."""
    lines = (UNSEEN.sub(lambda found: repr(found[0])[1:-1], line) for line in text.split("\n"))
    return "\n".join(f"# {line}".rstrip() for line in lines)


def fenced(text: str, language: str) -> str:
    """A text as a block of Markdown, which no line of the text ends."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def in_code(text: str) -> str:
    """A text as code within a line of Markdown."""
    line = shown(text, len(text))
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence}{line}{fence}" if len(fence) == 1 else f"{fence} {line} {fence}"


def _octal(character: str) -> str:
    return "".join(f"\\0{byte:03o}" for byte in os.fsencode(character))
