"""ANLS: how near an answer is to the nearest reference in edits, for DocVQA, InfographicVQA and ST-VQA.

Average normalised Levenshtein similarity, https://arxiv.org/abs/1907.00490, equation 1. Scripts differ in the length
that edits are divided by, and in white space.
"""

from collections import Counter
from collections.abc import Callable
from functools import lru_cache

from dora_mm.data.vl.example import Example
from dora_mm.eval.vl.scores import mean_scorer

LEAST = 0.5  # a lower similarity counts as 0


@lru_cache(maxsize=4)  # the rules differ in white space, which few answers have more of
def edits(first: str, second: str, most: int) -> int | None:
    """Returns the Levenshtein distance: the fewest characters to insert, delete or replace; None: it is over `most`.

    The columns of the band that `most` leaves are whole numbers with a bit for each cell, whose differences are
    computed all at once: Myers, https://doi.org/10.1145/316542.316550, with the band of
    Hyyrö, "A bit-vector algorithm for computing Levenshtein and Damerau edit distances" (2003). Two texts of 200,000
    characters take some 4 s.
    """
    longer, shorter = sorted(_without_common_ends(first, second), key=len, reverse=True)
    if max(len(longer) - len(shorter), (Counter(longer) - Counter(shorter)).total()) > most:
        return None
    return _in_band(longer, shorter, (most - len(longer) + len(shorter)) // 2, most)


def _without_common_ends(first: str, second: str) -> tuple[str, str]:
    start = _common_start(first, second)
    end = _common_start(first[start:][::-1], second[start:][::-1])
    return first[start : len(first) - end], second[start : len(second) - end]


def _common_start(first: str, second: str) -> int:
    pairs = zip(first, second, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _in_band(longer: str, shorter: str, margin: int, most: int) -> int | None:
    """The distance by the cells (i, j) of i characters of the longer and j of the shorter text.

    A path through a cell with i - j below -margin, or over margin + the difference of the lengths, costs over `most`.
    The numbers of column j have bits for i of j - margin and up; `up` and `down` say where the distance of i + 1 is
    one more, or one less, than that of i. The last cell of the band, whose distance is
    `found`, may lie below the table.
    """
    width = len(longer) - len(shorter) + 2 * margin + 1
    every, last = (1 << width) - 1, 1 << (width - 1)
    same_as = _matches(longer, margin)
    up, down, found = every ^ ((1 << margin) - 1), 0, width - 1 - margin
    for column, character in enumerate(shorter):
        same = (same_as(character) >> column) & every
        diagonal = ((((same & up) + up) ^ up) | same | down) & every  # where a step on the diagonal costs nothing
        right, left = down | (every ^ (diagonal | up)), diagonal & up
        found += not diagonal & last
        if found - margin > most:
            return None
        up, down = left | (every ^ (diagonal >> 1 | right)), diagonal >> 1 & right
    below = ((1 << margin) - 1) << (width - 1 - margin)
    found += (down & below).bit_count() - (up & below).bit_count()
    return found if found <= most else None


def _matches(text: str, margin: int) -> Callable[[str], int]:
    """A function from a character to a number with the bits, from `margin` on, at which a text has it."""
    offsets: dict[str, list[int]] = {}
    for offset, character in enumerate(text, margin):
        offsets.setdefault(character, []).append(offset)

    @lru_cache(maxsize=256)  # of texts with 100,000 characters, all of them would be gigabytes
    def matches(character: str) -> int:
        bits = bytearray((len(text) + margin) // 8 + 1)
        for offset in offsets.get(character, ()):
            bits[offset // 8] |= 1 << offset % 8
        return int.from_bytes(bits, "little")

    return matches


def similarity(reference: str, prediction: str, length: int) -> float:
    """Returns 1 - edits / length, or 0 where that is below 0.5; 1 where both are empty.

    Args:
        reference: What is compared, after normalisation.
        prediction: What is compared, after normalisation.
        length: What edits are divided by.
    """
    if not length:
        return 1.0
    found = edits(reference, prediction, int((1 - LEAST) * length))
    return 0.0 if found is None else 1 - found / length


def official(reference: str, prediction: str) -> float:
    """As the script of the evaluation site, rrc.cvc.uab.es, which divides by the lengths before normalisation."""
    length = max(len(reference.upper()), len(prediction.upper()))
    return similarity(_joined(reference), _joined(prediction), length)


def _joined(text: str) -> str:
    return " ".join(text.strip().lower().split())


def stripped(reference: str, prediction: str) -> float:
    """As mmf's STVQAANLSEvaluator."""
    reference, prediction = reference.lower().strip(), prediction.lower().strip()
    return similarity(reference, prediction, max(len(reference), len(prediction)))


def lowered(reference: str, prediction: str) -> float:
    """As `anls_metric` of pix2struct: white space counts, and a similarity of just 0.5 is 0, too."""
    reference, prediction = reference.lower(), prediction.lower()
    found = similarity(reference, prediction, max(len(reference), len(prediction)))
    return found if found > LEAST else 0.0


def _nearest(one: Callable[[str, str], float]) -> Callable[[Example, str], float]:
    return lambda example, prediction: max(one(reference, prediction) for reference in example.answers)


SCORER = mean_scorer(
    {
        "ANLS": (_nearest(official), "script of rrc.cvc.uab.es: white space joined, edits divided by raw lengths"),
        "ANLS (mmf)": (_nearest(stripped), "mmf's STVQAANLSEvaluator: stripped, edits divided by those lengths"),
        "ANLS (pix2struct)": (_nearest(lowered), "pix2struct's anls_metric: white space counts, and 0.5 is 0"),
    },
    scores_answers_only=True,
)
