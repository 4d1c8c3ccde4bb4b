"""The losses of single images or rows, in a run directory: losses/step-000200.jsonl, one JSON object per line."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dora_mm.utils.atomic import write_text
from dora_mm.utils.json_text import parse_json

FOLDER = "losses"
NUM_TIMES = 8  # of each image; a diffusion loss depends more on the time than on the image


class ExampleLoss(NamedTuple):
    """The loss of an image at a resolution, or of a row.

    Attributes:
        id: The digest of an image and the text of its caption, or the number of a row: the same in all measurements.
        group: What it is compared within: the resolution of images, or the task of rows.
        text: The caption, or the question.
        losses: At each of the fixed times; of a row it is one.
        path: The file of an image; empty: none is shown.
        digest: SHA-256 of that file.
        answer: Of a row.
    """

    id: str
    group: str
    text: str
    losses: Sequence[float]
    path: str = ""
    digest: str = ""
    answer: str = ""


class ExampleLosses:
    """Measures the loss of each image or row in the course of a training, and writes it.

    A measurement is a function of the weights, and a resumed run writes those of later steps again.

    Args:
        path: The run directory.
        every: Optimizer steps between measurements; 0: only before the first step and at the end.
        measure: Measures all of them.
        writes: Whether this process writes.
    """

    def __init__(self, path: Path, every: int, measure: Callable[[], list[ExampleLoss]], *, writes: bool):
        self.path, self.every, self.measure, self.writes = path, every, measure, writes

    def is_due(self, step: int, steps: int) -> bool:
        """Whether to measure after `step` finished steps of a training of `steps`, whose end has its own."""
        return 0 < step < steps and bool(self.every) and step % self.every == 0

    def __call__(self, step: int) -> None:
        """Measures after `step` finished steps."""
        rows = self.measure()
        if self.writes:
            file = self.path / FOLDER / f"step-{step:06d}.jsonl"
            file.parent.mkdir(exist_ok=True)
            write_text(file, "".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows))


def read_losses(path: Path, last: int) -> dict[int, list[ExampleLoss]]:
    """The measurements of a run directory up to a step, by step.

    Raises:
        ValueError: A file is not as a training wrote it.
    """
    found = {}
    for file in sorted((path / FOLDER).glob("step-*.jsonl")):
        number = file.stem.removeprefix("step-")
        if number.isdecimal() and int(number) <= last:
            lines = file.read_text(encoding="utf-8").splitlines()
            found[int(number)] = [_read(line, f"{file}, line {each}") for each, line in enumerate(lines, 1)]
    return dict(sorted(found.items()))


def _read(line: str, where: str) -> ExampleLoss:
    row = parse_json(line, where)
    if not isinstance(row, Mapping) or not _is_complete(row):
        raise ValueError(f"{where} is not as a training wrote it: delete the file")
    return ExampleLoss(**row)


def _is_complete(row: Mapping[str, Any]) -> bool:
    losses = row.get("losses")
    numbers = isinstance(losses, list) and losses and all(isinstance(n, int | float) for n in losses)
    texts = all(isinstance(value, str) for name, value in row.items() if name != "losses")
    return bool(numbers) and texts and {"id", "group", "text"} <= set(row) <= set(ExampleLoss._fields)
