"""A run that is killed in the middle, and checks that it gives the same weights, or the same files, after resuming."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def kill_after(checkpoint: str, config: Path | None, run: Path, program: str = "dora_mm") -> None:
    """Starts `python -m PROGRAM train CONFIG` and kills the process once it has written this checkpoint.

    Without a config, the run goes on.
    """
    arguments = ["--resume", str(run)] if config is None else [str(config)]
    command = [sys.executable, "-m", program, "train", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / checkpoint).is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def assert_same_weights(checkpoint: str, first: Path, second: Path) -> None:
    """Bit for bit, in the same checkpoint of two runs."""
    one, other = (
        load_file(run / "checkpoints" / checkpoint / "trained_weights.safetensors") for run in (first, second)
    )
    assert one.keys() == other.keys()
    assert {name: torch.equal(tensor, other[name]) for name, tensor in one.items()} == dict.fromkeys(one, True)


def files_in(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The content and the time of every file of a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
