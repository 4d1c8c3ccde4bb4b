"""Runs a command in one process; and again in processes of torchrun that are killed at random moments, then to its end.

python -m tests.pipelines.pictures.shared_job KILLS RECIPE COMMAND ARGUMENT...

The agent of torchrun forks the processes here, from one that has imported everything: a new interpreter takes seconds.
Prints how often some pictures were there at that moment, but not all.
"""

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel  # noqa: F401
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer  # noqa: F401

from dora_mm.cli import main
from dora_mm.recipes import PIPELINES
from dora_mm.utils.processes import started_together

WHOLE, SHARED = Path("whole"), Path("shared")


def worker(arguments: list[str], victims: dict[int, float]) -> None:
    """Runs the command, and dies meanwhile if it is one of the victims, after as many seconds."""
    torch.set_num_threads(1)
    started_together.cache_clear()
    seconds = victims.get(int(os.environ["RANK"]))
    if seconds is not None:
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    if code := main(arguments):
        os._exit(code)


def launch(arguments: list[str], count: int, victims: dict[int, float]) -> bool:
    """Has the agent start so many processes; returns whether the command came to its end."""
    config = LaunchConfig(1, 1, count, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="a", max_restarts=0)
    config.start_method = "fork"
    try:
        elastic_launch(config, worker)(arguments, victims)
    except ChildFailedError:
        return False
    return True


def pictures(run: Path) -> list[Path]:
    """The pictures of a run that are there, relative to it."""
    return sorted(path.relative_to(run) for path in (run / "samples").rglob("*.png"))


def kill_at_random(arguments: list[str], kills: int, moments: tuple[float, float]) -> int:
    """Starts 2, 3 and 1 processes in turns, of which one or all are killed, most of them between two moments.

    Returns:
        How often some pictures were there then, but not all.
    """
    stream, killed, between = random.Random(0), 0, 0
    while killed < kills:
        count = (2, 3, 1)[killed % 3]
        ranks = range(count) if killed % 4 == 3 else [stream.randrange(count)]
        seconds = stream.uniform(*(moments if killed % 4 else (0, moments[0])))
        is_whole = launch(arguments, count, dict.fromkeys(ranks, seconds))
        found = pictures(SHARED)
        assert [name for name in found if (SHARED / name).read_bytes() != (WHOLE / name).read_bytes()] == []
        if is_whole:  # too late: some are taken away
            for name in stream.sample(found, len(found) * 2 // 3):
                (SHARED / name).unlink()
        else:
            killed += 1
            between += 0 < len(found) < len(pictures(WHOLE))
    return between


if __name__ == "__main__":
    kills, recipe, *command = sys.argv[1:]
    PIPELINES.load(recipe)  # once, for all processes
    started = time.time()
    assert launch([*command, f"output={WHOLE}"], 1, {})
    ends = [(WHOLE / name).stat().st_mtime - started for name in pictures(WHOLE)]
    print(kill_at_random([*command, f"output={SHARED}"], int(kills), (min(ends), max(ends))))
    assert launch([*command, f"output={SHARED}"], 2, {})
