"""Beside other trainers: `make test-beside`, or python -m tests.beside.

The wheel resolves with the newest release of each trainer, as pip says, and the tests of fuse_peft pass with the
releases that they pin. Without an index of packages it says so, and ends.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "beside"
TRAINERS = ("llamafactory", "unsloth", "axolotl", "ms-swift")
SHOWN = ("torch", "transformers", "peft", "accelerate", "trl")
PINS: Mapping[str, Sequence[str]] = {
    "peft 0.18, as LLaMA-Factory": ("peft==0.18.1", "transformers==5.6.0", "accelerate==1.11.0"),
    "peft 0.19": ("peft==0.19.1", "transformers==5.6.2", "accelerate==1.13.0"),
    "peft 0.20, as axolotl": ("peft==0.20.0", "transformers==5.16.1", "accelerate==1.13.0"),
    "peft 0.21": ("peft==0.21.0", "transformers==5.17.0"),
    "newest": ("peft", "transformers"),
}
TESTED = ("tests/peft/test_formula.py", "tests/peft/test_layers.py", "tests/peft/test_steps.py")
NEEDED = ("accelerate", "pillow", "pytest", "hypothesis")  # what these tests import


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.beside", description=__doc__)
    parser.add_argument("--trainers", nargs="*", default=TRAINERS)
    parser.add_argument("--pins", nargs="*", default=list(PINS), help="only these, such as 'peft 0.19'")
    given = parser.parse_args()
    if pip("download", "--no-deps", "--dest", BUILD / "index", "packaging").returncode:
        print("Left out: no index of packages can be reached.")
        return 0
    wheel, bad = built(), []
    print(f"{'trainer':24}{''.join(f'{name:>14}' for name in SHOWN)}", flush=True)
    for trainer in given.trainers:
        found = resolved(wheel, trainer)
        bad += [] if found else [trainer]
        versions = "".join(f"{found.get(name, '-'):>14}" for name in SHOWN)
        print(f"{trainer + ' ' + found.get(trainer, ''):24}{versions if found else '  does not resolve'}", flush=True)
    for name in given.pins:
        begin, code = time.monotonic(), tested(wheel, name)
        bad += [name] if code else []
        print(f"{name}: {'failed' if code else 'passed'} in {time.monotonic() - begin:.0f} s", flush=True)
    return int(bool(bad))


def pip(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "pip", *map(str, arguments), "--quiet")
    return subprocess.run(command, capture_output=True, text=True, check=False)


def built() -> Path:
    """The wheel of this checkout."""
    shutil.rmtree(BUILD / "wheel", ignore_errors=True)
    assert pip("wheel", "--no-deps", "--wheel-dir", BUILD / "wheel", ROOT).returncode == 0
    return next((BUILD / "wheel").glob("*.whl"))


def resolved(wheel: Path, trainer: str) -> dict[str, str]:
    """The versions that pip would install for the wheel and a trainer, by package; empty where there are none."""
    report = BUILD / f"{trainer}.json"
    ran = pip("install", "--dry-run", "--ignore-installed", "--report", report, wheel, trainer)
    if ran.returncode:
        print(ran.stderr)
        return {}
    packages = (entry["metadata"] for entry in json.loads(report.read_text("utf-8"))["install"])
    return {package["name"].lower().replace("_", "-"): package["version"] for package in packages}


def tested(wheel: Path, name: str) -> int:
    """Runs the tests of fuse_peft on the wheel, with some releases of other packages; pytest's exit code."""
    folder, run = BUILD / name, BUILD / "run"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "uv"], check=True)
    uv = (folder / "bin" / "uv", "pip", "install", "--quiet", "--python", python)
    subprocess.run([*uv, "--reinstall-package", "dora_mm", wheel, *PINS[name], *NEEDED], check=True)
    shutil.rmtree(run, ignore_errors=True)  # without our package beside it
    shutil.copytree(ROOT / "tests", run / "tests", ignore=shutil.ignore_patterns("results", "__pycache__"))
    own = ("-c", ROOT / "pyproject.toml", "--rootdir", run, "-o", f"pythonpath={run}", "-p", "no:cacheprovider")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([python, "-m", "pytest", "-q", *own, *TESTED], cwd=run, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
