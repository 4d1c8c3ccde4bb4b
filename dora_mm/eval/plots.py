"""Figures, with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dora_mm.eval.decomposition import ChangePattern, WeightPoint

SIDE = 3.2  # inches of a panel


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
    files = [folder / f"changes.{ending}" for ending in ("svg", "png")]
    for file in files:
        figure.savefig(file, dpi=150)
    return files
