"""The nouns of WordNet 3.0, from the files that Debian's wordnet-base installs (their format: man 5 wndb)."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

WORD = re.compile(r"[a-z]{3,}")
SHORT_GLOSS = 80  # characters


@dataclass(frozen=True)
class Noun:
    """A common noun in its most frequent sense.

    Attributes:
        word: The noun, of small letters alone.
        gloss: What it means; "" where that is long, or contains the noun.
        kind: What it is a kind of: the nearest common noun above it.
        kinds: The noun and all words that stand above it, in any of its senses.
    """

    word: str
    gloss: str
    kind: str
    kinds: frozenset[str]


@dataclass(frozen=True)
class _Sense:
    words: tuple[str, ...]
    above: tuple[str, ...]
    gloss: str


def read_nouns(folder: Path, least: int) -> list[Noun]:
    """Reads the common nouns in alphabetical order.

    Args:
        folder: The folder of WordNet's files.
        least: How often a noun has its first sense in WordNet's tagged texts, at least; its kind as well.
    """
    senses = dict(_senses(folder / "data.noun"))
    counts = _counts(folder / "cntlist.rev")
    found = []
    for word, places in _index(folder / "index.noun"):
        if counts.get(word, 0) < least:
            continue
        kinds = frozenset([word, *(kind for place in places for kind in _above(senses, place))])
        nearest = (kind for kind in _above(senses, places[0]) if WORD.fullmatch(kind) and counts.get(kind, 0) >= least)
        if kind := next((kind for kind in nearest if not _share(kind, word)), None):
            found.append(Noun(word, _short(senses[places[0]].gloss, word), kind, kinds))
    return found


def _share(first: str, second: str) -> bool:
    """Whether one word is in the other."""
    return first in second or second in first


def _short(gloss: str, word: str) -> str:
    return gloss if len(gloss) <= SHORT_GLOSS and word[:4] not in gloss.lower() else ""


def _above(senses: Mapping[str, _Sense], place: str) -> Iterator[str]:
    """All words above a sense, the nearest first."""
    level = senses[place].above
    while level:
        yield from (word for each in level for word in senses[each].words)
        level = tuple(dict.fromkeys(above for each in level for above in senses[each].above))


def _senses(file: Path) -> Iterator[tuple[str, _Sense]]:
    """The senses by their place in the file."""
    for line in _lines(file):
        fields, _, text = line.partition(" | ")
        place, _, _, num_words, *rest = fields.split()
        end = 2 * int(num_words, 16)
        pointers = rest[end + 1 :]
        above = tuple(pointers[i + 1] for i in range(0, len(pointers), 4) if pointers[i] == "@")
        gloss = re.sub(r"^\([^)]*\) *", "", text.partition('; "')[0].partition(";")[0]).strip()
        yield place, _Sense(tuple(rest[:end:2]), above, gloss)


def _index(file: Path) -> Iterator[tuple[str, list[str]]]:
    """Nouns with the places of their senses, the most frequent first."""
    for line in _lines(file):
        word, _, num_senses, *rest = line.split()
        if WORD.fullmatch(word):
            yield word, rest[-int(num_senses) :]


def _counts(file: Path) -> dict[str, int]:
    """How often nouns have their first sense in the tagged texts."""
    rows = (line.split() for line in file.read_text(encoding="ascii").splitlines())
    return {key.partition("%")[0]: int(count) for key, number, count in rows if "%1:" in key and number == "1"}


def _lines(file: Path) -> Iterator[str]:
    """The lines without the licence, which begins them, behind blanks."""
    return (line for line in file.read_text(encoding="ascii").splitlines() if not line.startswith(" "))
