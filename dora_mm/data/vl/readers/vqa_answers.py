"""Normalisation of answers as in the official VQA v2 evaluation, including its bugs.

The bugs affect scores, so they are reproduced: a rule meant to keep periods after digits keeps those before digits; the
flag re.UNICODE (32) is passed to `re.sub` as its count, so that only the first 32 periods are removed; "none" becomes
"0"; and contractions that begin with a capital never match, because words are lower-cased first.
"""

import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

NUM_ANSWERS = 10  # of people, to each question of VQA v2
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
MAX_PERIODS = 32

ARTICLES = frozenset({"a", "an", "the"})
NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(value) for value, word in enumerate(NUMBER_WORDS.split())} | {"none": "0"}

# Each is recognised when exactly one of its apostrophes is missing.
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
    word[:index] + word[index + 1 :]: word
    for word in CONTRACTED.split()
    for index, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # reversed in the official table


def tidy(text: str) -> str:
    """The text with newlines and tabs replaced by spaces, and stripped at both ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def strip_punctuation(text: str) -> str:
    """Removes punctuation as the official script does.

    A mark is removed if it is next to a space anywhere in the text or if the text has a number with a comma; otherwise
    it becomes a space. Periods are removed unless a digit follows.
    """
    number = COMMA_IN_NUMBER.search(text) is not None
    stripped = text
    for mark in PUNCTUATION:
        if mark in text:
            next_to_space = f"{mark} " in text or f" {mark}" in text
            stripped = stripped.replace(mark, "" if next_to_space or number else " ")
    return PERIOD.sub("", stripped, count=MAX_PERIODS)


def map_words(text: str) -> str:
    """The text in lower case, with number words as digits, without articles, and with apostrophes in contractions."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(maxsize=2**16)  # the ten answers to 440,000 questions are mostly the same few thousand
def normalize_answer(text: str) -> str:
    """The form in which the official script compares answers when the ten people do not all agree.

    >>> normalize_answer("The two dogs, dont you think?")
    "2 dogs don't you think"
    """
    return map_words(strip_punctuation(tidy(text)))


def soft_scores(raw_answers: Iterable[str]) -> dict[str, float]:
    """The training scores of the normalised answers to a question.

    An answer that normalisation would empty, such as "A", is kept in lower case, which the metric treats as equal.

    Args:
        raw_answers: The answers of the ten people.

    Returns:
        min(1, 0.3 n) for each answer that n people gave, highest first.
    """
    counts = Counter(normalize_answer(answer) or tidy(answer).lower() for answer in raw_answers)
    return {answer: min(10, 3 * count) / 10 for answer, count in counts.most_common()}
