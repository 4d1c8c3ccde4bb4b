"""dora-mm in processes of its own: several at a time, the output of each in a file."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    name: str
    process: subprocess.Popen
    log_file: Path


def start_job(name: str, arguments: list[str], log_file: Path, threads: int) -> Job:
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dora_mm", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
    return Job(name, process, log_file)


def check_job(job: Job) -> None:
    """Raises for a job that ended in any other way than done."""
    status = job.process.returncode
    if status == 2:
        sentence = job.log_file.read_text().strip().splitlines()[-1]
        raise ValueError(f"a training of the comparison stopped: {sentence}")
    if status != 0:
        raise RuntimeError(f"{job.name} ended with exit code {status}; its output is in {job.log_file}")


def run_jobs(starts: Sequence[Callable[[], Job]], workers: int, done: Callable[[Job], None]) -> None:
    """Starts them in their order, `workers` at a time, and calls `done` with each that has ended well.

    Raises:
        ValueError: one stopped with a sentence. The others are told to save their state, as they are when this process
            is interrupted.
    """
    waiting, running = list(starts)[::-1], []
    with tqdm(total=len(starts), desc="trainings", unit="training", disable=None) as bar:  # None: terminals only
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    running.append(waiting.pop()())
                time.sleep(POLL_SECONDS)
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    check_job(job)
                    done(job)
                    bar.update()
        finally:
            for job in running:
                job.process.terminate()
            for job in running:
                job.process.wait()
