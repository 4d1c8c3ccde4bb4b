"""A choice of questions whose answers cannot be told from the questions."""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

__all__ = ["balanced"]

LOOK_AT = 6  # candidates among which the picture with the fewest questions is taken


class Candidate(Protocol):
    """group: what must not give the answer away, usually the text. place: its picture. family: whose share it takes."""

    @property
    def family(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def place(self) -> int: ...


C = TypeVar("C", bound=Candidate)
Answers = dict[str, list[C]]


def balanced(candidates: Sequence[C], shares: Mapping[str, float], number: int, stream: random.Random) -> list[C]:
    """About `number` candidates: in rounds, each of which takes one group and one candidate for each of its answers.

    So no answer of a group is more frequent than its others, as long as those last; a group with one answer left gives
    nothing any more. Families get their `shares`; one that has nothing left leaves its share to the others.
    """
    families: dict[str, dict[str, Answers[C]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for candidate in candidates:
        families[candidate.family][candidate.group][candidate.answer].append(candidate)
    for groups in families.values():
        for group in groups.values():
            for answers in group.values():
                stream.shuffle(answers)
    taken, counts = [], Counter()
    done = Counter({family: 0 for family in shares if family in families})
    while done and len(taken) < number:
        family = min(done, key=lambda name: done[name] / shares[name])
        groups = families[family]
        name = stream.choice(list(groups)) if groups else None
        if name is None:
            del done[family]
            continue
        for candidate in one_round(groups[name], counts):
            taken.append(candidate)
            counts[candidate.place] += 1
            done[family] += 1
        if not groups[name]:
            del groups[name]
    return taken


def one_round(answers: Answers[C], counts: Counter[int]) -> list[C]:
    """One candidate for each answer of a group, about pictures with few questions so far; none where fewer than two
    answers are left."""
    for answer in [answer for answer, left in answers.items() if not left]:
        del answers[answer]
    if len(answers) < 2:
        answers.clear()
        return []
    chosen = []
    for left in answers.values():
        ends = range(max(len(left) - LOOK_AT, 0), len(left))
        chosen.append(left.pop(min(ends, key=lambda number: counts[left[number].place])))
    return chosen
