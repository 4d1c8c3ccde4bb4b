"""Answers to visual questions as the official VQA v2 evaluation compares them, its slips included.

The slips decide scores, so they stay: a rule that was meant to spare periods behind digits spares those before digits;
the flag re.UNICODE (32) stands where `re.sub` takes a count, so that only the first 32 periods go; "none" counts as
"0"; and the contractions that begin with a capital are never met, because words are lowered first.
"""

import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

__all__ = ["map_words", "normalize_answer", "soft_scores", "strip_punctuation", "tidy"]

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
MAX_PERIODS = 32

ARTICLES = frozenset({"a", "an", "the"})
NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(value) for value, word in enumerate(NUMBER_WORDS.split())} | {"none": "0"}

# Each is found wherever exactly one of its apostrophes is left out.
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTED.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the official table has this one the wrong way round


def tidy(text: str) -> str:
    """Newlines and tabs become spaces, and the ends are stripped."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def strip_punctuation(text: str) -> str:
    """A mark goes where it stands beside a space somewhere, or where a number has a comma; elsewhere a space takes its
    place. Periods go unless a digit follows."""
    number = COMMA_IN_NUMBER.search(text) is not None
    stripped = text
    for mark in PUNCTUATION:
        if mark in text:
            beside_space = f"{mark} " in text or f" {mark}" in text
            stripped = stripped.replace(mark, "" if beside_space or number else " ")
    return PERIOD.sub("", stripped, count=MAX_PERIODS)


def map_words(text: str) -> str:
    """Lower case, number words as digits, no articles, contractions with their apostrophes, single spaces."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(maxsize=2**16)  # the ten answers to 440,000 questions are mostly the same few thousand
def normalize_answer(text: str) -> str:
    """The form in which the official script compares answers on which the ten people do not all agree.

    >>> normalize_answer("The two dogs, dont you think?")
    "2 dogs don't you think"
    """
    return map_words(strip_punctuation(tidy(text)))


def soft_scores(raw_answers: Iterable[str]) -> dict[str, float]:
    """Training labels: each normalised answer with min(1, 0.3 n) of the n people who gave it, best first.

    An answer of which nothing would be left, such as "A", keeps its lower-case form: the metric takes it as the same.
    """
    counts = Counter(normalize_answer(answer) or tidy(answer).lower() for answer in raw_answers)
    return {answer: min(10, 3 * count) / 10 for answer, count in counts.most_common()}
