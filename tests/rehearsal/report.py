"""What the commands took, as numbers in a file of JSON and as a page, beside what the dry run said."""

import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dora_mm.utils.atomic import write_text
from tests.rehearsal.measuring import Measured, Peak
from tests.rehearsal.stages import BEFORE, STEPS, Stage

PACKAGES = ("torch", "diffusers", "transformers", "peft")
HEAD = """\
# The rehearsal on {machine}

`make rehearsal`: full-size models with random weights, in the layouts and dtypes of the published ones; {versions}.
Seconds of the processor are those of all threads. Memory is the peak beyond the libraries' own: anonymous (written by
the process) and mapped (files that are read as they lie on disk), each at its own time. The lower tables have the sum
of both in steps: pages of files that are dropped where memory is short are still needed. Before the steps they have
the larger one, since a file that is converted is mapped beside its copy, of the resumed training: the first one maps
all files once more for their digests, which are remembered.
"""


def forecast(page: str) -> dict[str, float]:
    """The MB that a dry run gives for a step, and for what is there before the steps at most.

    Args:
        page: What it has printed.
    """
    rows = r"captions, \d", r"VAE, an image of \d+ px encoded", r".* in main memory, before it is stored in"
    beside = [size for pattern in rows for size in _numbers(f"^{pattern}.* {{}}$", page)]
    weights = _numbers(r"^.* frozen in .* {}$", page) + _numbers(r"^[\d,]+ trained .* {}$", page)
    found = {STEPS: sum(_numbers(r"^together\b.* {}$", page)), BEFORE: max([sum(weights), *beside])}
    return {name: size for name, size in found.items() if size}


def _numbers(pattern: str, page: str) -> list[float]:
    """The numbers of lines in which a pattern has one."""
    found = re.finditer(pattern.format(r"([\d,]+\.\d)"), page, re.MULTILINE)
    return [float(each[1].replace(",", "")) for each in found]


def record(stages: Sequence[Stage], done: Sequence[Measured], about: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of one model."""
    rows = [{"label": stage.label, **_values(found)} for stage, found in zip(stages, done, strict=False)]
    said = next((forecast(d.output) for s, d in zip(stages, done, strict=False) if s.is_forecast), {})
    peaks: dict[str, list[Peak]] = {BEFORE: [], STEPS: []}
    for stage, found in zip(stages, done, strict=False):
        for name, peak in found.peaks.items() if stage.trains else ():
            peaks[name].append(peak)
    peaks[BEFORE] = peaks[BEFORE][-1:]  # of the last training, when digests of files are remembered
    compared = [
        {"phase": name, "dry_run": size, "measured": round(max(_taken(name, peak) for peak in peaks[name]), 1)}
        for name, size in said.items()
        if peaks[name]
    ]
    return {**about, "stages": rows, "forecast": compared}


def _values(found: Measured) -> dict[str, Any]:
    values = asdict(found)
    del values["output"]
    values["peaks"] = {name: {k: round(v, 1) for k, v in peak.items()} for name, peak in values["peaks"].items()}
    return values | {name: round(values[name], 1) for name in ("seconds", "processor_seconds", "written")}


def _taken(phase: str, peak: Peak) -> float:
    """Before the steps not both: a file that is converted is mapped beside its copy."""
    return peak.gpu or (max if phase == BEFORE else sum)((peak.anonymous, peak.mapped))


def save(folder: Path, name: str, values: Mapping[str, Any]) -> Path:
    """Puts the numbers of a model into the files of a machine; returns the page."""
    file = folder / "rehearsal.json"
    found = json.loads(file.read_text()) if file.exists() else {"models": {}}
    found["machine"] = {"name": machine(), **{package: version(package) for package in PACKAGES}}
    found["models"][name] = values
    folder.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(found, indent=1) + "\n")
    page = folder / "rehearsal.md"
    write_text(page, page_of(found))
    return page


def page_of(found: Mapping[str, Any]) -> str:
    """The page of all models of a machine."""
    about = dict(found["machine"])
    name, versions = about.pop("name"), ", ".join(f"{package} {number}" for package, number in about.items())
    sections = [HEAD.format(machine=name, versions=versions)]
    sections += [_section(values) for values in found["models"].values()]
    return "\n".join(sections)


def _section(values: Mapping[str, Any]) -> str:
    gpu = any(peak["gpu"] for stage in values["stages"] for peak in stage["peaks"].values())
    columns = ["", "processor, s", "clock, s", "anonymous, MB", "mapped, MB", *["card, MB"] * gpu, "written, MB"]
    rows = [_row(stage, name, gpu) for stage in values["stages"] for name in stage["peaks"]]
    lines = [f"## {values['title']}", "", f"{values['disk']:,.0f} MB on disk. {values['settings']}", ""]
    lines += _table(columns, rows)
    if values["forecast"]:
        columns = ["memory, MB", "dry run", "measured", "off by"]
        lines += ["", *_table(columns, [_compared(each) for each in values["forecast"]])]
    lines += [f"\nLeft out: {reason}" for reason in values["left_out"]]
    return "\n".join(lines) + "\n"


def _row(stage: Mapping[str, Any], phase: str, gpu: bool) -> list[str]:
    """A line of a stage, or of one of its phases, of which the first has the time of all."""
    peak, first = stage["peaks"][phase], phase == next(iter(stage["peaks"]))
    label = stage["label"] if len(stage["peaks"]) == 1 else f"{stage['label']}: {phase}"
    times = [f"{stage[key]:,.0f}" if first else "" for key in ("processor_seconds", "seconds")]
    sizes = [f"{peak[key]:,.0f}" for key in ("anonymous", "mapped", *["gpu"] * gpu)]
    return [label, *times, *sizes, f"{stage['written']:,.0f}" if first else ""]


def _compared(each: Mapping[str, Any]) -> list[str]:
    said, found = each["dry_run"], each["measured"]
    return [each["phase"], f"{said:,.0f}", f"{found:,.0f}", f"{said / found - 1:+.0%}"]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def machine() -> str:
    """The GPU, or the make of the processor, with what is used of it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.partition(":")[2].strip() for line in _processor().splitlines() if line.startswith("model name")]
    threads = "a thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    return f"{threads} on {len(names)} cores of an {names[0] if names else platform.machine()}"


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.exists() else ""


def folder_name(machine: str) -> str:
    """The folder of results, such as epyc_2_cores or nvidia_h100_80gb_hbm3."""
    found = re.search(r"(\d+) cores of an .*?\b(EPYC|Xeon)\b", machine)
    name = f"{found[2]}_{found[1]}_cores" if found else machine
    return re.sub(r"\W+", "_", name).strip("_").lower()
