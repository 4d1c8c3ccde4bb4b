"""What every entry of `make gpu` shares: its time, its folder, the rows it writes, and what it says it left out."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dora_mm.utils.tables import aligned_columns
from tests.benchmarks.contenders import Contenders
from tests.benchmarks.results_table import REFERENCE, Result, write_rows
from tests.benchmarks.timing import summary

Row = dict[str, Any]


@dataclass
class Run:
    """One entry at work.

    Attributes:
        device: Where it measures.
        dry: Whether everything is tiny, only to see that it works.
        folder: Where its CSV files go.
        deadline: When its time is over, on the clock of `time.monotonic`.
        faults: What went wrong and must not go unnoticed.
    """

    device: torch.device
    dry: bool
    folder: Path
    deadline: float
    faults: list[str] = field(default_factory=list)

    def is_late(self) -> bool:
        return time.monotonic() > self.deadline

    def seconds_left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def rounds(self, full: int) -> int:
        return 1 if self.dry else full

    def to_compile(self, contenders: Contenders) -> Contenders:
        """Those that are compiled too: all that have something to fuse, but two in a dry run, as each takes seconds."""
        chosen = ("PEFT LoRA", "our DoRA") if self.dry else set(contenders) - {"frozen"}
        return {name: build for name, build in contenders.items() if name in chosen}

    @property
    def compiler(self) -> str:
        """The backend of torch.compile; a dry run only traces, which needs no C++ compiler."""
        return "eager" if self.dry else "inductor"

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
            is_ours = contender.startswith("our") and not isinstance(error, torch.OutOfMemoryError)
            (self.fail if is_ours else self.leave_out)(text)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # of what failed, before the next one needs it

    def save(self, name: str, rows: list[Row]) -> None:
        """Writes the rows to a file of this name, with the machine in front of each."""
        machine = {
            "card": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "none, a dry run",
            **{package: installed(package) for package in ("torch", "triton", "peft")},
        }
        write_rows(self.folder / name, [machine | row for row in rows])


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
    size = f"{median / 2**20:.0f} MiB" if row["measure"] == "peak" else f"{1e3 * median:.3f} ms"
    if row["ratio"] == "":
        return size
    size += f" {row['ratio']:.2f}"
    return size if row["repeats"] == 1 else f"{size} ({row['ratio_low']:.2f}-{row['ratio_high']:.2f})"
