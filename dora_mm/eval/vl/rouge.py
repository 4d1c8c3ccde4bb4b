"""ROUGE-L of sentences: the longest common subsequence of an answer's words and those of a reference.

It is the rougeL of Google's rouge-score without a stemmer, which takes three more packages and drops every letter
beyond a to z; of texts in these both agree (tests/eval/vl/official_scores.py). That of pycocoevalcap, which scores
captions, weights recall by 1.2 and takes tokens of a program in Java.
"""

import re
from collections import defaultdict
from collections.abc import Sequence

from dora_mm.data.vl.example import Example

# Words in any alphabet; of Chinese and Japanese, which have no spaces, single characters
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORDS = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
RULE = "F1 of the longest common subsequence of words in lower case, without punctuation; the best of the references"


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return WORDS.findall(text.lower())


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence, by a bit for each word of `first` (Hyyro, 2004)."""
    masks: dict[str, int] = defaultdict(int)
    for position, word in enumerate(first):
        masks[word] |= 1 << position
    every = row = (1 << len(first)) - 1
    for word in second:
        matched = row & masks[word]
        row = ((row + matched) | (row - matched)) & every
    return len(first) - row.bit_count()


def rouge_l(reference: str, prediction: str) -> float:
    """The F1 of precision and recall of common words in their order, 0 to 1."""
    ours, theirs = words_of(prediction), words_of(reference)
    return 2 * common_length(theirs, ours) / (len(theirs) + len(ours)) if theirs and ours else 0.0


def row_rouge_l(example: Example, prediction: str) -> float:
    """The ROUGE-L of a prediction with the reference that it is closest to, 0 to 1."""
    return max(rouge_l(answer, prediction) for answer in example.answers)
