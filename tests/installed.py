"""The wheel alone, in new environments from PyPI: `make test-wheel`, or python -m tests.installed dist/*.whl.

With the base dependencies the package imports and its commands for files run; with `recipes` a person goes from an
empty folder to a trained adapter and images, without a download.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.shared.printed import next_commands

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "wheel"
SCRIPTS, EXE = ("Scripts", ".exe") if os.name == "nt" else ("bin", "")
BASE_ONLY = """
import importlib.util, sys
import dora_mm, torch
model = torch.nn.ModuleDict({"to_q": torch.nn.Linear(4, 4)})
print(dora_mm.inject(model, ["to_q"], dora_mm.DoRASpec(rank=2)))
there = [name for name in ("diffusers", "open_clip", "PIL") if importlib.util.find_spec(name)]
assert not there, there
"""
SHORT = {  # the settings that make a command of a person short
    "train": ["train.steps=3", "sample.steps=2"],
    "sample": ["steps=2"],
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.installed", description=__doc__)
    parser.add_argument("wheel", type=Path)
    wheel = parser.parse_args().wheel.resolve()
    print(f"{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB, Python {sys.version.split()[0]}")
    with tempfile.TemporaryDirectory(prefix="installed") as name:
        folder = Path(name)
        scripts = installed(wheel, BUILD / "base")
        ran(scripts / f"python{EXE}", "-c", BASE_ONLY, folder=folder)
        for command in ("check", "check --report", "configs"):
            ran(scripts / f"dora-mm{EXE}", *command.split(), folder=folder)
        first_hour(installed(wheel, BUILD / "recipes", "recipes") / f"dora-mm{EXE}", folder)
    return 0


def installed(wheel: Path, folder: Path, extra: str = "") -> Path:
    """Makes an environment with the wheel and what it needs; returns the folder of its programs."""
    venv.create(folder, with_pip=True, clear=True)
    scripts = folder / SCRIPTS
    wanted = f"{wheel}[{extra}]" if extra else str(wheel)
    ran(scripts / f"python{EXE}", "-m", "pip", "install", "--quiet", wanted, folder=folder)
    return scripts


def first_hour(program: Path, folder: Path) -> Path:
    """Runs what `example` says comes next in an empty folder; returns the folder of generated images.

    Args:
        program: The command dora-mm.
        folder: Where it runs.
    """
    ran(program, "check", folder=folder)
    printed = ran(program, "example", "example", folder=folder)
    for name, *arguments in next_commands(printed):
        short = ["--set", *SHORT[name]] if name in SHORT else []
        ran(program, name, *arguments, *short, folder=folder)
    images = folder / "runs" / "example_style_prompts" / "001" / "samples"
    assert list(images.glob("*.png")), images
    return images


def ran(*command: object, folder: Path) -> str:
    """Runs a command outside of the checkout, prints its time, and returns what it has printed.

    Raises:
        SystemExit: It failed; with its messages.
    """
    words = [str(word) for word in command]
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    with timed(words):
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8")
        if done.returncode:
            sys.exit(f"{shlex.join(words)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


@contextmanager
def timed(words: Sequence[str]) -> Iterator[None]:
    begin = time.monotonic()
    yield
    shown = " ".join([Path(words[0]).name, *(word for word in words[1:] if "\n" not in word)])
    print(f"{time.monotonic() - begin:6.0f} s  {shown}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
