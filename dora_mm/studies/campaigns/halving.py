"""Successive halving: many candidates are trained for short, the better half of them for longer, one to the end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import NamedTuple

from dora_mm.studies.campaigns.rates import beyond

FEW = 2  # candidates that are all trained to the end: half of two is no choice
PARTS = (4, 2, 1)  # of all steps: a quarter, a half, all of them; five rates then cost 3 1/4 trainings


class Candidate(NamedTuple):
    """A rank, None where the method has none, and a learning rate."""

    rank: int | None
    rate: float


@dataclass(frozen=True)
class Rung:
    """Candidates that were trained for one length.

    Attributes:
        steps: The length, in optimizer steps.
        scores: By candidate, higher is better; -inf: it has diverged.
        slack: What a candidate may lose against the highest score and be as good.
        learned: Whether any candidate has learned something in these steps. Else its scores say nothing of rates.
    """

    steps: int
    scores: dict[Candidate, float]
    slack: float = 0.0
    learned: bool = True

    @cached_property
    def as_good(self) -> list[Candidate]:
        """The candidates that are as good as that of the highest score, from the lowest rank and rate up."""
        least = max(self.scores.values()) - self.slack
        return sorted(each for each, score in self.scores.items() if score >= least)

    @property
    def order(self) -> list[Candidate]:
        """All candidates: those that are as good first, the others by score."""
        others = sorted(self.scores.keys() - set(self.as_good), key=lambda each: (-self.scores[each], each))
        return [*self.as_good, *others]

    def survivors(self, count: int) -> list[Candidate]:
        """The candidates that are trained for longer.

        Each brings the next lower rate that was tried with it, since a longer schedule has its best rate lower: of the
        embedded model of images (bricks, rank 4) it is 0.018 in 15 steps, 0.01 to 0.018 in 30, 0.01 in 60.

        Args:
            count: How many; one is the first of the order.
        """
        found: dict[Candidate, None] = {}
        for each in self.order:
            lower = [other for other in self.scores if other.rank == each.rank and other.rate < each.rate]
            found |= dict.fromkeys([each, *([max(lower)] if lower else [])])
        return list(found)[:count]

    @property
    def alive(self) -> list[Candidate]:
        """The candidates that have not diverged."""
        return [each for each, score in self.scores.items() if score > -inf]

    @property
    def has_failed(self) -> bool:
        """Whether all candidates have diverged."""
        return max(self.scores.values()) == -inf

    def beyond(self) -> list[Candidate]:
        """The next candidates outside of what was tried, where an end of the rates is as good as any."""
        found = []
        for rank in dict.fromkeys(each.rank for each in self.as_good):
            rates = sorted(each.rate for each in self.scores if each.rank == rank)
            ends = [end for end in (rates[0], rates[-1]) if Candidate(rank, end) in self.as_good and len(rates) > 1]
            found += [Candidate(rank, float(f"{beyond(rates, end):.2g}")) for end in ends]
        return found


def lengths(steps: int) -> list[int]:
    """The lengths of the rungs of a training, ascending."""
    return sorted({steps // part for part in PARTS} - {0})


def rung_lengths(steps: int, num_candidates: int, extra: int) -> list[int]:
    """The lengths at which so many candidates are measured: a few, which are not extended, only at the full one."""
    return lengths(steps)[-1:] if num_candidates <= FEW and not extra else lengths(steps)


def planned(steps: int, num_candidates: int, extra: int = 0, *, learned: bool = True) -> dict[int, int]:
    """How many trainings a search has by length, where it extends no rates and none diverges.

    Args:
        steps: The full length.
        num_candidates: How many candidates there are.
        extra: How often the rates may be extended.
        learned: Whether some candidate has learned something at every length; else all go on.
    """
    if not learned:
        return dict.fromkeys(rung_lengths(steps, num_candidates, extra), num_candidates)
    found: dict[int, int] = {}
    pending = num_candidates
    for length in rung_lengths(steps, num_candidates, extra):
        if not found or pending > 1 or length == steps:
            found[length] = pending
            pending = max(1, pending // 2)
    return found


def halving(
    candidates: Sequence[Candidate],
    steps: int,
    measure: Callable[[int, list[Candidate]], Rung],
    *,
    extra: int = 0,
    rates: tuple[float, float] = (0.0, inf),
) -> list[Rung]:
    """Measures all candidates at the shortest length, and at each further one the better half of those before.

    Every length is a whole schedule, warm-up and decay included: in the middle of one, low rates look better than they
    end. Where one candidate is left, it goes on to the full length at once; where that diverges,
    the next of those before replaces it. Where none has learned anything, all go on. Two candidates are both trained to
    the end at once.

    Args:
        candidates: The candidates.
        steps: The full length.
        measure: Trains and scores candidates at a length; repeated requests cost nothing.
        extra: How often the rates of the first rung are extended while an end is as good as any. No more go on for it.
        rates: The lowest rate that the optimizer takes, and the one from which on it takes none.

    Returns:
        The rungs. The first of the last one's order is chosen, if any has learned something.

    Raises:
        ValueError: All candidates have diverged.
    """
    rungs: list[Rung] = []
    pending = list(candidates)
    for length in rung_lengths(steps, len(candidates), extra):
        if rungs and len(pending) == 1 and length < steps:
            continue
        rung = measure(length, pending)
        for _ in range(0 if rungs or not rung.learned else extra):
            more = [each for each in rung.beyond() if rates[0] <= each.rate < rates[1] and each not in rung.scores]
            rung = measure(length, [*rung.scores, *more]) if more else rung
        spare = [each for each in rungs[-1].order if each not in rung.scores] if rungs else []
        while rung.has_failed and spare:
            rung = measure(length, [*rung.scores, spare.pop(0)])
        if rung.has_failed:
            tried = ", ".join(f"{each.rate:g}" for each in sorted(rung.scores))
            raise ValueError(f"all trainings of {length} steps have diverged, at rates of {tried}: give lower ones")
        rungs.append(rung)
        pending = rung.survivors(max(1, len(pending) // 2)) if rung.learned else rung.alive
    return rungs
