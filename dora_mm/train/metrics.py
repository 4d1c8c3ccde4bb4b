"""The metrics of a run, one JSON object per line, and what a person sees of them meanwhile."""

import hashlib
import json
import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dora_mm.utils.atomic import flush, open_to_append, write_text
from dora_mm.utils.lock import check_lock
from dora_mm.utils.metric_rows import complete_rows
from dora_mm.utils.progress import Progress
from dora_mm.utils.run_directory import RunDirectory


class MetricsLog:
    """Appends to the metrics.jsonl of a run or of one of its stages, and shows the same by the run's trackers.

    A resumed run goes on from the rows, by which the best adapter is chosen. So metrics.sha256 has their digest, of as
    many bytes as there were at the last checkpoint.

    Args:
        run: The run, or its stage.
        resumed_step: The number of finished steps that the run resumes from. Rows of later steps are dropped, because
            the resumed run writes them again.

    Raises:
        ValueError: The rows of an earlier process are not as it wrote them.
    """

    def __init__(self, run: RunDirectory, resumed_step: int = 0):
        self.path = run.path / "metrics.jsonl"
        self._digest_file = run.path / "metrics.sha256"
        self._trackers, self._prefix = run.trackers, run.prefix
        kept = complete_rows(resumed_step, self._intact_bytes())
        self._digest, self._num_bytes = hashlib.sha256(kept), len(kept)
        if self.path.exists():
            self._write_digest()  # first: it is also that of the longer file
            write_text(self.path, kept.decode())
        self._file = open_to_append(self.path)

    def write(self, step: int, **values: float) -> None:
        """Appends one row with the `values` after `step` finished steps."""
        check_lock(self.path)
        row = json.dumps({"step": step, **values}) + "\n"
        self._file.write(row)
        self._file.flush()
        self._digest.update(row.encode())
        self._num_bytes += len(row.encode())
        for tracker in self._trackers:
            tracker.log({f"{self._prefix}{name}": value for name, value in values.items()}, step)

    def sync(self) -> None:
        """Puts the rows and their digest on disk: before a checkpoint, from which a resumed run goes on with them."""
        flush(self.path)
        self._write_digest()

    def close(self) -> None:
        self._file.close()

    def _write_digest(self) -> None:
        write_text(self._digest_file, f"{self._digest.hexdigest()} {self._num_bytes}\n")

    def _intact_bytes(self) -> bytes:
        """The rows of an earlier process, after a check of those that have a digest."""
        found = self.path.read_bytes() if self.path.exists() else b""
        if not self._digest_file.exists():
            return found  # it was killed before its first checkpoint
        digest, _, size = self._digest_file.read_text(encoding="utf-8", errors="replace").strip().partition(" ")
        known = int(size) if size.isdecimal() else 0
        if len(found) < known or hashlib.sha256(found[:known]).hexdigest() != digest:
            raise ValueError(
                f"{self.path} is not as the run wrote it, by {self._digest_file.name}: restore it, or delete both to "
                "go on without the curves so far."
            )
        return found


class TrainingProgress:
    """The mean loss, running and of the last steps, and the seconds of training, over all parts of a resumed run.

    Shows how far the training is, with its loss and learning rate: see `Progress`.

    Args:
        total: The step that training ends at.
        every: Steps between two lines where there is no terminal; between slow ones there are more.
        shown: Whether to print anything.
    """

    def __init__(self, total: int, every: int, *, shown: bool):
        self.mean_loss = math.nan
        self._total, self._every, self._shown = total, every, shown
        self._seconds_before, self._started = 0.0, time.monotonic()
        self._last_losses: list[float] = []
        self._display = ExitStack()

    def start(self, first: int) -> None:
        """Starts the clock of this process and the display, after `first` finished steps."""
        self._started = time.monotonic()
        self._step = first
        shown = Progress("training", self._total, "steps", done=first, hidden=not self._shown, keep=True)
        self._progress = self._display.enter_context(shown)

    @property
    def seconds(self) -> float:
        """Seconds of training, those of earlier processes up to their last checkpoint included."""
        return self._seconds_before + time.monotonic() - self._started

    def advance(self, loss: float, rate: float) -> None:
        """Records one finished step with its loss and learning rate."""
        self._step += 1
        self._last_losses.append(loss)
        # A running mean over some 50 steps: a single diffusion loss mostly reflects which timesteps were drawn. Until
        # there are so many it is the plain mean, since the first loss can be many times those that follow.
        share = max(1 / self._step, 0.02)
        self.mean_loss = loss if math.isnan(self.mean_loss) else (1 - share) * self.mean_loss + share * loss
        self._progress.note = f"loss {self.mean_loss:.4f}, lr {rate:.1e}"
        self._progress.advance()
        if self._step % self._every == 0 and self._step < self._total:
            self._progress.report()

    def take_last_loss(self) -> float:
        """The mean loss of the steps since the last call."""
        last, self._last_losses = self._last_losses, []
        return sum(last) / len(last)

    def state_dict(self) -> dict[str, Any]:
        return {"mean_loss": self.mean_loss, "seconds": self.seconds, "last_losses": self._last_losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.mean_loss, self._seconds_before = state_dict["mean_loss"], state_dict["seconds"]
        self._last_losses = list(state_dict["last_losses"])

    def close(self) -> None:
        self._display.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl file: dicts with `step` and the logged values."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
