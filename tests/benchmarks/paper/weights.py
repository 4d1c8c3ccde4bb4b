"""What `dora-mm analyse` has written of weights and gradients, as tables with the controls of the page."""

import csv
import re
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from dora_mm.eval.statistics import ConfidenceInterval, mean_ci
from dora_mm.studies.decomposition import WeightPoint, correlation, over_matrices_and_runs, pattern, relation
from tests.benchmarks.paper.campaigns import RESULTS

Records = list[dict[str, str]]
LORA = "lora, rank 8"
METHODS = {"dora, rank 8": "DoRA", LORA: "LoRA", "full": "full fine-tuning"}
SCORED = {
    "tuned_vl": "VL-BART",
    "settings": "SDXL, rank 4",
    "candidates": "candidates",
}


def records(name: str) -> list[dict[str, str]]:
    """The records of a CSV file in results/paper."""
    with (RESULTS / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def seed_of(run: str) -> str:
    """The seed of a run such as dora-0."""
    return run.rpartition("-")[2]


# --- lengths and directions ------------------------------------------------------------------------------------------


def changes() -> dict[str, list[WeightPoint]]:
    """The points of changes.csv by method, with seeds in the place of runs, so that methods are paired by these."""
    found: dict[str, list[WeightPoint]] = defaultdict(list)
    for row in records("changes.csv"):
        about = (row["method"], seed_of(row["run"]), int(row["step"]), row["matrix"])
        found[row["method"]].append(WeightPoint(*about, float(row["dM"]), float(row["dD"])))
    return dict(found)


def pattern_table() -> Records:
    """How lengths and directions changed and go together by method, and the differences from LoRA."""
    points, table = changes(), []
    for method, title in METHODS.items():
        found = pattern(points[method])
        table.append(pattern_row(title, found.correlation, found.dM, found.dD))
    for method in METHODS:
        if method != LORA:
            pair = points[method], points[LORA]
            sizes = [of_two(*map(at_end, pair), mean_of(column)) for column in (1, 0)]
            table.append(pattern_row(f"{METHODS[method]} less LoRA", of_two(*pair, correlation), *sizes))
    return table


def pattern_row(
    title: str, related: ConfidenceInterval | None, dM: ConfidenceInterval, dD: ConfidenceInterval
) -> dict[str, str]:
    assert related is not None
    sizes = {"dM": dM.text("{:.4f}"), "dD": dD.text("{:.4f}")}
    return {"": title, "correlation": related.text("{:.2f}"), **sizes}


def at_end(points: Sequence[WeightPoint]) -> list[WeightPoint]:
    """The points of the last step."""
    last = max(point.step or 0 for point in points)
    return [point for point in points if point.step == last]


def mean_of(column: int) -> Callable[[np.ndarray], float]:
    return lambda values: float(values[:, column].mean())


def of_two(
    first: Sequence[WeightPoint], second: Sequence[WeightPoint], statistic: Callable[[np.ndarray], float]
) -> ConfidenceInterval:
    """A statistic of (dD, dM) of one method less that of another, over the same matrices and seeds."""
    points = [*first, *second]
    values = np.array([(point.dD, point.dM, place < len(first)) for place, point in enumerate(points)])
    matrices, seeds = (np.array([getattr(point, name) for point in points]) for name in ("matrix", "run"))

    def less(some: np.ndarray) -> float:
        ours = some[:, 2] == 1
        return statistic(some[ours, :2]) - statistic(some[~ours, :2])

    return over_matrices_and_runs(less, values, matrices, seeds)


def ratios_at_equal_rates() -> Records:
    """How many times as large DoRA's changes are as LoRA's at the same rate and seed, on VL-BART: geometric means."""
    rows = {row["run"]: row for row in records("tuned_vl/scored_trainings.csv")}
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for run, row in rows.items():
        if run.startswith("dora") and (other := rows.get(f"lora{run.removeprefix('dora')}")):
            logs = [float(np.log(float(row[name]) / float(other[name]))) for name in ("dM", "dD")]
            found[run.split("-")[1].removeprefix("r")].append((logs[0], logs[1]))
    return [
        {"rank": rank, "pairs": str(len(own))}
        | {name: exponential(mean_ci(np.array(own)[:, [column]])) for column, name in enumerate(("dM", "dD"))}
        for rank, own in sorted(found.items(), key=lambda item: int(item[0]))
    ]


def exponential(ci: ConfidenceInterval) -> str:
    """The interval of a ratio of that of its logarithm."""
    ends = np.exp([ci.mean, ci.low, ci.high])
    return ConfidenceInterval(*map(float, ends)).text("{:.2f}")


# --- what goes with the score ----------------------------------------------------------------------------------------


def relation_table() -> Records:
    """How slope, dM, dD and, as their control, the learning rate itself go with the score of trainings."""
    table = []
    for folder, title in SCORED.items():
        rows = records(f"{folder}/scored_trainings.csv")
        scores = np.array([float(row["score"]) for row in rows])
        values = {name: np.array([float(row[name]) for row in rows]) for name in ("slope", "dM", "dD")}
        values["rate"] = np.array([rate_of(row["run"]) for row in rows])
        for name, own in values.items():
            found = relation(own, scores)
            assert found is not None
            texts = {"of ranks": found.ranks.text(), "Pearson's": found.pearson.text()}
            table.append({"": f"{title} ({len(rows)})", "of": name, **texts})
    return table


def rate_of(run: str) -> float:
    """The learning rate in the name of a run."""
    found = re.search(r"-lr([\d.e-]+)-seed", run)
    assert found is not None, run
    return float(found[1])


# --- gradients -------------------------------------------------------------------------------------------------------


class Gradients:
    """The rows of gradients.csv of DoRA at one step."""

    def __init__(self, step: int):
        rows = [
            row for row in records("gradients.csv") if row["method"].startswith("dora") and int(row["step"]) == step
        ]
        self.step, self.rows = step, sorted(rows, key=lambda row: (row["run"], row["matrix"]))
        self.matrices, self.runs = (np.array([row[name] for row in self.rows]) for name in ("matrix", "run"))

    def values(self, name: str) -> np.ndarray:
        """The values of a column, (P,); of condition numbers their common logarithms."""
        found = np.array([float(row[name]) for row in self.rows])
        return np.log10(found) if name.startswith("condition") else found

    def mean(self, values: np.ndarray) -> ConfidenceInterval:
        """Their mean with the interval over matrices and trainings."""
        return over_matrices_and_runs(lambda some: float(some.mean()), values, self.matrices, self.runs)


def projection_table(*steps: int) -> Records:
    """What the projection does to gradients of DoRA beside what random rows do, by step."""
    return [row for step in steps for row in projection_rows(Gradients(step))]


def projection_rows(gradients: Gradients) -> Records:
    """Condition, effective rank and share along the rows, each with its control: the mean of each matrix's draws."""
    table = []
    for name, title in (
        ("condition", "condition (log10)"),
        ("rank", "effective rank"),
        ("along", "share along the rows"),
    ):
        control, projects = gradients.values(f"{name}_random"), name != "along"
        own = gradients.values(f"{name}_projected" if projects else name)
        as_good = control <= own if name == "condition" else control >= own  # the lower number is the better condition
        table.append(
            {"step": str(gradients.step), "": title, "gradient": gradients.mean(gradients.values(name)).text()}
            | {"projected": gradients.mean(own).text() if projects else "-"}
            | {"random rows": gradients.mean(control).text()}
            | {"sd of draws": f"{gradients.values(f'sd_{name}_random').mean():.2g}"}
            | {"less": gradients.mean(own - control).text(), "random as good": f"{as_good.sum()} of {len(own)}"}
        )
    return table


def magnitude_table(first: int, last: int) -> Records:
    """How many times as large |dL/dm| is at the end as at the start, and as its control ||dL/dW'||: geometric means."""
    ends = Gradients(first), Gradients(last)
    assert [row["matrix"] for row in ends[0].rows] == [row["matrix"] for row in ends[1].rows]
    logs = {name: np.log(ends[1].values(name) / ends[0].values(name)) for name in ("magnitude", "norm")}
    logs["magnitude / norm"] = logs["magnitude"] - logs["norm"]
    titles = {"magnitude": "|dL/dm|", "norm": "||dL/dW'||", "magnitude / norm": "|dL/dm| / ||dL/dW'||"}
    return [
        {"": titles[name].replace("|", "\\|"), f"step {last} / step {first}": exponential(ends[0].mean(values))}
        for name, values in logs.items()
    ]
