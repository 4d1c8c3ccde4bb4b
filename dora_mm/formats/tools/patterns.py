"""PEFT's module patterns, matched in linear time: a file may hold any, and regular expressions can take for ever."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

MOST_CHARACTERS = 200  # of a pattern with wildcards
MOST_WILDCARDS = 100  # patterns with wildcards in one file
_PLAIN = re.compile(r"\^?[\w.-]+")
_ITEM = re.compile(
    r"""(?: (?P<one> \\[dDwWsS] | \\[^\w] | \[\^?[\w.-]+\] | [\w.-] )  # one character
        | \( (?:\?:)? (?P<words> (?:[\w|-] | \\\. )+ ) \) )            # or one of several words
        (?P<often> [*+?]? )""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class _Item:
    """A piece of a pattern: a character or a choice of words, once or, as `*`, `+` and `?` say, more or less often."""

    one: re.Pattern[str] | None
    words: tuple[str, ...]
    often: str

    def ends(self, text: str, starts: set[int]) -> set[int]:
        """The positions in `text` where the piece can end if it begins at one of `starts`."""
        found = set(starts) if self.often in ("*", "?") else set()
        new = starts
        while new := self._once(text, new) - found:
            found |= new
            if self.often in ("", "?"):
                break
        return found

    def _once(self, text: str, starts: set[int]) -> set[int]:
        if self.one is not None:
            return {i + 1 for i in starts if i < len(text) and self.one.fullmatch(text[i])}
        return {i + len(word) for i in starts for word in self.words if text.startswith(word, i)}


def matching_key(patterns: Mapping[str, Any], path: str) -> str | None:
    r"""The first pattern that matches the end of a module's path, as in PEFT; None where none does.

    A pattern is a dotted suffix (`attn.to_q`), the whole path after `^`, or has wildcards: `.`, `[...]`, `\d` and `\w`
    for one character, `(to_q|to_k)` for one of several words; `*`, `+` or `?` after them.

    Args:
        patterns: The `alpha_pattern` of a LoraConfig.
        path: The path of the module.

    Raises:
        ValueError: A pattern is another one, or there are more than 100 with wildcards.
    """
    wildcards = 0
    for pattern in patterns:
        items = _parsed(pattern)
        wildcards += items is not None
        if wildcards > MOST_WILDCARDS:
            raise ValueError(f"there are more than {MOST_WILDCARDS} patterns with wildcards")
        if _matches_plain(pattern, path) if items is None else _matches(items, pattern, path):
            return pattern
    return None


def _matches_plain(pattern: str, path: str) -> bool:
    if pattern.startswith("^"):
        return path == pattern[1:]
    return path.endswith(pattern) and path[: -len(pattern)][-1:] in ("", ".")


def _matches(items: tuple[_Item, ...], pattern: str, path: str) -> bool:
    positions = {0} if pattern.startswith("^") else {0} | {i + 1 for i, c in enumerate(path) if c == "."}
    for item in items:
        positions = item.ends(path, positions)
    return len(path) in positions


@lru_cache(maxsize=4096)
def _parsed(pattern: str) -> tuple[_Item, ...] | None:
    """The pieces of a pattern with wildcards; None for a plain one."""
    if _PLAIN.fullmatch(pattern):
        return None
    if len(pattern) > MOST_CHARACTERS:
        raise ValueError(f"the pattern {pattern[:40]!r}... is longer than {MOST_CHARACTERS} characters")
    items, place, end = [], int(pattern.startswith("^")), len(pattern) - pattern.endswith("$")
    while place < end:
        found = _ITEM.match(pattern, place, end)
        if found is None:
            raise ValueError(
                f"the pattern {pattern!r} is not supported at {pattern[place:]!r}: write the ends of the modules' paths"
            )
        items.append(_Item(_character(found["one"]), _words(found["words"]), found["often"]))
        place = found.end()
    return tuple(items)


def _character(text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is not a set of characters: {error}") from error


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(text.replace("\\.", ".").split("|")) if text else ()
