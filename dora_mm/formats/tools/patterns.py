"""PEFT's module patterns, matched in linear time: a file may hold any, and regular expressions can take for ever."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

MOST_CHARACTERS = 200  # of a pattern with wildcards
MOST_WILDCARDS = 100  # patterns with wildcards in one file
_READ = re.compile(r"\^?(?:[\w-]|\\?\.|\.\*)+\$?")


def matching_key(patterns: Mapping[str, Any], path: str) -> str | None:
    """The first pattern that matches the end of a module's path, as in PEFT; None where none does.

    A pattern is a dotted suffix (`attn.to_q`) or, after `^`, the whole path; `.*` in it stands for any text.

    Args:
        patterns: The `alpha_pattern` or `rank_pattern` of PEFT's settings.
        path: The path of the module.

    Raises:
        ValueError: A pattern is another regular expression, or there are more than 100 with `.*`.
    """
    wildcards = 0
    for pattern in patterns:
        wildcards += ".*" in pattern
        if wildcards > MOST_WILDCARDS:
            raise ValueError(f"there are more than {MOST_WILDCARDS} patterns with wildcards")
        if _matches(pattern, path):
            return pattern
    return None


def _matches(pattern: str, path: str) -> bool:
    text, is_anchored = _parsed(pattern)
    if "*" not in text:
        return path == text or (not is_anchored and path.endswith(text) and path[-len(text) - 1] == ".")
    return fnmatchcase(path, text) or (not is_anchored and fnmatchcase(path, f"*.{text}"))


@lru_cache(maxsize=4096)
def _parsed(pattern: str) -> tuple[str, bool]:
    """The text of a pattern, with `*` for any text, and whether it is that of the whole path."""
    if not _READ.fullmatch(pattern) or (".*" in pattern and len(pattern) > MOST_CHARACTERS):
        raise ValueError(
            f"the pattern {pattern!r:.60} is not supported: write the ends of modules' paths, with .* for any text"
        )
    text = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".").replace(".*", "*")
    return text, pattern.startswith("^")
