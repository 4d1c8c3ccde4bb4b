"""dora-mm analyse: what training did to lengths and directions of the weights (the paper's Fig. 3), with intervals.

Writes changes.csv (every matrix at every checkpoint), methods.csv, analysis.md and the figure; of comparisons
scored_trainings.csv and scores.csv; and of runs that have measured gradients (train.gradients_at), gradients.csv.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dora_mm.config.loader import load_config
from dora_mm.eval.gradients import GradientShape, read_gradients
from dora_mm.eval.statistics import ConfidenceInterval, columns
from dora_mm.studies.analysis import distinct_names, find_sources, read_points
from dora_mm.studies.campaigns.training_rows import TrainingRows, rows_file
from dora_mm.studies.config import CampaignConfig
from dora_mm.studies.decomposition import (
    ChangePattern,
    Relation,
    WeightPoint,
    over_matrices_and_runs,
    pattern,
    relation_to_score,
    scored_trainings,
)
from dora_mm.studies.plots import plot_patterns
from dora_mm.utils.atomic import write_text
from dora_mm.utils.folders import new_folder
from dora_mm.utils.tables import csv_records, markdown_records

log = logging.getLogger(__name__)
EXPLAINED = """dM is the mean over the rows of a weight by which their length changed, dD that of 1 - cos between a row
and itself before training (Eq. 1 of the paper). Slope and correlation are those of dM over dD, over all matrices and
checkpoints of a method; dM and dD are means at the last checkpoint. In brackets: 95 % intervals of the jackknife over
matrices and, where there are several, over trainings."""


GRADIENTS = """Gradients with respect to W' and to V (Eq. 8), means over matrices with 95 % intervals of the jackknife
over matrices and, where there are several, over trainings. exact and detached: ||dL/dV|| / ||dL/dW'||, with the norm
differentiated and as a constant. along: the share of dL/dW' along the rows of V, as a length, which the exact gradient
loses. condition and rank: the common logarithm of the condition number (12: at least that), and the effective rank, of
the second moments over rows, of dL/dW' and (projected) of the exact dL/dV. random: the control, random rows in the
place of V's, with the coefficients of V's in condition and rank: what any projection does to a gradient of few
directions. It is the mean over draws for each matrix, and sd their standard deviation, of condition that of the common
logarithm. magnitude: |dL/dm|."""


def main(
    runs: Sequence[str], *, base: str | None = None, modules: str | None = None, output: str | None = None
) -> None:
    """Reads the weights one at a time, writes the tables, the page and the figure, and prints the page.

    Args:
        runs: Run directories, folders of campaigns, adapter files of any tool, or fine-tuned models.
        base: The base model; None: that of each run's config.
        modules: A regular expression that a module's name has to match in full; None: all.
        output: A new folder; None: a numbered one in runs/analysis.

    Raises:
        ValueError: Something is not there or cannot be read, has no known base model, or nothing matches.
    """
    try:
        wanted = re.compile(modules) if modules else None
    except re.error as error:
        raise ValueError(f"--modules: {modules} is no regular expression: {error}") from None
    found = [source for run in runs for source in find_sources(run, base, scores_of(run))]
    sources = distinct_names(found)
    points = [point for source in sources for point in read_points(source, wanted)]
    by_method = grouped(points)
    patterns = {method: pattern(own) for method, own in by_method.items()}
    folders = {new.run: Path(old.run) for old, new in zip(found, sources, strict=True)}
    gradients = [
        {"run": name, "step": str(step), **row}
        for name, run in folders.items()
        for step, rows in read_gradients(run).items()
        for row in rows
    ]
    scored = scored_trainings(points)
    related = relation_to_score(scored)
    page = "\n\n".join([*paragraphs(patterns), *about_scores(related, len(scored)), *about_gradients(gradients)])
    tables = {
        "changes.csv": [row_of(point) for point in points],
        "scored_trainings.csv": [cells_of(each._asdict()) for each in scored],
        "scores.csv": [relation_row(*each) for each in related.items()],
        "gradients.csv": gradients,
        "methods.csv": [numbers(method, found) for method, found in patterns.items()],
    }

    def fill(folder: Path) -> None:
        for name, rows in tables.items():
            if rows:
                write_text(folder / name, csv_records(rows))
        write_text(folder / "analysis.md", f"# What training changed\n\n![dM over dD](changes.svg)\n\n{page}\n")
        try:
            plot_patterns(by_method, patterns, folder)
        except ModuleNotFoundError as error:
            log.warning("The figure is left out: it needs %s (pip install 'dora_mm[eval]').", error.name)

    folder = new_folder("analysis", output, fill)
    print(f"{page}\n\npage     {folder / 'analysis.md'}")
    if (image := folder / "changes.svg").exists():
        print(f"figure   {image}")


def grouped(points: Sequence[WeightPoint]) -> dict[str, list[WeightPoint]]:
    """The points by method, in the order in which they are met."""
    found: dict[str, list[WeightPoint]] = defaultdict(list)
    for point in points:
        found[point.method].append(point)
    return dict(found)


def paragraphs(patterns: Mapping[str, ChangePattern]) -> list[str]:
    """The page: what the numbers are, and the table of methods."""
    rows = [
        {
            "method": method,
            "trainings": str(found.num_runs),
            "matrices": str(found.num_matrices),
            "points": str(found.num_points),
            "slope": shown(found.slope),
            "correlation": shown(found.correlation),
            "dM": shown(found.dM),
            "dD": shown(found.dD),
        }
        for method, found in patterns.items()
    ]
    return [EXPLAINED, markdown_records(rows)]


def about_scores(related: Mapping[str, Relation], num_trainings: int) -> list[str]:
    """How what changed goes with the scores of trainings."""
    if not related:
        return []
    table = [
        {"of each training": name, "of ranks": shown(found.ranks), "Pearson's": shown(found.pearson)}
        for name, found in related.items()
    ]
    title = (
        f"Correlation with the score by which rates were chosen, over {num_trainings} trainings of all methods; where "
        "both differ, a few trainings, such as those whose rate fails, decide Pearson's:"
    )
    return [title, markdown_records(table)]


def relation_row(name: str, found: Relation) -> dict[str, str]:
    """A row of scores.csv."""
    cells = {f"{kind}_{end}": text for kind, each in found._asdict().items() for end, text in six_digits(each).items()}
    return {"of_each_training": name, **cells}


def six_digits(ci: ConfidenceInterval | None) -> dict[str, str]:
    return columns(ci, "{:.6g}")


def scores_of(path: str) -> dict[str, float]:
    """The scores by which rates were chosen, by the names of trainings, where the path is that of a campaign."""
    config = Path(path) / "config.yaml"
    campaign = load_config(config) if config.is_file() else None
    if not isinstance(campaign, CampaignConfig):
        return {}
    rows = TrainingRows(rows_file(campaign, Path(path)), lambda _: "").found
    return {name: row.number for name, row in rows.items() if row.value}


def about_gradients(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Table of gradient shapes by method and step: means over matrices, geometric ones of condition numbers."""
    if not rows:
        return []
    groups: dict[tuple[str, int], list[Mapping[str, str]]] = defaultdict(list)
    for row in rows:
        groups[row["method"], int(row["step"])].append(row)
    table = []
    for (method, step), own in sorted(groups.items()):
        matrices, runs = (np.array([row[key] for row in own]) for key in ("matrix", "run"))
        values = {key: np.array([float(row[key]) for row in own]) for key in GradientShape._fields if key != "norm"}
        values |= {key: np.log10(values[key]) for key in values if key.startswith("condition")}
        means = {key: shown(over_matrices_and_runs(np.mean, each, matrices, runs)) for key, each in values.items()}
        counts = {"trainings": str(len(set(runs))), "matrices": str(len(set(matrices)))}
        table.append({"method": method, "step": str(step), **counts, **means})
    return [GRADIENTS, markdown_records(table)]


def shown(ci: ConfidenceInterval | None) -> str:
    return "-" if ci is None else ci.text("{:.3g}")


def cells_of(values: Mapping[str, str | float]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else f"{value:.6g}" for name, value in values.items()}


def row_of(point: WeightPoint) -> dict[str, str]:
    step, score = ("" if value is None else f"{value:g}" for value in (point.step, point.score))
    about = {"method": point.method, "run": point.run, "step": step, "matrix": point.matrix}
    return about | {"dM": f"{point.dM:.6g}", "dD": f"{point.dD:.6g}", "score": score}


def numbers(method: str, found: ChangePattern) -> dict[str, str]:
    """A row of methods.csv."""
    counts = {"trainings": found.num_runs, "matrices": found.num_matrices, "points": found.num_points}
    row = {"method": method, **{name: str(count) for name, count in counts.items()}}
    for name in ("slope", "correlation", "dM", "dD"):
        row |= {f"{name}_{end}": text for end, text in six_digits(getattr(found, name)).items()}
    return row
