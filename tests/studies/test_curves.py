"""Scores over learning rates: bands, best rates and differences, on curves worked by hand."""

import numpy as np
import pytest

from dora_mm.studies.curves import (
    CurvePoint,
    RateCurve,
    band,
    curves_csv,
    curves_paragraphs,
    difference,
    rate_per_doubling,
)
from dora_mm.studies.plots import plot_curves
from dora_mm.studies.variants import Variant

LOG2 = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
THINGS = np.random.default_rng(0).normal(size=(30, 1)) / 10


def curve(means, seeds=(0,), noise=0.0):
    """A curve over the rates 1, 2, 4 ... whose scores have these means."""
    rng = np.random.default_rng(1)
    shape = (30, len(seeds))
    things = THINGS - THINGS.mean()
    cells = [mean + things + noise * rng.normal(size=shape) for mean in means]
    return RateCurve({2.0**place: CurvePoint(found, tuple(seeds)) for place, found in enumerate(cells)})


def test_the_band_ends_where_the_score_has_lost_its_depth():
    means = np.array([[0.0, 0.8, 1.0, 0.9, 0.1], [1.0, 0.0, 1.0, 2.0, 2.0], [0.0, 0.2, 0.3, 0.4, 0.1]])
    low, high = band(LOG2, means, 0.5)
    assert low == pytest.approx([1 - 0.3 / 0.8, 2.5, 0.0])  # 0.8 falls to 0.5 on its way to 0; no leap over a valley
    assert high == pytest.approx([3 + 0.4 / 0.8, 4.0, 4.0])


def test_ends_are_open_where_the_curve_has_not_fallen():
    falling = curve([0.0, 1.0, 1.0, 0.999])
    assert falling.open_ends() == [8.0]
    assert falling.half_width == pytest.approx(1.96 * THINGS.std() / 30**0.5, rel=0.1)


def test_the_best_rate_falls_by_half_a_doubling_per_doubling_of_the_rank():
    curves = {1: curve([0, 0, 0, 1]), 4: curve([0, 0, 1, 0]), 16: curve([0, 1, 0, 0])}
    found = rate_per_doubling(curves)
    assert (found.mean, found.low, found.high) == pytest.approx((-0.5, -0.5, -0.5))


def test_differences_are_paired_over_the_seeds_that_both_have():
    first = CurvePoint(THINGS + np.array([0.5, 1.0, 9.0]), (0, 1, 2))
    second = CurvePoint(THINGS + np.array([0.9, 0.4]), (1, 0))
    found = difference(first, second)  # 0.1 of each of the seeds 0 and 1
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))


def test_the_mean_around_a_rate_has_the_seeds_of_all_three():
    points = {1.0: CurvePoint(np.full((3, 2), 1.0), (0, 1)), 2.0: CurvePoint(np.full((3, 2), 2.0), (0, 1))}
    found = RateCurve({**points, 4.0: CurvePoint(np.full((3, 1), 6.0), (0,))}).ci_around(2.0)
    assert found.seeds == (0,)
    assert found.cells_KS.tolist() == [[3.0]] * 3


def test_the_paragraphs_name_rates_widths_and_differences(tmp_path):
    lora, dora, faster = Variant("lora", 4), Variant("dora", 4), Variant("dora", 4, "b4")
    curves = {
        Variant("lora", 1): curve([0.0, 0.5, 0.0]),
        lora: curve([0.0, 0.5, 0.0]),
        dora: curve([0.1, 0.5, 0.45, 0.1], (0, 1), noise=0.01),  # a mean score below 0 is impossible
        faster: curve([0.5, 0.0, 0.0]),
    }
    best = {variant: 1.0 if variant == faster else 2.0 for variant in curves}
    text = "\n".join(curves_paragraphs(curves, best, [1, 4], "score of the test"))
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert "score of the test" in text
    cells = [row.split(" | ") for row in rows]
    assert next(row for row in cells if row[0] == "| LoRA, rank 4")[1:3] == ["2", "1"]
    assert next(row for row in cells if row[0] == "| DoRA, rank 4, b4")[5].startswith("< 1 to")
    compared = next(row for row in cells if row[0] == "| DoRA, rank 4 - LoRA, rank 4")
    assert compared[1].startswith(("0.00", "-0.00"))
    p = difference(curves[dora].points[2.0], curves[lora].points[2.0]).p
    assert compared[2] == f"{p:.2g} ({min(1.0, 2 * p):.2g})"  # the smaller one of two
    assert compared[6].endswith("! |")  # the band of the curve with two high rates is wider
    assert any(row[0] == "| DoRA, rank 4, b4 - DoRA, rank 4" for row in cells)
    assert "per doubling of the rank: LoRA 0.00 (0.00 to 0.00)." in text
    assert len(curves_csv(curves).splitlines()) == 1 + 3 + 3 + 4 + 3
    files = plot_curves(curves, best, "score", tmp_path)
    assert sorted(file.name for file in files) == ["curves.png", "curves.svg", "ranks.png", "ranks.svg"]
    assert all(file.stat().st_size > 5000 for file in files)


def test_the_rates_that_are_as_good_are_marked_in_one_curve(tmp_path):
    quarter, half = Variant("dora", 4, "15 steps"), Variant("dora", 4, "30 steps")
    curves = {quarter: curve([0.0, 0.5, 0.45, 0.0]), half: curve([0.5])}
    files = plot_curves(curves, {}, "score", tmp_path, band_of=quarter)
    assert sorted(file.name for file in files) == ["curves.png", "curves.svg"]  # no ranks: these are no plain methods
    text = files[0].read_text()
    assert ">as good, DoRA, 15 steps<" in text
    assert "as good, DoRA, 30 steps" not in text
    assert "15_steps" in quarter.key
