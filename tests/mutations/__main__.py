"""Makes each fault in a copy of the package, and runs the fast tests of its room: make mutations.

A fault that no test notices lives. The tests have to pass without faults, which is looked at first.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutations.faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results.csv")
COPIED = ("dora_mm", "pipelines", "configs", "tests", "docs")
KEPT = ("samples", "README.md", "pyproject.toml")  # nothing writes to these: links
LIST = "tests/mutations/faults.py"
LIVED, TOO_LONG = "lived", "lived: too long"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--only", nargs="*", help="the names of faults, or parts of these; leaves the results alone")
    parser.add_argument("--check", action="store_true", help="only looks whether each line is there, exactly once")
    parser.add_argument("--seconds", type=float, default=60, help="for the tests of a fault")
    parser.add_argument("--output", type=Path, default=None, help="a CSV file; without --only results.csv beside this")
    asked = parser.parse_args()
    chosen = [fault for fault in FAULTS if not asked.only or any(part in fault.name for part in asked.only)]
    if missing := [problem for fault in chosen if (problem := why_not(fault))]:
        print("\n".join(missing), file=sys.stderr)
        return 2
    if asked.check:
        return 0
    if failed := without_faults(chosen):
        print(f"The tests fail without any fault: {failed}", file=sys.stderr)
        return 2
    rows = [row_of(fault, *run(fault, asked.seconds)) for fault in chosen]
    if output := asked.output or (None if asked.only else RESULTS):
        write(output, rows)
    lived = [row["fault"] for row in rows if row["noticed by"].startswith(LIVED)]
    print(f"{len(rows) - len(lived)} of {len(rows)} faults were noticed" + "".join(f"\n  lived: {n}" for n in lived))
    return 1 if lived else 0


def why_not(fault: Fault) -> str | None:
    """Why a fault cannot be made: its line was changed, or is not alone."""
    path = ROOT / "dora_mm" / fault.file
    count = path.read_text(encoding="utf-8").count(fault.before) if path.is_file() else 0
    if count == 1:
        return None
    return f"{fault.name}: dora_mm/{fault.file} has {fault.before!r} {count} times, not once: see {LIST}"


def without_faults(faults: Sequence[Fault]) -> str | None:
    """The first test that fails without a fault, of those that are to notice faults; None: all pass."""
    with tempfile.TemporaryDirectory() as folder:
        copy_to(Path(folder))
        return first_failure(Path(folder), sorted({fault.test for fault in faults}), seconds=1800)


def run(fault: Fault, seconds: float) -> tuple[str, float]:
    """The test that notices a fault, or `lived`, and the seconds that it took."""
    with tempfile.TemporaryDirectory() as folder:
        copy_to(Path(folder))
        path = Path(folder) / "dora_mm" / fault.file
        path.write_text(path.read_text(encoding="utf-8").replace(fault.before, fault.after), encoding="utf-8")
        started = time.monotonic()
        found = first_failure(Path(folder), [fault.test], seconds)
        if found is None:
            rest = [fault.room, f"--ignore={fault.test}"]
            found = first_failure(Path(folder), rest, seconds - (time.monotonic() - started))
        return found or LIVED, time.monotonic() - started


def copy_to(folder: Path) -> None:
    """Copies the package and its tests, with what Python has compiled of them."""
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name)
    for name in KEPT:
        (folder / name).symlink_to(ROOT / name)


def first_failure(folder: Path, tests: Sequence[str], seconds: float) -> str | None:
    """The first test that fails in a copy, or that there was no time for all of them; None: all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", *tests]
    settings = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen(
        command,
        cwd=folder,
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            text, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # tests have processes of their own
            return TOO_LONG
    if process.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S+?(?:\[.*?\])?)(?: - |$)", text, re.M)
    return found[1] if found else f"pytest ended with {process.returncode}: {text[-300:]}"


def row_of(fault: Fault, noticed_by: str, seconds: float) -> dict[str, str]:
    """The row of the results, which is printed, too."""
    print(f"{seconds:5.0f} s  {fault.name}: {noticed_by}", flush=True)
    return {
        "fault": fault.name,
        "file": f"dora_mm/{fault.file}",
        "noticed by": noticed_by,
        "seconds": f"{seconds:.0f}",
        "why it matters": fault.why,
    }


def write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
