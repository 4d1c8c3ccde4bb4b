"""Runs a command in one process; and again in processes of torchrun that are killed at random moments, then to its end.

python -m tests.pipelines.images.shared_generation KILLS RECIPE COMMAND ARGUMENT...

The agent of torchrun forks the processes here, from one that has imported everything: a new interpreter takes seconds.
Prints how often some images were there at that moment, but not all.
"""

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel  # noqa: F401
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer  # noqa: F401

from dora_mm.cli import main
from dora_mm.recipes import PIPELINES
from dora_mm.utils.processes import started_together

WHOLE, SHARED = Path("whole"), Path("shared")


def images(run: Path) -> list[Path]:
    """The images of a run that are there, relative to it."""
    return sorted(path.relative_to(run) for path in (run / "samples").rglob("*.png"))


class Death(NamedTuple):
    """When processes are killed.

    Attributes:
        ranks: Which ones.
        after: When so many images are there.
        seconds: Later than that.
        there: What counts them, if they are no images.
    """

    ranks: Collection[int] = ()
    after: int = 0
    seconds: float = 0.0
    there: Callable[[], int] = lambda: len(images(SHARED))

    def wait(self) -> None:
        """Waits for the moment, and kills this process."""
        while self.there() < self.after:
            time.sleep(0.005)
        time.sleep(self.seconds)
        os.kill(os.getpid(), signal.SIGKILL)


def worker(arguments: list[str], death: Death) -> None:
    """Runs the command, and dies meanwhile if it has to."""
    torch.set_num_threads(1)
    started_together.cache_clear()
    if int(os.environ["RANK"]) in death.ranks:
        threading.Thread(target=death.wait, daemon=True).start()
    if code := main(arguments):
        os._exit(code)


def launch(arguments: list[str], count: int, death: Death) -> bool:
    """Has the agent start so many processes; returns whether the command came to its end."""
    config = LaunchConfig(1, 1, count, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="a", max_restarts=0)
    config.start_method = "fork"
    try:
        elastic_launch(config, worker)(arguments, death)
    except ChildFailedError:
        return False
    return True


def kill_at_random(arguments: list[str], kills: int, loading: float, drawing: float) -> int:
    """Starts 2, 3 and 1 processes in turns, of which one or all are killed.

    Args:
        arguments: Of the command.
        kills: How many times.
        loading: The seconds until one process has its first image.
        drawing: The seconds from then to its last one.

    Returns:
        How often some images were there then, but not all.
    """
    stream, killed, between, total = random.Random(0), 0, 0, len(images(WHOLE))
    while killed < kills:
        count, there = (2, 3, 1)[killed % 3], len(images(SHARED))
        ranks = range(count) if killed % 4 == 3 else [stream.randrange(count)]
        concurrency = there == total or killed % 5 == 4
        after = 0 if concurrency else stream.randrange(there, total)
        death = Death(ranks, after, stream.uniform(0, loading if concurrency else drawing / 8))
        is_whole = launch(arguments, count, death)
        found = images(SHARED)
        assert [name for name in found if (SHARED / name).read_bytes() != (WHOLE / name).read_bytes()] == []
        if not is_whole:
            killed += 1
            between += 0 < len(found) < total
        if len(found) == total:  # some are taken away
            for name in stream.sample(found, total * 2 // 3):
                (SHARED / name).unlink()
    return between


if __name__ == "__main__":
    kills, recipe, *command = sys.argv[1:]
    PIPELINES.load(recipe)  # once, for all processes
    started = time.time()
    assert launch([*command, f"output={WHOLE}"], 1, Death())
    ends = [(WHOLE / name).stat().st_mtime for name in images(WHOLE)]
    print(kill_at_random([*command, f"output={SHARED}"], int(kills), min(ends) - started, max(ends) - min(ends)))
    assert launch([*command, f"output={SHARED}"], 2, Death())
