"""What the judge says of a set of pictures, and the figures with intervals that follow from it.

Shapes: K concepts, S seeds, C classes, D principal components of the style space.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dora_mm.eval.images.style import CLASSES, StyleSpace, log_odds
from dora_mm.eval.statistics import Interval, bootstrap, crossed, jackknife
from dora_mm.utils.atomic import write_atomically
from dora_mm.utils.tables import markdown_table


@dataclass(frozen=True)
class Scores:
    """One cell per picture: its class log probabilities, its place in the style space, and its own concept's rank."""

    codes: tuple[str, ...]
    seeds: tuple[int, ...]
    log_probabilities: np.ndarray  # (K, S, C)
    projected: np.ndarray  # (K, S, D)
    ranks: np.ndarray  # (K, S)

    def in_style(self, name: str) -> np.ndarray:
        """1 where the class is the likeliest, (K, S)."""
        return (self.log_probabilities.argmax(axis=-1) == list(CLASSES).index(name)).astype(float)

    def log_odds(self, name: str) -> np.ndarray:
        return log_odds(self.log_probabilities, name)

    def recognised(self) -> np.ndarray:
        """1 where the nearest icon is the right concept's, (K, S)."""
        return (self.ranks == 1).astype(float)

    def both(self, name: str) -> np.ndarray:
        """1 where the picture is in the style AND is the right thing, (K, S): neither is worth much alone."""
        return self.in_style(name) * self.recognised()

    def soft_both(self, name: str) -> np.ndarray:
        """Probability of the style times 1 / rank of the concept: `both` with fewer ties, to choose settings by."""
        return np.exp(self.log_probabilities[..., list(CLASSES).index(name)]) / self.ranks

    def save(self, path: Path) -> None:
        rows: dict[str, Any] = {
            "codes": list(self.codes),
            "seeds": list(self.seeds),
            "log_probabilities": np.round(self.log_probabilities, 4).tolist(),
            "projected": np.round(self.projected, 4).tolist(),
            "ranks": self.ranks.tolist(),
        }
        write_json(path, rows)

    @classmethod
    def load(cls, path: Path) -> "Scores":
        rows = json.loads(path.read_text())
        return cls(
            tuple(rows["codes"]),
            tuple(rows["seeds"]),
            np.array(rows["log_probabilities"]),
            np.array(rows["projected"]),
            np.array(rows["ranks"]),
        )


def join_seeds(parts: Sequence[Scores]) -> Scores:
    """Scores of the same concepts under further seeds, side by side."""
    assert all(part.codes == parts[0].codes for part in parts)
    return Scores(
        parts[0].codes,
        tuple(seed for part in parts for seed in part.seeds),
        np.concatenate([part.log_probabilities for part in parts], axis=1),
        np.concatenate([part.projected for part in parts], axis=1),
        np.concatenate([part.ranks for part in parts], axis=1),
    )


def write_json(path: Path, value: Any) -> None:
    """Appears whole or not at all."""

    def write(partial: Path) -> None:
        partial.write_text(json.dumps(value) + "\n", encoding="utf-8")

    write_atomically(path, write)


METRICS = {  # key: heading, as a share or a plain number
    "style": ("style share", True),
    "log_odds": ("log-odds of the style", False),
    "frechet": ("Fréchet distance", False),
    "concept": ("concept score", True),
    "both": ("both", True),
}


BOUNDS = {True: (0.0, 1.0), False: (-np.inf, np.inf)}  # of a share, of any other number


def summarize(scores: Scores, name: str, space: StyleSpace, *, over_seeds: bool) -> dict[str, Interval]:
    """95 % intervals of every metric for the wanted class; `over_seeds` where each seed is a training of its own."""

    def distance(things: np.ndarray, seeds: np.ndarray | slice = slice(None)) -> float:
        return space.distance(_flat(scores.projected[things][:, seeds]), name)

    found = {
        key: crossed(values, bounds=BOUNDS[METRICS[key][1]]) if over_seeds else bootstrap(values)
        for key, values in metric_cells(scores, name).items()
    }
    found["frechet"] = jackknife(scores.projected.shape[: 2 if over_seeds else 1], distance)
    return {key: found[key] for key in METRICS}


def metric_cells(scores: Scores, name: str) -> dict[str, np.ndarray]:
    """The metrics that are means over pictures, (K, S) each."""
    return {
        "style": scores.in_style(name),
        "log_odds": scores.log_odds(name),
        "concept": scores.recognised(),
        "both": scores.both(name),
    }


def _flat(x_KSD: np.ndarray) -> np.ndarray:
    return x_KSD.reshape(-1, x_KSD.shape[-1])


def format_interval(interval: Interval, share: bool) -> str:
    """ "83 % (74 to 91)" or "2.31 (1.80 to 2.77)"."""
    if share:
        return f"{100 * interval.mean:.0f} % ({100 * interval.low:.0f} to {100 * interval.high:.0f})"
    return f"{interval.mean:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def metrics_table(rows: dict[str, dict[str, Interval]]) -> str:
    """Markdown: a row per name, every metric with its 95 % interval."""
    headings = ["", *(heading for heading, _ in METRICS.values())]
    body = [
        [name, *(format_interval(found[key], share) for key, (_, share) in METRICS.items())]
        for name, found in rows.items()
    ]
    return markdown_table(headings, body)
