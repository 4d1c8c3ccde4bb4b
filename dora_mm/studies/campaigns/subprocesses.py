"""Runs dora-mm commands in subprocesses, several at a time, with the output of each in a log file."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dora_mm.utils.progress import Progress

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class TrainingProcess:
    """A running dora-mm command.

    Attributes:
        name: Identifies it in messages.
        process: Its process.
        log_file: Holds its standard output and standard error.
    """

    name: str
    process: subprocess.Popen
    log_file: Path


def start_process(name: str, arguments: list[str], log_file: Path, threads: int) -> TrainingProcess:
    """Starts a dora-mm command in a subprocess.

    Args:
        name: Identifies the process in messages.
        arguments: The command-line arguments after `dora-mm`.
        log_file: Receives standard output and standard error; its folder is created.
        threads: The number of CPU threads that the subprocess uses.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dora_mm", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
    return TrainingProcess(name, process, log_file)


def check_process(training: TrainingProcess) -> None:
    """Checks that a finished process succeeded.

    Raises:
        ValueError: The process reported a user's mistake; the message is its last line of output.
        RuntimeError: The process failed in any other way.
    """
    status = training.process.returncode
    if status == 2:
        message = training.log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
        raise ValueError(f"the training {training.name} failed: {message}")
    if status != 0:
        raise RuntimeError(
            f"the training {training.name} failed with exit code {status}; its output is in {training.log_file}"
        )


def run_processes(
    starts: Sequence[Callable[[], TrainingProcess]],
    workers: int,
    on_success: Callable[[TrainingProcess], None],
    may_fail: Callable[[TrainingProcess], bool],
) -> None:
    """Runs processes, `workers` at a time. When one fails, or this process is interrupted, the others save their state.

    Args:
        starts: Functions that each start one training; called in this order.
        workers: How many processes run at a time.
        on_success: Called with each training that has succeeded, or failed as it may.
        may_fail: Whether the failure of a training is a result like others.

    Raises:
        ValueError: A process reported a user's mistake.
        RuntimeError: A process failed in any other way.
    """
    waiting, running = list(starts)[::-1], []
    with Progress("trainings", len(starts), "trainings") as progress:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    running.append(waiting.pop()())
                time.sleep(POLL_SECONDS)
                for training in [training for training in running if training.process.poll() is not None]:
                    running.remove(training)
                    if not may_fail(training):
                        check_process(training)
                    on_success(training)
                    progress.advance()
        finally:
            for training in running:
                training.process.terminate()
            for training in running:
                training.process.wait()
