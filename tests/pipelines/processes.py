"""Two processes that accelerate starts, each of which runs commands of dora-mm one after the other.

accelerate launch ... -m tests.pipelines.processes train a.yaml , train b.yaml
"""

import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from dora_mm.cli import main

ROOT = Path(__file__).parents[2]
SEPARATOR = ","


@contextmanager
def launched(*commands: list[str], log: Path, module: str = "tests.pipelines.processes") -> Iterator[subprocess.Popen]:
    """Starts both processes; at the end of the context they, and what started them, are killed if they still run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    settings = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    arguments = [argument for command in commands for argument in (*command, SEPARATOR)]
    command = [sys.executable, "-m", "accelerate.commands.launch", *settings.split(), "--main_process_port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "-m", module, *arguments],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        )
    try:
        yield process
    finally:
        kill_all(process)


def kill_all(process: subprocess.Popen) -> None:
    """Kills the launcher and the processes that it started, all with SIGKILL."""
    if process.poll() is None:
        launcher = psutil.Process(process.pid)
        started = launcher.children(recursive=True)
        for one in (launcher, *started):
            one.kill()
        psutil.wait_procs(started, timeout=10)
    process.wait()


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    """Waits until the path exists, as long as the process runs."""
    deadline = time.monotonic() + seconds
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


def run_all(arguments: list[str], main: Callable[[list[str]], int] = main) -> int:
    """Runs the commands, which a comma ends, up to the first that fails; returns its code, or 0."""
    groups = itertools.groupby(arguments, lambda argument: argument == SEPARATOR)
    return next((code for is_end, command in groups if not is_end and (code := main(list(command)))), 0)


if __name__ == "__main__":
    sys.exit(run_all(sys.argv[1:]))
