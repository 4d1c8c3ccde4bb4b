"""Answers questions in one process; and again in processes of torchrun that are killed at random, then to their end.

python -m tests.pipelines.vl.shared_answers KILLS CONFIG KEY=VALUE...

Prints how often some answers were there at that moment, but not all.
"""

import random
import sys
from pathlib import Path

import transformers  # noqa: F401

from dora_mm.recipes import PIPELINES
from tests.pipelines.images.shared_generation import SHARED, WHOLE, Death, launch


def num_answers(run: Path = SHARED) -> int:
    """How many answers a run has kept."""
    return sum(len(file.read_bytes().splitlines()) for file in (run / "answers").glob("*.jsonl"))


def kill_at_random(arguments: list[str], kills: int) -> int:
    """Starts 2, 3 and 1 processes in turns, of which one or all are killed; returns how often in between."""
    stream, between, total = random.Random(0), 0, num_answers(WHOLE)
    for number in range(kills):
        count = (2, 3, 1)[number % 3]
        ranks = range(count) if number % 4 == 3 else [stream.randrange(count)]
        there = num_answers()
        launch(arguments, count, Death(ranks, stream.randrange(there, there + 8), 0.0, num_answers))
        between += 0 < num_answers() < total
        if num_answers() == total:  # some are taken away
            (file,) = (SHARED / "answers").glob("*.jsonl")
            file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[: total // 4]))
    return between


if __name__ == "__main__":
    kills, config, *changes = sys.argv[1:]
    PIPELINES.load("eval_vl")  # once, for all processes
    assert launch(["eval", config, "--set", f"output={WHOLE}", *changes], 1, Death())
    shared = ["eval", config, "--set", f"output={SHARED}", *changes]
    print(kill_at_random(shared, int(kills)))
    assert launch(shared, 2, Death())
