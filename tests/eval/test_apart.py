"""Which losses stay apart: planted ones are found, and of clean data sets nearly none."""

import numpy as np
import pytest

from dora_mm.eval.apart import FEWEST, apart, deviations

TIMES = 8


def measurements(count, seed, *, steps=3, factor=1.0, learned=1.0, groups=("512",)):
    """Losses of images that differ by 20 %, over eight times that differ by a factor of 100, and fall by a third.

    The first image has `factor` times the loss, and falls by a share `learned` of what the others do.
    """
    random = np.random.default_rng(seed)
    own, noise = random.normal(0, 0.2, count), random.normal(0, 0.1, (count, len(groups), TIMES))
    found = []
    for step in range(steps + 1):
        fall = 0.4 * step / steps * random.normal(1, 0.05, count)
        fall[0] *= learned
        losses = {}
        for image in range(count):
            scale = np.exp(own[image] - fall[image]) * (factor if image == 0 else 1)
            losses[str(image)] = {
                (group, time): float(scale * np.exp(noise[image, number, time]) * 100 ** (-time / TIMES) / (1 + number))
                for number, group in enumerate(groups)
                for time in range(TIMES)
            }
        found.append(losses)
    return [deviations(found[0] if number else None, each) for number, each in enumerate(found)]


@pytest.mark.parametrize("count", [10, 25, 200])
def test_a_planted_image_is_marked(count):
    """By its loss, where it is of another kind; by its change, where only its caption is wrong."""
    seeds = range(20)
    higher = [apart(measurements(count, seed, factor=6.0)) for seed in seeds]
    assert sum(marks.get("0") == "higher than the others" for marks in higher) >= 16
    unlearned = [apart(measurements(count, seed, learned=0.0)) for seed in seeds]
    assert sum(marks.get("0") == "falls less than the others" for marks in unlearned) >= 16


@pytest.mark.parametrize("count", [10, 25, 200])
def test_of_a_clean_set_nothing_is_marked_most_of_the_time(count):
    marked = [bool(apart(measurements(count, seed))) for seed in range(60)]
    assert sum(marked) <= 9


def test_few_images_tell_nothing_and_a_single_high_measurement_neither():
    assert apart(measurements(FEWEST - 1, 0, factor=20.0)) == {}
    high, usual = measurements(25, 0, factor=20.0), measurements(25, 0)
    assert "0" in apart(high)
    assert "0" not in apart([*high[:-1], usual[-1]])


def test_the_times_and_resolutions_explain_nothing_of_an_image(caplog):
    """An image that is at one resolution only is compared with the others at that one."""
    both = measurements(25, 1, groups=("512", "1024"), factor=1.0)
    assert apart(both) == {}
    losses = {str(n): {("512", 0): 1.0 + 0.01 * n, ("1024", 0): 100.0 + n} for n in range(20)}
    losses["small"] = {("512", 0): 1.1}
    losses["large"] = {("1024", 0): 110.0}
    found = deviations(None, losses)
    assert abs(found["small"].level) < 2
    assert abs(found["large"].level) < 2


def test_equal_losses_divide_by_nothing():
    losses = {str(n): {("512", 0): 0.0} for n in range(9)}
    assert {each.level for each in deviations(losses, losses).values()} == {0.0}
