"""How often 95 % intervals miss what they estimate, by simulation: `python -m tests.benchmarks.bench_coverage`.

Writes results/coverage/intervals.csv and frechet.csv, which do not depend on the machine. Each row is a setting with
the share of simulations in which the interval misses the truth, in per cent, and its mean width: of the intervals that
the program gives, and of others (the percentile bootstrap; of shares the t interval, clipped to 0 and 1).
"""

import argparse
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
from scipy.stats import norm

from dora_mm.eval.images import own_style
from dora_mm.eval.images.classifier import Classifier
from dora_mm.eval.images.concepts import unit_rows
from dora_mm.eval.statistics import (
    LEVEL,
    ConfidenceInterval,
    Gaussian,
    Spread,
    frechet_distance,
    mean_ci,
    share_ci,
)
from dora_mm.utils.tables import csv_records

RESULTS = Path(__file__).parent / "results" / "coverage"
RESAMPLES = 500
ConfidenceIntervals = dict[str, Callable[[np.ndarray], ConfidenceInterval]]


def bootstrapped(values_K: np.ndarray, rng: np.random.Generator) -> ConfidenceInterval:
    """The percentile bootstrap of a mean."""
    count = len(values_K)
    found = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count @ values_K
    return ConfidenceInterval(float(values_K.mean()), *np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))


def of_means(
    rng: np.random.Generator,
) -> Iterator[tuple[dict[str, str], float, Callable[[], np.ndarray], ConfidenceIntervals]]:
    """Means over concepts of two seeds each, normal and skewed, and over concepts and three runs."""
    methods: ConfidenceIntervals = {
        "ours": lambda values: mean_ci(values, over_runs=False),
        "bootstrap": lambda values: bootstrapped(values.mean(axis=1), rng),
    }
    for shape, K in product(("normal", "skewed"), (5, 8, 24, 40)):

        def draw(shape: str = shape, K: int = K) -> np.ndarray:
            concepts = rng.normal(size=(K, 1)) if shape == "normal" else rng.exponential(size=(K, 1)) - 1
            return concepts + rng.normal(size=(K, 2))

        yield {"of": f"mean, {shape}", "concepts": str(K), "seeds": "2"}, 0.0, draw, methods
    for concepts, runs in product((0.0, 1.0), (0.0, 0.2, 0.5, 1.0)):

        def crossed(concepts: float = concepts, runs: float = runs) -> np.ndarray:
            return concepts * rng.normal(size=(40, 1)) + runs * rng.normal(size=(1, 3)) + rng.normal(size=(40, 3))

        about = {"of": f"mean over runs that differ by {runs}, concepts by {concepts}", "concepts": "40", "seeds": "3"}
        yield about, 0.0, crossed, {"ours": mean_ci}


def of_shares(
    rng: np.random.Generator,
) -> Iterator[tuple[dict[str, str], float, Callable[[], np.ndarray], ConfidenceIntervals]]:
    """Shares of concepts that differ, in a probit model: of one seed, three seeds, and three runs that differ."""
    for over_runs in (False, True):
        methods: ConfidenceIntervals = {
            "ours": lambda values, over_runs=over_runs: share_ci(values, over_runs=over_runs),
            "t": lambda values, over_runs=over_runs: mean_ci(values, over_runs=over_runs, bounds=(0.0, 1.0)),
        }
        if not over_runs:
            methods["bootstrap"] = lambda values: bootstrapped(values.mean(axis=1), rng)
        for K, S, concepts, share in product((5, 8, 24, 40), (1, 3), (0.0, 1.0, 2.0), (0.5, 0.8, 0.95)):
            if (S == 1 and (concepts or over_runs)) or (over_runs and K < 24):
                continue
            runs = 0.3 if over_runs else 0.0
            scale = np.sqrt(1 + concepts**2 + runs**2)

            def draw(
                K: int = K,
                S: int = S,
                concepts: float = concepts,
                runs: float = runs,
                z: float = norm.ppf(share) * scale,
            ) -> np.ndarray:
                effects = concepts * rng.normal(size=(K, 1)) + runs * rng.normal(size=(1, S))
                return (rng.normal(size=(K, S)) < z + effects).astype(float)

            kind = "runs" if over_runs else "seeds"
            about = {"of": f"share {share}, concepts differ by {concepts}, {kind}", "concepts": str(K), "seeds": str(S)}
            yield about, share, draw, methods


def of_pairs(
    rng: np.random.Generator,
) -> Iterator[tuple[dict[str, str], float, Callable[[], np.ndarray], ConfidenceIntervals]]:
    """Variety of drawn pictures, and likeness of training pictures among themselves, of vectors with 64 dimensions."""

    def vectors(K: int, S: int) -> np.ndarray:
        found = 2 * np.eye(64)[0] + rng.normal(size=(K, 1, 64)) * SCALES
        return unit_rows((found + 0.5 * rng.normal(size=(K, S, 64)) * SCALES).reshape(K * S, 64))

    def scores(drawn_ND: np.ndarray, S: int) -> own_style.StyleScores:
        return own_style.scores_of(drawn_ND, drawn_ND[:1], S) if S > 1 else own_style.among_themselves(drawn_ND)

    for name, K, S in [(own_style.VARIETY, K, 2) for K in (5, 8, 24)] + [
        (name, K, 1) for name in (own_style.LIKENESS, own_style.NEAREST) for K in (8, 20, 60)
    ]:

        def mean(drawn_ND: np.ndarray, rows: np.ndarray, name: str = name, S: int = S) -> float:
            return scores(drawn_ND, S).mean(name, rows)

        def over_images(drawn_ND: np.ndarray, name: str = name, S: int = S) -> ConfidenceInterval:
            return bootstrapped(scores(drawn_ND, S).cells[name].reshape(-1, S).mean(axis=1), rng)

        methods: ConfidenceIntervals = {
            "ours": lambda drawn_ND, name=name, S=S: own_style.confidence_intervals(scores(drawn_ND, S))[name],
            "bootstrap": over_images,
        }
        truth = float(np.mean([mean(vectors(K, S), np.arange(K)) for _ in range(4000)]))
        about = {"of": f"{name} of pictures", "concepts": str(K), "seeds": str(S)}
        yield about, truth, lambda K=K, S=S: vectors(K, S), methods


SCALES = np.linspace(1.0, 0.0, 64) ** 2  # of the dimensions: few matter, as those of encoders do


def ci_rows(num: int, seed: int) -> list[dict[str, str]]:
    """A row per setting."""
    rows = []
    for number, family in enumerate((of_means, of_shares, of_pairs)):
        for about, truth, draw, methods in family(np.random.default_rng([seed, number])):
            samples = [draw() for _ in range(num)]
            row = dict(about)
            for name in ("ours", "t", "bootstrap"):
                row |= measured([methods[name](each) for each in samples] if name in methods else [], truth, name)
            rows.append(row)
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return rows


def measured(found: list[ConfidenceInterval], truth: float, name: str) -> dict[str, str]:
    """The share of intervals that miss, and their mean width; empty without any."""
    missed = [not each.low - 1e-12 <= truth <= each.high + 1e-12 for each in found]
    widths = [each.high - each.low for each in found]
    return {
        f"{name}_misses": f"{100 * np.mean(missed):.1f}" if found else "",
        f"{name}_width": f"{np.mean(widths):.3f}" if found else "",
    }


def frechet_rows(num: int, seed: int) -> list[dict[str, str]]:
    """The Fréchet distance of pictures whose distribution is that of the judge's style, or half as wide."""
    rng, rows = np.random.default_rng(seed), []
    for style, real in Classifier.load(Path("samples/judge")).style_space.real.items():
        for scale, count in product((1.0, 0.5), (24, 40, 120)):
            drawn = Gaussian(real.mean, scale * real.covariance)
            truth, plain, corrected = frechet_distance(drawn, real), [], []
            for _ in range(num):
                x_ND = rng.multivariate_normal(drawn.mean, drawn.covariance, size=count)

                def distance(kept: np.ndarray, x_ND: np.ndarray = x_ND, real: Gaussian = real) -> float:
                    return frechet_distance(Gaussian.of(x_ND[kept]), real)

                left_out = [distance(np.delete(np.arange(count), index)) for index in range(count)]
                spread = Spread((count - 1) * float(np.var(left_out)), count - 1)
                plain.append(spread.ci_around(distance(np.arange(count))))
                corrected.append(spread.ci_around(count * plain[-1].mean - (count - 1) * float(np.mean(left_out))))
            row = {"style": style, "variance": str(scale), "pictures": str(count), "truth": f"{truth:.1f}"}
            for name, found in (("plain", plain), ("corrected", corrected)):
                row |= {f"{name}_mean": f"{np.mean([each.mean for each in found]):.1f}", **measured(found, truth, name)}
            rows.append(row)
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--simulations", type=int, default=1000, help="of each setting")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "intervals.csv").write_text(csv_records(ci_rows(arguments.simulations, seed=0)))
    (RESULTS / "frechet.csv").write_text(csv_records(frechet_rows(max(arguments.simulations // 10, 1), seed=1)))


if __name__ == "__main__":
    main()
