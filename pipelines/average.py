"""dora-mm average: one adapter from those of several checkpoints of a training."""

from pathlib import Path

from dora_mm.train.weights import average_checkpoints


def main(run: Path, *, last: int | None = None) -> None:
    """Writes adapter-average/ into a run: the mean of A, B and m, each, over the checkpoints that it has kept.

    Args:
        run: The run directory.
        last: How many of the newest checkpoints; None: all.

    Raises:
        ValueError: It is no run of a training, has a single checkpoint, or a damaged one; or the result of the
            training is not in its checkpoints.
    """
    steps, file = average_checkpoints(run, last)
    print(f"average of the steps {', '.join(map(str, steps))}\n\nadapter  {file.parent}")
