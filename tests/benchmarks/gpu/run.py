"""What every entry of `make gpu` shares: its time, its folder, the rows it saves, and what it says it left out."""

import contextlib
import csv
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dora_mm.backend import load_triton
from dora_mm.utils.tables import aligned_columns
from tests.benchmarks.contenders import CONTENDERS, DENSE, Contenders
from tests.benchmarks.gpu import is_there
from tests.benchmarks.results_table import REFERENCE, Result
from tests.benchmarks.timing import summary

Row = dict[str, Any]
TORCH = {"backend": "torch"}


@dataclass
class Run:
    """One entry at work.

    Attributes:
        name: Of the entry, and of its CSV file.
        device: Where it measures.
        dry: Whether everything is tiny, only to see that it works.
        folder: Where its CSV file goes.
        deadline: When its time is over, on the clock of `time.monotonic`.
        faults: What went wrong and must not go unnoticed.
        columns: Of its CSV file, once that has rows.
        inputs: The folder of models and data of the entries that need some.
    """

    name: str
    device: torch.device
    dry: bool
    folder: Path
    deadline: float
    faults: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    inputs: Path | None = None

    def is_late(self) -> bool:
        return time.monotonic() > self.deadline

    def seconds_left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def rounds(self, full: int) -> int:
        return 1 if self.dry else full

    @property
    def dtype(self) -> torch.dtype:
        """That of weights and inputs; Triton's interpreter has no bf16."""
        return torch.float16 if self.dry else torch.bfloat16

    @property
    def compiler(self) -> str:
        """The backend of torch.compile; a dry run only traces, which needs no C++ compiler."""
        return "eager" if self.dry else "inductor"

    @cached_property
    def backend(self) -> str | None:
        """What our layers run in: "triton", "torch" where that is not installed, None where the kernels fail."""
        if not is_there("triton"):
            self.leave_out("the kernels: they need triton; our layers run in plain torch")
            return "torch"
        function, problem = load_triton()
        if function is None:
            self.fail(f"the trial of the kernels, and with it whatever needs them: {problem}")
        return "triton" if function else None

    def contenders(self, *names: str) -> Contenders:
        """Those of `contenders.py` that run here, ours in `backend`; what is missing is said."""
        every = CONTENDERS | DENSE
        if not is_there("peft") and (peers := [name for name in names if name.startswith("PEFT")]):
            self.leave_out(f"{', '.join(peers)}: they need peft")
            names = tuple(name for name in names if name not in peers)
        found = {name: every[name] for name in names if not is_ours(name)}
        if self.backend:
            found |= {name: partial(every[name], runs_in=self.backend) for name in names if is_ours(name)}
        return {name: found[name] for name in names if name in found}

    def runs_kernels(self, contender: str) -> bool:
        """Whether a contender runs in `backend`; layers of PEFT do where there is a GPU."""
        return contender.startswith("our") or (is_ours(contender) and self.device.type == "cuda")

    def leave_out(self, text: str) -> None:
        print(f"left out: {text}", flush=True)

    def fail(self, text: str) -> None:
        print(f"failed: {text}", flush=True)
        self.faults.append(text)

    def is_cut(self, name: str) -> bool:
        """Whether there is no time left for `name`, which is then said."""
        if late := self.is_late():
            self.leave_out(f"{name}: the time of this entry is over")
        return late

    @contextlib.contextmanager
    def trying(self, contender: str, name: str) -> Iterator[None]:
        """Goes on after whatever a contender raises. A fault of ours counts, one of a peer's is only said."""
        try:
            yield
        except Exception as error:
            text = f"{contender}, {name}: {type(error).__name__}: {error}".splitlines()[0]
            counts = is_ours(contender) and not isinstance(error, torch.OutOfMemoryError)
            (self.fail if counts else self.leave_out)(text)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # of what failed, before the next one needs it

    def save(self, rows: list[Row]) -> None:
        """Appends rows to the file of this entry, with machine and backend in front, and waits for the disk.

        The first ones replace what an earlier run has left. All must have the same columns.
        """
        if not rows:
            return
        ours = {"backend": self.backend}
        rows = [
            self.machine | (ours if self.runs_kernels(row.get("contender", "our")) else TORCH) | row for row in rows
        ]
        is_first = not self.columns
        self.columns = self.columns or list(rows[0])
        with (self.folder / f"{self.name}.csv").open("w" if is_first else "a", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            if is_first:
                writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())

    @cached_property
    def machine(self) -> Row:
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "none, a dry run"
        return {"card": gpu, **{package: installed(package) for package in ("torch", "triton", "peft")}}


def is_ours(contender: str) -> bool:
    return contender.startswith(("our", "PEFT DoRA, fused"))


def many_compiled() -> contextlib.AbstractContextManager[object]:
    """Contenders share the code of nn.Module, which torch.compile counts as one function and compiles eight times."""
    config = torch._dynamo.config
    return config.patch({"recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit": 64})


def installed(package: str) -> str:
    """The version of a package, with what it was built for where the package says so."""
    if package == "torch":
        return torch.__version__
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def compared(times: dict[str, list[float]], case: str, rank: int, measure: str, dtype: torch.dtype) -> list[Row]:
    """Returns a row per contender, with ratios to the reference.

    Args:
        times: The name of a contender to its seconds or bytes, in the order of the rounds.
        case: What was measured.
        rank: The rank of the adapters.
        measure: As in `Result`.
        dtype: The dtype of the base weights.

    Returns:
        The fields of `Result`, and median and quartiles of the ratios within each round; empty without a reference.
    """
    rows = []
    for name, values in times.items():
        row: Row = {"dtype": name_of(dtype)} | asdict(Result(case, rank, name, measure, *summary(values), len(values)))
        ratios = [value / unit for value, unit in zip(values, times.get(REFERENCE, []), strict=False) if unit]
        found = summary(ratios) if ratios else ("", "", "")
        rows.append(row | dict(zip(("ratio", "ratio_low", "ratio_high"), found, strict=True)))
    return rows


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def show(rows: list[Row]) -> None:
    """Prints rows as they are."""
    print(aligned_columns([list(rows[0]), *([str(value) for value in row.values()] for row in rows)], 1), flush=True)


def report(rows: list[Row]) -> None:
    """Prints the rows of one case, if there are any: a line per contender, a column per measure."""
    if not rows:
        return
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    cells = {(row["contender"], row["measure"]): cell(row) for row in rows}
    lines = [
        [name, *(cells.get((name, measure), "") for measure in measures)]
        for name in dict.fromkeys(row["contender"] for row in rows)
    ]
    first = rows[0]
    print(f"\n{first['case']}, rank {first['rank']}, {first['dtype']}: medians; ratios to {REFERENCE}, with quartiles")
    print(aligned_columns([["", *measures], *lines], 1), flush=True)


def cell(row: Row) -> str:
    """A median, and where there is a reference the ratio to it, with quartiles of several rounds."""
    median = row["median"]
    size = f"{median / 2**20:.0f} MiB" if row["measure"] in ("saved", "peak") else f"{1e3 * median:.3f} ms"
    if row["ratio"] == "":
        return size
    size += f" {row['ratio']:.2f}"
    return size if row["repeats"] == 1 else f"{size} ({row['ratio_low']:.2f}-{row['ratio_high']:.2f})"
