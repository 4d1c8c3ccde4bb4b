"""Successive halving on recorded scores, and where trainings diverge."""

from math import inf

import pytest

from dora_mm.studies.campaigns.halving import Candidate, Rung, halving, lengths, planned
from dora_mm.studies.campaigns.selection_metrics import KEPT

# Likeness of the embedded SDXL model's bricks (DoRA, rank 4, seed 0) by steps and rate, and of the bare model; and what
# the classifier of docs/studies/paper.md has for the same trainings.
LIKENESS = {
    15: {0.0032: 0.7655, 0.0056: 0.7766, 0.01: 0.7820, 0.018: 0.8415, 0.032: 0.8348},
    30: {0.0032: 0.7763, 0.0056: 0.7868, 0.01: 0.8288, 0.018: 0.8362, 0.032: 0.7861},
    60: {0.0032: 0.7930, 0.0056: 0.8239, 0.01: 0.8501, 0.018: 0.8649, 0.032: 0.6518},
}
BARE = 0.7695
SLACK = {steps: (max(own.values()) - BARE) * (1 - KEPT) for steps, own in LIKENESS.items()}
CLASSIFIER = {0.0032: 0.085, 0.0056: 0.407, 0.01: 0.591, 0.018: 0.413, 0.032: 0.000}
BAND = (0.0053, 0.014)  # "as good" of DoRA at rank 4 there


class Recorded:
    """Measures by a table, and counts steps of trainings."""

    def __init__(self, scores, slack=None):
        self.scores, self.slack, self.trained = scores, slack or {}, {}

    def __call__(self, steps, candidates):
        for each in candidates:
            self.trained.setdefault((steps, each), steps)
        found = {each: self.scores[steps][each.rate] for each in candidates}
        return Rung(steps, found, self.slack.get(steps, 0.0))

    @property
    def steps(self):
        return sum(self.trained.values())


def candidates(*rates, rank=4):
    return [Candidate(rank, rate) for rate in rates]


def test_recorded_scores_give_a_rate_within_the_band_at_a_quarter_of_the_cost():
    measure = Recorded(LIKENESS, SLACK)
    rungs = halving(candidates(*CLASSIFIER), 60, measure)
    chosen = rungs[-1].order[0].rate
    assert BAND[0] <= chosen <= BAND[1]
    assert chosen == max(CLASSIFIER, key=CLASSIFIER.__getitem__)
    assert [len(rung.scores) for rung in rungs] == [5, 2, 1]
    assert measure.steps == 3.25 * 60  # the curve took 14 trainings
    assert max(LIKENESS[60], key=LIKENESS[60].__getitem__) > BAND[1]  # the highest likeness would not do


def test_rates_that_learn_nothing_are_not_as_good_as_one_that_learns_little():
    """In 15 steps of the same model no rate of these but the last learns, and its interval has all others in it."""
    likeness = {1.2e-4: 0.7695, 3.8e-4: 0.7694, 1.2e-3: 0.7688, 3.8e-3: 0.765, 1.2e-2: 0.7888}
    rung = Rung(15, {Candidate(4, rate): score for rate, score in likeness.items()}, (0.7888 - BARE) * (1 - KEPT))
    assert rung.survivors(2) == candidates(1.2e-2, 3.8e-3)
    assert rung.beyond() == candidates(3.8e-2)


def test_every_length_is_a_part_of_the_steps():
    assert lengths(600) == [150, 300, 600]
    assert lengths(3) == [1, 3]
    assert lengths(1) == [1]


def test_what_is_as_good_is_taken_from_the_lowest_rank_and_rate_up():
    scores = {Candidate(8, 1e-3): 0.9, Candidate(4, 1e-2): 0.88, Candidate(4, 1e-3): 0.5, Candidate(8, 1e-2): -inf}
    assert Rung(1, scores, 0.05).order[:2] == [Candidate(4, 1e-2), Candidate(8, 1e-3)]
    assert Rung(1, scores).order == [Candidate(8, 1e-3), Candidate(4, 1e-2), Candidate(4, 1e-3), Candidate(8, 1e-2)]


def test_the_next_lower_rate_goes_on_with_each():
    scores = dict(zip(candidates(1e-3, 1e-2, 1e-1, 1.0), (0.1, 0.2, 0.8, 0.7), strict=True))
    assert Rung(1, scores).survivors(3) == candidates(1e-1, 1e-2, 1.0)
    assert Rung(1, scores).survivors(1) == candidates(1e-1)


def test_rates_are_extended_while_an_end_is_the_best():
    table = {1e-3: 0.1, 1e-2: 0.2, 1e-1: 0.3, 1.0: 0.25, 1e-4: 0.0}
    scores = dict.fromkeys((1, 2, 4), table)
    assert set(halving(candidates(1e-3, 1e-2), 4, Recorded(scores), extra=2)[0].scores) == set(
        candidates(1e-3, 1e-2, 1e-1, 1.0)
    )
    found = halving(candidates(1e-3, 1e-2), 4, Recorded(scores), extra=2)
    assert [len(rung.scores) for rung in found] == [4, 1]  # and no more of them go on
    measure = Recorded(scores)
    assert halving(candidates(1e-3, 1e-2), 4, measure, extra=5, rates=(0.0, 1.0))[-1].order == candidates(1e-1)
    assert set(halving(candidates(1e-3, 1e-2), 4, Recorded(scores))[0].scores) == set(candidates(1e-3, 1e-2))


def test_one_that_is_left_goes_to_the_end_at_once():
    measure = Recorded({steps: {1e-3: 0.1, 1e-2: 0.2, 1e-1: 0.1} for steps in (1, 2, 4)})
    assert [rung.steps for rung in halving(candidates(1e-3, 1e-2, 1e-1), 4, measure)] == [1, 4]


def test_the_next_one_takes_the_place_of_one_that_diverges_at_the_end():
    table = {1: {1e-3: 0.2, 1e-2: 0.4, 1e-1: 0.3}, 4: {1e-3: 0.3, 1e-2: -inf, 1e-1: 0.5}}
    assert halving(candidates(1e-3, 1e-2, 1e-1), 4, Recorded(table))[-1].order[0] == Candidate(4, 1e-1)
    diverged = {steps: dict.fromkeys((1e-3, 1e-2, 1e-1), -inf) for steps in (1, 2, 4)}
    with pytest.raises(ValueError, match=r"all trainings of 1 steps have diverged, at rates of 0.001, 0.01, 0.1"):
        halving(candidates(1e-3, 1e-2, 1e-1), 4, Recorded(diverged))


def test_two_rates_are_both_trained_to_the_end():
    (rung,) = halving(candidates(1e-3, 1e-2), 4, Recorded({4: {1e-3: 0.2, 1e-2: 0.4}}))
    assert (rung.steps, len(rung.scores)) == (4, 2)


@pytest.mark.parametrize("count", range(1, 12))
def test_the_plan_is_what_is_trained(count):
    rates = [float(number) for number in range(1, count + 1)]
    table = {steps: dict(zip(rates, rates, strict=True)) for steps in (5, 10, 20)}
    rungs = halving(candidates(*rates), 20, Recorded(table))
    assert planned(20, count) == {rung.steps: len(rung.scores) for rung in rungs}
    nothing = halving(candidates(*rates), 20, lambda steps, found: Rung(steps, dict.fromkeys(found, 0.5), 0.1, False))
    assert planned(20, count, learned=False) == {rung.steps: len(rung.scores) for rung in nothing}


def test_where_nothing_was_learned_all_go_on_and_at_the_end_nothing_is_chosen():
    """In 15 steps of another style no rate moved the likeness, and the lowest, which never learns, was chosen."""
    rates, learned = (1e-4, 1e-3, 1e-2), {15: False, 30: True, 60: True}

    def measure(steps, candidates):
        found = {each: 0.77 + (each.rate if learned[steps] else 0) for each in candidates}
        return Rung(steps, found, 0.001, learned[steps])

    rungs = halving(candidates(*rates), 60, measure, extra=2)
    assert [len(rung.scores) for rung in rungs] == [3, 3, 1]
    assert rungs[-1].order[0].rate == 1e-2
    learned[30] = learned[60] = False
    assert [rung.learned for rung in halving(candidates(*rates), 60, measure)] == [False] * 3
