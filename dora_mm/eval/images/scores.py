"""The classifier's scores of a set of images, and the metrics with intervals that are computed from them.

Shapes: K concepts, S seeds, C classes, D principal components of the style space.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dora_mm.eval.images.style import CLASSES, StyleSpace, log_odds
from dora_mm.eval.statistics import ConfidenceInterval, mean_ci, share_ci
from dora_mm.utils.atomic import write_text
from dora_mm.utils.tables import markdown_table


@dataclass(frozen=True)
class Scores:
    """Scores of one image per concept and seed.

    Attributes:
        codes: The K concept codes.
        seeds: The S seeds.
        log_probabilities: Of the style classes.
        projected: Coordinates in the style space; None: they were not kept.
        ranks: The rank of the image's own concept, 1 where it is recognised.
    """

    codes: tuple[str, ...]
    seeds: tuple[int, ...]
    log_probabilities: np.ndarray  # (K, S, C)
    projected: np.ndarray | None  # (K, S, D)
    ranks: np.ndarray  # (K, S)

    def in_style(self, name: str) -> np.ndarray:
        """Returns 1 where the class is the most probable, else 0, (K, S)."""
        return (self.log_probabilities.argmax(axis=-1) == list(CLASSES).index(name)).astype(float)

    def log_odds(self, name: str) -> np.ndarray:
        """Returns the log-odds of the class, (K, S)."""
        return log_odds(self.log_probabilities, name)

    def recognised(self) -> np.ndarray:
        """Returns 1 where the nearest icon shows the right concept, else 0, (K, S)."""
        return (self.ranks == 1).astype(float)

    def both(self, name: str) -> np.ndarray:
        """Returns 1 where style AND concept are right, else 0, (K, S): neither is worth much alone."""
        return self.in_style(name) * self.recognised()

    def soft_both(self, name: str) -> np.ndarray:
        """Returns the probability of the style divided by the rank of the concept, (K, S).

        It is `both` with fewer ties, for choosing settings.
        """
        return np.exp(self.log_probabilities[..., list(CLASSES).index(name)]) / self.ranks

    def cells(self, name: str) -> dict[str, np.ndarray]:
        """Returns all scores of single images by their names in a gallery, (K, S) each."""
        return {
            "log-odds of the style": self.log_odds(name),
            "in the style": self.in_style(name),
            "right thing": self.recognised(),
            "rank of the thing": self.ranks,
            "style and thing": self.both(name),
        }

    def as_json(self) -> str:
        """All scores as JSON, rounded, on one line, for `from_json`."""
        rows: dict[str, Any] = {
            "codes": list(self.codes),
            "seeds": list(self.seeds),
            "log_probabilities": np.round(self.log_probabilities, 4).tolist(),
            "ranks": self.ranks.tolist(),
        }
        if self.projected is not None:
            rows["projected"] = np.round(self.projected, 2).tolist()
        return json.dumps(rows, separators=(",", ":"))

    def save(self, path: Path) -> None:
        """Writes a JSON file."""
        write_text(path, self.as_json() + "\n")

    @classmethod
    def load(cls, path: Path) -> "Scores":
        """Reads what `save` wrote."""
        return cls.from_json(path.read_text(encoding="utf-8"))

    @classmethod
    def from_json(cls, text: str) -> "Scores":
        """Reads what `as_json` returned."""
        rows = json.loads(text)
        return cls(
            tuple(rows["codes"]),
            tuple(rows["seeds"]),
            np.array(rows["log_probabilities"]),
            np.array(rows["projected"]) if "projected" in rows else None,
            np.array(rows["ranks"]),
        )


def concatenate_seeds(parts: Sequence[Scores]) -> Scores:
    """Concatenates scores of the same concepts under different seeds; coordinates only where all have them."""
    assert all(part.codes == parts[0].codes for part in parts)
    projected = [part.projected for part in parts if part.projected is not None]
    return Scores(
        parts[0].codes,
        tuple(seed for part in parts for seed in part.seeds),
        np.concatenate([part.log_probabilities for part in parts], axis=1),
        np.concatenate(projected, axis=1) if len(projected) == len(parts) else None,
        np.concatenate([part.ranks for part in parts], axis=1),
    )


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(value) + "\n")


METRICS = {  # key: heading, whether it is a share (printed in per cent)
    "style": ("style share", True),
    "log_odds": ("log-odds of the style", False),
    "frechet": ("Fréchet distance", False),
    "concept": ("concept score", True),
    "both": ("both", True),
}
MEANS = {key: about for key, about in METRICS.items() if key != "frechet"}  # over images, so that they have intervals


def summarize(scores: Scores, name: str, space: StyleSpace, *, over_seeds: bool) -> dict[str, ConfidenceInterval]:
    """Returns every metric with its 95 % interval, by the keys of METRICS.

    The Fréchet distance has none: that of few images lies far above the truth, by an amount that depends on it.

    Args:
        scores: Of K concepts and S seeds, with their coordinates.
        name: The wanted class.
        space: The style space of the judge.
        over_seeds: As in `mean_metrics`.
    """
    assert scores.projected is not None
    found = mean_metrics(scores, name, over_seeds=over_seeds)
    found["frechet"] = ConfidenceInterval(
        space.distance(scores.projected.reshape(-1, scores.projected.shape[-1]), name)
    )
    return {key: found[key] for key in METRICS}


def mean_metrics(scores: Scores, name: str, *, over_seeds: bool) -> dict[str, ConfidenceInterval]:
    """Returns the metrics that are means over images with their 95 % intervals, by the keys of MEANS.

    Args:
        scores: Of K concepts and S seeds.
        name: The wanted class.
        over_seeds: Each seed is a separate training run, and intervals are over concepts and runs; otherwise they are
            over concepts.
    """
    return {
        key: (share_ci if MEANS[key][1] else mean_ci)(values, over_runs=over_seeds)
        for key, values in metric_cells(scores, name).items()
    }


def metric_cells(scores: Scores, name: str) -> dict[str, np.ndarray]:
    """Returns the metrics that are means over images, as the values of every image, (K, S) each."""
    return {
        "style": scores.in_style(name),
        "log_odds": scores.log_odds(name),
        "concept": scores.recognised(),
        "both": scores.both(name),
    }


def scores_per_image(cells: Mapping[str, np.ndarray]) -> list[dict[str, float]]:
    """Returns the scores of each image by name, seeds varying fastest, from arrays (K, S) or (K * S,) of each."""
    columns = [np.round(values, 4).reshape(-1).tolist() for values in cells.values()]
    return [dict(zip(cells, row, strict=True)) for row in zip(*columns, strict=True)]


def conclusion(bare: Mapping[str, ConfidenceInterval], adapted: Mapping[str, ConfidenceInterval] | None) -> str:
    """The conclusion from the metrics of a style, with advice, in sentences.

    Args:
        bare: Those of the bare model, with the style in the prompt.
        adapted: Those of the adapter; None: there is none.
    """
    if adapted is None:
        return "These are the bare model's images: --set adapter.path=RUN scores a training beside them."
    before, after = bare["both"], adapted["both"]
    shares = " against ".join(format_ci(found, share=True) for found in (after, before))
    right = f"style and thing are right in {shares} of the images"
    if after.low <= before.high and after.high >= before.low:
        more = "score more things (concepts.count) or seeds, or train longer"
        return f"The adapter is not distinguishable from the bare model: {right}. To tell them apart: {more}."
    verdict = "better" if after.low > before.high else "worse"
    if adapted["style"].mean < adapted["concept"].mean:
        cure = "the style, for which more steps or a higher strength may help"
    else:
        cure = "the thing, for which fewer steps, a lower rate or strength may help"
    return f"The adapter is {verdict} than the bare model: {right}. What is missed most is {cure}."


def format_ci(ci: ConfidenceInterval, share: bool) -> str:
    """Returns "83 % (74 to 91)" for a share, or else "2.31 (1.80 to 2.77)"."""
    return ci.text("{:.0f}", 100.0).replace(" (", " % (") if share else ci.text()


def metrics_table(rows: dict[str, dict[str, ConfidenceInterval]]) -> str:
    """Returns a Markdown table with a row per name and a column per metric, with their intervals."""
    headings = ["", *(heading for heading, _ in METRICS.values())]
    body = [
        [name, *(format_ci(found[key], share) for key, (_, share) in METRICS.items())] for name, found in rows.items()
    ]
    return markdown_table(headings, body)
