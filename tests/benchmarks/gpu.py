"""All that only a GPU can show, in 20 minutes on one card.

    make gpu                                      # or: python3 -m tests.benchmarks.gpu
    make gpu ONLY="layers llm"                    # some of the entries
    make gpu DRY=1                                # every entry, tiny, on a processor: only whether it works

It installs nothing, and leaves out what needs a package that is not there. Each entry runs in a process of its own, so
that one which fails, or which the GPU does not survive, does not stop the others. Writes CSV files to
tests/benchmarks/results/<card>/. Exit code: 0 done, 1 an entry failed, 2 there is nothing to run on.
"""

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 1200
GRACE = 60  # for the start of Python, and for what is being measured when the time of an entry is over


def gpu_tests(run: Any) -> None:
    """Runs `pytest -m gpu`; a dry run only collects. Without the needs of tests/conftest.py, the kernels alone."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    if missing := [package for package in CONFTEST_NEEDS if importlib.util.find_spec(package) is None]:
        run.leave_out(f"tests outside of tests/kernels: tests/conftest.py needs {', '.join(missing)}")
    if missing or run.dry:
        command += ["--noconftest", "tests/kernels"]
    if run.dry:
        command += ["--collect-only"]
    elif importlib.util.find_spec("xdist"):  # compiling the kernels takes the most time, and needs no GPU
        command += ["-n", str(min(4, os.cpu_count() or 1))]
    try:
        code = subprocess.run(command, timeout=run.seconds_left(), check=False).returncode
    except subprocess.TimeoutExpired:
        run.fail("pytest did not finish in its time")
        return
    if code:
        run.fail(f"pytest ended with code {code}")


def products(run: Any) -> None:
    from tests.benchmarks import bench_products

    bench_products.run(run)


def layers(run: Any) -> None:
    from tests.benchmarks import gpu_layers

    gpu_layers.run(run)


def unet(run: Any) -> None:
    from tests.benchmarks import gpu_models

    gpu_models.run_unet(run)


def z_image(run: Any) -> None:
    from tests.benchmarks import gpu_models

    gpu_models.run_z_image(run)


def llm(run: Any) -> None:
    from tests.benchmarks import gpu_models

    gpu_models.run_llm(run)


@dataclass(frozen=True)
class Entry:
    """A part of `make gpu`.

    Attributes:
        name: Selects it on the command line.
        needs: The packages it cannot do without.
        seconds: Its share of the time.
        work: Does it. It imports what the entry needs, since that may not be there.
    """

    name: str
    needs: tuple[str, ...]
    seconds: int
    work: Callable[[Any], None]


ENTRIES = (
    Entry("tests", ("torch", "triton", "pytest"), 240, gpu_tests),
    Entry("products", ("torch", "triton"), 120, products),
    Entry("layers", ("torch", "peft"), 340, layers),
    Entry("unet", ("torch", "peft", "diffusers"), 180, unet),
    Entry("z_image", ("torch", "peft", "diffusers"), 120, z_image),
    Entry("llm", ("torch", "peft", "transformers"), 180, llm),
)
CONFTEST_NEEDS = ("accelerate", "diffusers", "hypothesis", "PIL", "pydantic", "yaml")
PACKAGES = ("torch", "triton", "pytest", "peft", "transformers", "diffusers", "open_clip")


def main(arguments: list[str] | None = None) -> int:
    given = parsed(arguments)
    chosen = [entry for entry in ENTRIES if entry.name in (given.entries or [entry.name])]
    if given.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which nothing here has done yet
        given.output = given.output or Path(tempfile.mkdtemp(prefix="gpu-dry-"))
    elif problem := no_gpu():
        print(f"make gpu: {problem}; DRY=1 tries every entry on a processor", file=sys.stderr)
        return 2
    return run_here(chosen[0], given) if len(chosen) == 1 else run_all(chosen, given)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    names = [entry.name for entry in ENTRIES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entries", nargs="*", help=f"{', '.join(names)}; default: all")
    parser.add_argument("--dry", action="store_true", help="every entry tiny, on a processor")
    parser.add_argument("--seconds", type=float, help="the time of each entry, instead of its share of 20 minutes")
    parser.add_argument("--output", type=Path, help="the folder of the CSV files")
    given = parser.parse_args(arguments)
    if unknown := sorted(set(given.entries) - set(names)):
        parser.error(f"there is no entry {', '.join(unknown)}: choose from {', '.join(names)}")
    return given


def no_gpu() -> str | None:
    """Why nothing can be measured here, None where it can."""
    if not is_there("torch"):
        return f"{sys.executable} has no torch"
    import torch

    return None if torch.cuda.is_available() else "torch sees no GPU"


def is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def run_all(entries: list[Entry], given: argparse.Namespace) -> int:
    """Runs each entry in a process of its own, and repeats at the end what was left out and what failed."""
    print("here:", ", ".join(f"{p}{'' if is_there(p) else ' (missing)'}" for p in PACKAGES), flush=True)
    end, remarks, failed = time.monotonic() + SECONDS, [], False
    for entry in entries:
        seconds = min(given.seconds or entry.seconds, end - time.monotonic())
        if seconds < GRACE and not given.dry:
            found = [f"left out: {entry.name}: the {SECONDS // 60} minutes are over"]
        else:
            code, found = run_apart(entry, seconds, given)
            failed |= code != 0
        remarks += [f"{entry.name}: {line}" for line in found]
    print("\n" + "\n".join(remarks or ["Nothing was left out, and nothing failed."]))
    return int(failed)


def run_apart(entry: Entry, seconds: float, given: argparse.Namespace) -> tuple[int, list[str]]:
    """Runs one entry in another process, and shows its output.

    Returns:
        Its exit code, and the lines that say what was left out and what failed.
    """
    print(f"\n=== {entry.name}, at most {seconds:.0f} s", flush=True)
    command = [sys.executable, "-u", "-m", "tests.benchmarks.gpu", entry.name, "--seconds", str(seconds)]
    command += ["--dry"] * given.dry + (["--output", str(given.output.resolve())] if given.output else [])
    start, remarks = time.monotonic(), []
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        timer = threading.Timer(seconds + GRACE, os.killpg, (process.pid, signal.SIGKILL))  # with what it has started
        timer.start()
        for line in process.stdout or ():
            print(line, end="", flush=True)
            remarks += [line.rstrip()] if line.startswith(("left out: ", "failed: ")) else []
        code = process.wait()
        timer.cancel()
    if code and not any(line.startswith("failed: ") for line in remarks):
        remarks.append(f"failed: it ended with code {code} after {time.monotonic() - start:.0f} s")
    return code, remarks


def run_here(entry: Entry, given: argparse.Namespace) -> int:
    """Runs one entry in this process."""
    if missing := [package for package in entry.needs if not is_there(package)]:
        print(f"left out: all of {entry.name}: it needs {', '.join(missing)}", flush=True)
        return 0
    import torch

    from tests.benchmarks.gpu_run import Run

    device = torch.device("cpu" if given.dry else "cuda")
    folder = given.output or ROOT / "tests/benchmarks/results" / file_name(torch.cuda.get_device_name())
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(device, given.dry, folder, time.monotonic() + (given.seconds or entry.seconds))
    start = time.monotonic()
    try:
        entry.work(run)
    except Exception as error:
        traceback.print_exc()
        run.fail(f"{type(error).__name__}: {error}".splitlines()[0])
    print(f"{entry.name}: {time.monotonic() - start:.0f} s; results are in {folder}", flush=True)
    return int(bool(run.faults))


def file_name(card: str) -> str:
    return re.sub(r"\W+", "_", card).strip("_").lower()


if __name__ == "__main__":
    sys.exit(main())
