"""Chooses questions so that their answers cannot be guessed from the questions."""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

NUM_COMPARED = 6  # candidates among which the one whose image has the fewest questions is chosen


class Candidate(Protocol):
    """A question that can be chosen.

    Attributes:
        family: The kind of question; each has a share of all questions.
        group: What the answer must not be guessed from, usually the text of the question.
        answer: The true answer.
        image_index: The number of the image that the question is about.
    """

    @property
    def family(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def image_index(self) -> int: ...


C = TypeVar("C", bound=Candidate)
Answers = dict[str, list[C]]


def balanced(candidates: Sequence[C], shares: Mapping[str, float], number: int, stream: random.Random) -> list[C]:
    """Chooses candidates in rounds; each round takes one group, and one candidate for each of its answers.

    So all answers of a group are equally frequent, until some have no candidates left; a group with one answer left is
    not used any more. When a family has no candidates left, the others get its share.

    Args:
        candidates: The questions to choose from.
        shares: Relative number of questions of each family.
        number: How many to choose, about: fewer if the candidates do not suffice, more by less than one round.
        stream: The random generator.
    """
    families: dict[str, dict[str, Answers[C]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for candidate in candidates:
        families[candidate.family][candidate.group][candidate.answer].append(candidate)
    for groups in families.values():
        for group in groups.values():
            for answers in group.values():
                stream.shuffle(answers)
    chosen, counts = [], Counter()
    done = Counter({family: 0 for family in shares if family in families})
    while done and len(chosen) < number:
        family = min(done, key=lambda name: done[name] / shares[name])
        groups = families[family]
        name = stream.choice(list(groups)) if groups else None
        if name is None:
            del done[family]
            continue
        for candidate in one_round(groups[name], counts):
            chosen.append(candidate)
            counts[candidate.image_index] += 1
            done[family] += 1
        if not groups[name]:
            del groups[name]
    return chosen


def one_round(answers: Answers[C], counts: Counter[int]) -> list[C]:
    """Takes one candidate for each answer of a group, preferring images with few questions so far.

    Args:
        answers: The remaining candidates of the group by answer; those taken are removed.
        counts: The number of questions chosen so far, by image.

    Returns:
        The candidates; none if fewer than two answers are left.
    """
    for answer in [answer for answer, left in answers.items() if not left]:
        del answers[answer]
    if len(answers) < 2:
        answers.clear()
        return []
    chosen = []
    for left in answers.values():
        ends = range(max(len(left) - NUM_COMPARED, 0), len(left))
        chosen.append(left.pop(min(ends, key=lambda number: counts[left[number].image_index])))
    return chosen
