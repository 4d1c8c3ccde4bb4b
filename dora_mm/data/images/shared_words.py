"""Words that the captions of a folder share: one that stands for the style, and those around the thing shown."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

PLACEHOLDER = "TOK"  # the word of images without captions
THINGS = ("a lighthouse", "a dragon", "a cup of coffee", "an astronaut riding a horse", "a bicycle", "an old tree")
NUM_PROMPTS = 4
MOST_WITHOUT = 0.1  # share of captions that may lack the word
ARTICLES = ("a", "an", "the")
# Words that captions share because of what they are, and not because they name a style
COMMON = """a an the of in on at with and or to for from by is are it its his her this that style icon photo photograph
image image drawing painting illustration portrait render art artwork scene view background white black"""
ORDINARY = frozenset(COMMON.split())


class Frame(NamedTuple):
    """The words that all captions have before and after the thing that they show."""

    before: str
    after: str

    def filled(self, thing: str) -> str:
        """A prompt for a thing."""
        return f"{self.before} {thing}{self.after}".strip(" ,")


def shared_word(captions: Sequence[str]) -> str | None:
    """The word that stands for the style: one of nearly all captions, first an invented one, such as TOK or sks3.

    Args:
        captions: The captions.

    Returns:
        None if all that they share are ordinary words.
    """
    words = (dict.fromkeys(re.findall(r"\w[\w-]*", caption)) for caption in captions)
    captions_with = Counter(word for each in words for word in each)  # in the order in which words appear
    enough = (1 - MOST_WITHOUT) * len(captions)
    shared = [word for word, count in captions_with.items() if count >= enough]
    chosen = [word for word in shared if word.lower() not in ORDINARY and len(word) > 1]
    return next((word for word in chosen if is_invented(word)), chosen[0] if chosen else None)


def is_invented(word: str) -> bool:
    """Whether a word looks like no English one: digits, underscores, capitals inside, or no vowel."""
    return bool(re.search(r"\d|_|[A-Z]", word[1:])) or not re.search(r"[aeiouy]", word, re.IGNORECASE)


def shared_frame(captions: Sequence[str]) -> Frame:
    """The whole words with which all captions begin and end, without an article before the thing."""
    different = sorted(set(captions))
    if len(different) < 2:
        return Frame("", "")
    start = common_start(different)
    rests = [caption[len(start) :][::-1] for caption in different]
    before = start[: start.rfind(" ") + 1].split()
    if before and before[-1].lower() in ARTICLES:
        before.pop()
    after = re.sub(r"^\w+", "", common_start(rests)[::-1])
    return Frame(" ".join(before), after.rstrip())


def common_start(texts: Sequence[str]) -> str:
    """The characters that all texts begin with."""
    first, last = min(texts), max(texts)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]


def example_prompts(captions: Sequence[str], word: str | None) -> list[str]:
    """Prompts for things that no caption names, in the words of the captions.

    Args:
        captions: The captions.
        word: What stands for the style; None: there is no such word.
    """
    known = set(re.findall(r"\w+", " ".join(captions).lower()))
    things = [thing for thing in THINGS if not known & (set(thing.split()) - ORDINARY)] or list(THINGS)
    frame = shared_frame(captions)
    if word is not None and word not in f"{frame.before} {frame.after}":
        frame = Frame(f"{word},", "") if captions[0].startswith(word) else Frame("", f", {word}")
    return [frame.filled(thing) for thing in things[:NUM_PROMPTS]]
