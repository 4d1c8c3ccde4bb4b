"""Metrics of a run: one JSON object a line, and TensorBoard where it is installed."""

import json
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends to metrics.jsonl and tensorboard/. After a resume, rows from the resumed step on are written again."""

    def __init__(self, folder: Path, resumed_step: int = 0):
        self.path = folder / "metrics.jsonl"
        _keep_rows_before(self.path, resumed_step)
        self._file = self.path.open("a")
        self._board = _tensorboard(folder / "tensorboard", resumed_step)

    def write(self, step: int, **values: float) -> None:
        """One row: `values` after `step` finished steps."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _keep_rows_before(path: Path, resumed_step: int) -> None:
    """Drops what an interrupted run logged after its last checkpoint: it will be logged again."""
    if path.exists():
        kept = []
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the line that a killed process did not finish
                break
            if row["step"] <= resumed_step:
                kept.append(line + "\n")
        path.write_text("".join(kept))


def _tensorboard(folder: Path, resumed_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # an extra: metrics.jsonl holds the same numbers
        return None
    return SummaryWriter(folder, purge_step=resumed_step + 1 if resumed_step else None)
