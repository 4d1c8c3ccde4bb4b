"""The tests that need a GPU: an entry of `make gpu`."""

import importlib.util
import os
import subprocess
import sys

from tests.benchmarks.gpu_run import Run

CONFTEST_NEEDS = ("accelerate", "diffusers", "hypothesis", "PIL", "pydantic", "yaml")


def run(run: Run) -> None:
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
