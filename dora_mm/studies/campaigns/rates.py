"""Learning rates: which are tried, and which is the best."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from dora_mm.studies.config import LearningRates
from dora_mm.studies.variants import Variant


class RateChoice(NamedTuple):
    """The learning rate that was chosen for a variant. As text, an extreme one is marked with an asterisk.

    Attributes:
        rate: The learning rate.
        is_extreme: Whether it is the lowest or the highest that was tried, so that a better one may lie outside.
    """

    rate: float
    is_extreme: bool

    def __str__(self) -> str:
        return f"{self.rate:g}{'*' if self.is_extreme else ''}"


def choice_of(tried: Mapping[float, float]) -> RateChoice:
    """The best learning rate. `tried` maps rates to values; the higher, the better."""
    best = best_rate(tried)
    return RateChoice(best, best in (min(tried), max(tried)))


def candidate_rates(rates: LearningRates, wanted: Iterable[Variant]) -> dict[Variant, tuple[float, ...]]:
    """The candidate learning rates of each wanted variant, which are those of its method."""
    candidates = {"full": rates.full or (), "lora": rates.lora, "dora": rates.dora}
    return {variant: candidates[variant.method] for variant in wanted}


def best_rate(tried: Mapping[float, float]) -> float:
    """The learning rate with the highest value; the lower one if two are equal. `tried` maps rates to values."""
    return max(sorted(tried), key=tried.__getitem__)


def beyond(tried: Iterable[float], end: float) -> float:
    """The next learning rate outside the range tried so far, the last factor apart.

    Args:
        tried: The rates tried so far, two or more.
        end: The lowest or the highest of them: the side of the next one.
    """
    rates = sorted(tried)
    if end == rates[0]:
        rates.reverse()
    return float(f"{rates[-1] ** 2 / rates[-2]:.6g}")


def with_neighbours(tried: Sequence[float], rate: float) -> list[float]:
    """A learning rate, and the next lower and the next higher one that were tried, ascending."""
    ordered = sorted(tried)
    index = ordered.index(rate)
    return ordered[max(index - 1, 0) : index + 2]
