"""The results of benchmarks: CSV files, and those of bench_peers.py as a Markdown table and a plot."""

import csv
import importlib.util
import json
import logging
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

log = logging.getLogger(__name__)
REFERENCE = "PEFT LoRA"  # times are given as ratios to those of this contender


@dataclass(frozen=True)
class Result:
    """One measure of one contender in one case: a row of results.csv."""

    case: str
    rank: int
    contender: str
    measure: str  # "forward", "step" (forward and backward): in seconds; "saved", "peak": in bytes
    median: float
    low: float  # lower quartile
    high: float  # upper quartile
    repeats: int  # number of measurements


def write_results(path: Path, results: list[Result]) -> None:
    """Writes results.csv, with the fields of `Result` as columns."""
    write_rows(path, [asdict(result) for result in results])


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Writes a CSV file with the keys of the first row as columns, or nothing where there is no row."""
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def time_row(name: str, seconds: Sequence[float]) -> dict[str, object]:
    """A row with the median of times in seconds, the shortest and the longest."""
    figures = {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}
    return {"name": name, **{key: round(value, 4) for key, value in figures.items()}, "rounds": len(seconds)}


def write_times(folder: Path, name: str, rows: Sequence[Mapping[str, object]], *packages: str) -> None:
    """Writes rows to name.csv in a folder, and to name.json the machine and the versions of torch and the packages."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / f"{name}.csv", rows)
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    machine |= {"torch": torch.__version__, **{package: version(package) for package in packages}}
    (folder / f"{name}.json").write_text(json.dumps(machine, indent=2) + "\n")


def read_results(path: Path) -> list[Result]:
    """Reads what `write_results` wrote."""
    with path.open(newline="") as file:
        return [
            Result(
                **{
                    **row,
                    **{name: float(row[name]) for name in ("median", "low", "high")},
                    "rank": int(row["rank"]),
                    "repeats": int(row["repeats"]),
                }
            )
            for row in csv.DictReader(file)
        ]


def table(results: list[Result], made_on: dict[str, str | int]) -> str:
    """Returns a Markdown table with a row per case: times of a step as ratios to PEFT's LoRA, memory in MiB.

    Args:
        results: Of all cases; every case needs the step of `REFERENCE`, and the peak of it, PEFT DoRA and our DoRA.
        made_on: The machine: `device`, `threads`, `dtype`, and the versions `torch` and `peft`.
    """
    others = [name for name in dict.fromkeys(r.contender for r in results) if name != REFERENCE]
    by_case: dict[tuple[str, int], dict[tuple[str, str], Result]] = {}
    for result in results:
        by_case.setdefault((result.case, result.rank), {})[result.contender, result.measure] = result
    lines = [
        f"{made_on['device']}, {made_on['threads']} threads, {made_on['dtype']}, torch {made_on['torch']}, "
        f"PEFT {made_on['peft']}. Forward and backward: times PEFT LoRA's, medians of alternating runs. "
        "Memory: at the peak of one step, beyond weights and input.",
        "",
        "| | rank | PEFT LoRA | " + " | ".join(others) + " | MiB: PEFT LoRA | PEFT DoRA | our DoRA |",
        "| --- " * (len(others) + 6) + "|",
    ]
    for (case, rank), found in by_case.items():
        unit = found[REFERENCE, "step"].median
        ratios = [f"{found[name, 'step'].median / unit:.2f}" if (name, "step") in found else "" for name in others]
        peaks = [f"{found[name, 'peak'].median / 2**20:.0f}" for name in (REFERENCE, "PEFT DoRA", "our DoRA")]
        time = f"{unit:.2f} s" if unit >= 1 else f"{1000 * unit:.1f} ms"
        lines.append("| " + " | ".join([case, str(rank), time, *ratios, *peaks]) + " |")
    return "\n".join(lines) + "\n"


def plot(results: list[Result], made_on: dict[str, str | int], path: Path) -> None:
    """Plots the time of a step in each case as a ratio to PEFT's LoRA, a bar with quartiles for each contender.

    Without matplotlib it logs a warning and writes nothing.

    Args:
        results: Of all cases.
        made_on: The machine, as for `table`.
        path: The image file to write.
    """
    if importlib.util.find_spec("matplotlib") is None:
        log.warning("The plot is skipped: it needs matplotlib.")
        return
    import numpy as np
    from matplotlib.figure import Figure

    steps = [result for result in results if result.measure == "step"]
    cases = list(dict.fromkeys((result.case, result.rank) for result in steps))
    names = [name for name in dict.fromkeys(r.contender for r in steps) if name != REFERENCE]
    units = {(r.case, r.rank): np.float64(r.median) for r in steps if r.contender == REFERENCE}
    figure = Figure(figsize=(9, 1.4 + 0.1 * len(cases) * (len(names) + 1)), layout="constrained")
    axes = figure.subplots()
    height = 1 / (len(names) + 1)
    for index, name in enumerate(names):
        own = [r for r in steps if r.contender == name]
        positions = [cases.index((r.case, r.rank)) + index * height for r in own]
        low, median, high = np.array([np.array([r.low, r.median, r.high]) / units[r.case, r.rank] for r in own]).T
        axes.barh(
            positions, median, height, xerr=[median - low, high - median], error_kw={"linewidth": 0.8}, label=name
        )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks([position + (len(names) - 1) / 2 * height for position in range(len(cases))])
    axes.set_yticklabels([f"{case}, rank {rank}" for case, rank in cases])
    axes.invert_yaxis()
    axes.set_xlabel("forward and backward, times PEFT's LoRA")
    axes.set_title(f"{made_on['device']}, {made_on['threads']} threads, {made_on['dtype']}")
    axes.margins(y=0.01)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)
