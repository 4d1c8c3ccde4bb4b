"""Learning rates: candidates, the best one, its neighbours, and the next ones to try."""

import pytest

from dora_mm.studies.campaigns.rates import beyond, candidate_rates, choice_of, with_neighbours
from dora_mm.studies.config import LearningRates
from dora_mm.studies.variants import FULL, Variant

DORA = Variant("dora", 2)


def test_the_best_rate_is_marked_where_a_better_one_may_lie_outside():
    assert choice_of({1e-2: 3.0, 1e-3: 1.0, 1e-1: 3.0}) == (1e-2, False)  # the lower one of two that are equal
    assert str(choice_of({1e-3: 1.0, 1e-2: 2.0, 1e-1: 3.0})) == "0.1*"


def test_the_next_rate_lies_as_far_beyond_an_end_as_the_last_one():
    assert beyond([1e-2, 1e-3, 2e-2], 2e-2) == pytest.approx(4e-2)
    assert beyond([1e-2, 1e-3, 2e-2], 1e-3) == pytest.approx(1e-4)
    assert beyond([3e-3, 1e-3], 1e-3) == 3.33333e-4  # as its name has it


def test_neighbours_are_the_rates_that_were_tried_next_to_the_best():
    assert with_neighbours([3.0, 1.0, 2.0, 4.0], 2.0) == [1.0, 2.0, 3.0]
    assert with_neighbours([3.0, 1.0, 2.0], 1.0) == [1.0, 2.0]
    assert with_neighbours([3.0, 1.0, 2.0], 3.0) == [2.0, 3.0]


def test_candidates_are_those_of_the_method():
    rates = LearningRates(full=(1.0, 2.0, 3.0), lora=(4.0, 5.0, 6.0), dora=(7.0, 8.0, 9.0))
    found = candidate_rates(rates, [FULL, DORA, Variant("dora", 1, "b4")])
    assert found == {FULL: (1.0, 2.0, 3.0), DORA: (7.0, 8.0, 9.0), Variant("dora", 1, "b4"): (7.0, 8.0, 9.0)}
