"""Trainings that record their batches: rows, noise and dropout of each micro-batch that a process computes.

... -m tests.pipelines.recorded FOLDER train a.yaml , FOLDER train --resume RUN ,
"""

import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from dora_mm.cli import main
from dora_mm.train.loop import LossModule
from tests.pipelines.processes import run_all


def recorded(command: list[str]) -> int:
    """Runs the command behind a folder, which receives the micro-batches of this process."""
    found, forward = [], LossModule.forward

    def record(self: LossModule, batch: Any, stream: torch.Generator) -> Any:
        found.append((*rows_of(batch), stream.initial_seed(), torch.initial_seed()))  # of noise, and of dropout
        return forward(self, batch, stream)

    folder = Path(command[0])
    with patch.object(LossModule, "forward", record):
        code = main(command[1:])
    folder.mkdir(exist_ok=True)
    torch.save(found, folder / os.environ.get("RANK", "0"))
    return code


def rows_of(batch: Any) -> tuple[list[Any], torch.Tensor]:
    """What a batch has: names and labels of rows; or how images are cut, and their latents, which are rounded."""
    if hasattr(batch, "groups"):
        return [[row.id for row in batch.examples], *(labels.tolist() for _, labels, _ in batch.groups)], torch.zeros(0)
    return [str(framing) for framing in batch.framings], batch.latents


def in_order(folder: Path, accumulated: int) -> list[tuple[Any, ...]]:
    """The micro-batches of all processes by their numbers."""
    every = [torch.load(file, weights_only=True) for file in sorted(folder.iterdir())]
    starts = range(0, len(every[0]), accumulated)
    return [process[start + micro] for start in starts for micro in range(accumulated) for process in every]


if __name__ == "__main__":
    sys.exit(run_all(sys.argv[1:], recorded))
