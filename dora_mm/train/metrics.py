"""The metrics of a run: one JSON object per line, and TensorBoard files if it is installed."""

import json
from pathlib import Path
from typing import Any

from dora_mm.utils.atomic import write_text


class MetricsLog:
    """Appends to metrics.jsonl and tensorboard/ in one folder.

    Args:
        folder: Where both are.
        resumed_step: The number of finished steps that the run resumes from. Rows of later steps are dropped, because
            the resumed run writes them again.
    """

    def __init__(self, folder: Path, resumed_step: int = 0):
        self.path = folder / "metrics.jsonl"
        _keep_rows_before(self.path, resumed_step)
        self._file = self.path.open("a")
        self._board = _tensorboard(folder / "tensorboard", resumed_step)

    def write(self, step: int, **values: float) -> None:
        """Appends one row with the `values` after `step` finished steps."""
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
    """The rows of a metrics.jsonl file: dicts with `step` and the logged values."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The rows up to a step of a metrics.jsonl file that a killed process may have left; none without a file."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # a line that the process did not finish
            break
        if row["step"] <= step:
            rows.append(row)
    return rows


def _keep_rows_before(path: Path, resumed_step: int) -> None:
    """Drops the rows that an interrupted run logged after its last checkpoint; they will be logged again."""
    if path.exists():
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows_until(path, resumed_step)))


def _tensorboard(folder: Path, resumed_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # TensorBoard is optional: metrics.jsonl holds the same numbers
        return None
    return SummaryWriter(folder, purge_step=resumed_step + 1 if resumed_step else None)
