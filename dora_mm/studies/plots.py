"""Figures, with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dora_mm.eval.statistics import ConfidenceInterval, mean_ci
from dora_mm.studies.curves import SCORES, RateCurve
from dora_mm.studies.decomposition import ChangePattern, WeightPoint
from dora_mm.studies.variants import NAMES, Variant

SIDE = 3.2  # inches of a panel
CROWDED = 4  # curves; a legend of more stands beside the panel
MANY_RATES = 8  # the numbers of more would overlap below an axis


def plot_patterns(
    points: Mapping[str, Sequence[WeightPoint]], patterns: Mapping[str, ChangePattern], folder: Path
) -> list[Path]:
    """Plots dM over dD with a panel for each method, as Fig. 3 of the paper does: a dot for each matrix and step.

    Later steps are darker. A line shows the slope, where there is one.

    Args:
        points: By method.
        patterns: By method.
        folder: Gets changes.svg and changes.png.

    Returns:
        Both files.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    columns = min(4, len(points))
    rows = -(-len(points) // columns)
    figure = Figure(figsize=(0.6 + SIDE * columns, 0.6 + SIDE * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, (method, own) in zip(panels, points.items(), strict=False):
        steps = sorted({point.step or 0 for point in own})
        shades = [(steps.index(point.step or 0) + 1) / len(steps) for point in own]
        x, y = np.array([(point.dD, point.dM) for point in own]).T
        panel.scatter(x, y, c=shades, cmap="Blues", vmin=-0.3, vmax=1.1, s=9, linewidths=0)
        found, title = patterns[method], method
        if found.slope is not None and found.correlation is not None:
            ends = np.array([x.min(), x.max()])
            panel.plot(ends, y.mean() + found.slope.mean * (ends - x.mean()), color="black", linewidth=1)
            title += f"\nslope {found.slope.mean:.2g}, correlation {found.correlation.mean:.2f}"
        panel.locator_params(nbins=5)
        panel.set_title(title, fontsize="medium")
        panel.set_xlabel("dD, change of direction")
        panel.set_ylabel("dM, change of length")
    for panel in panels[len(points) :]:
        panel.set_axis_off()
    return _saved(figure, folder / "changes")


def plot_curves(
    curves: Mapping[Variant, RateCurve],
    best: Mapping[Variant, float],
    title: str,
    folder: Path,
    *,
    band_of: Variant | None = None,
) -> list[Path]:
    """Plots the score over the learning rate, a panel per rank, and the best score over the rank (Fig. 7 of the paper).

    A line is the first seed, with the interval over things; dots with bars are rates with several trainings, and curves
    of one rate.

    Args:
        curves: By variant; full fine-tuning is in every panel.
        best: The chosen rate of each.
        title: What the scores are.
        folder: Gets curves.svg, curves.png and, of several ranks of plain methods, ranks.svg and ranks.png.
        band_of: The curve whose rates that are as good as its best are marked; None: of none.

    Returns:
        The files.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, LogLocator, NullFormatter

    ranks = sorted({variant.rank for variant in curves if variant.rank}) or [None]
    rates = sorted({rate for curve in curves.values() for rate in curve.points})
    columns = min(3, len(ranks))
    rows = -(-len(ranks) // columns)
    figure = Figure(figsize=(0.6 + 1.3 * SIDE * columns, 0.6 + SIDE * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for panel, rank in zip(panels, ranks, strict=False):
        for variant, curve in curves.items():
            if variant.rank in (rank, None):
                label = ", ".join(filter(None, [NAMES[variant.method], variant.setting]))
                _plot_curve(panel, curve, label, with_band=variant == band_of)
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(FixedLocator(rates) if len(rates) <= MANY_RATES else LogLocator(subs=(1, 3)))
        panel.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_title(f"rank {rank}" if rank else "", fontsize="medium")
        panel.set_xlabel("learning rate")
        is_crowded = len(panel.get_legend_handles_labels()[0]) > CROWDED
        outside: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if is_crowded else {}
        panel.legend(fontsize="small", frameon=False, **outside)
    for panel in panels[::columns]:
        panel.set_ylabel(title, fontsize="small")
    for panel in panels[len(ranks) :]:
        panel.set_axis_off()
    files = _saved(figure, folder / "curves")
    are_decimal = len(ranks) > 1 and not all(variant.setting for variant in curves)
    return files + (_plot_ranks(curves, best, title, folder) if are_decimal else [])


def _plot_curve(panel: Any, curve: RateCurve, label: str, *, with_band: bool) -> None:
    means = curve.first_KR.mean(axis=0)
    confidence_intervals = [mean_ci(column[:, None], bounds=SCORES) for column in curve.first_KR.T]
    (line,) = panel.plot(list(curve.points), means, label=label, linewidth=1.2)
    ends = [ci.low for ci in confidence_intervals], [ci.high for ci in confidence_intervals]
    panel.fill_between(list(curve.points), *ends, color=line.get_color(), alpha=0.12, linewidth=0)
    has_dots = len(curve.points) == 1
    repeated = {rate: point.ci for rate, point in curve.points.items() if len(point.seeds) > 1 or has_dots}
    _plot_confidence_intervals(panel, repeated, line.get_color())
    if with_band:
        low, high = curve.band
        panel.axvspan(2**low, 2**high, color=line.get_color(), alpha=0.1, linewidth=0, label=f"as good, {label}")


def _plot_confidence_intervals(
    panel: Any, confidence_intervals: Mapping[float, ConfidenceInterval], color: str, label: str = "", style: str = ""
) -> None:
    means = np.array([ci.mean for ci in confidence_intervals.values()])
    ends = [(ci.mean - ci.low, ci.high - ci.mean) for ci in confidence_intervals.values()]
    if confidence_intervals:
        bars = np.array(ends).T
        panel.errorbar(
            list(confidence_intervals),
            means,
            yerr=bars,
            fmt=f"o{style}",
            color=color,
            markersize=3,
            capsize=2,
            label=label,
        )


def _plot_ranks(
    curves: Mapping[Variant, RateCurve], best: Mapping[Variant, float], title: str, folder: Path
) -> list[Path]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.6 + 1.3 * SIDE, 0.6 + SIDE), layout="constrained")
    panel = figure.subplots()
    for number, method in enumerate(("lora", "dora")):
        own = {v.rank: c.points[best[v]].ci for v, c in curves.items() if v.method == method and not v.setting}
        by_rank = {float(rank): own[rank] for rank in sorted(rank for rank in own if rank)}
        _plot_confidence_intervals(panel, by_rank, f"C{number}", NAMES[method], "-")
    ranks = sorted({variant.rank for variant in curves if variant.rank})
    panel.set_xscale("log", base=2)
    panel.set_xticks(ranks, labels=[str(rank) for rank in ranks])
    panel.set_xlabel("rank")
    panel.set_ylabel(title, fontsize="small")
    panel.legend(fontsize="small", frameon=False)
    return _saved(figure, folder / "ranks")


def _saved(figure: Any, stem: Path) -> list[Path]:
    from matplotlib import rc_context

    files = [stem.with_suffix(f".{ending}") for ending in ("svg", "png")]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "dora_mm"}):  # letters as text, a third of their outlines
        for file in files:
            figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
    return files
