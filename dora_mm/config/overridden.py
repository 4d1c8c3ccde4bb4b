"""Effects of overriding one key on another key of the file, which was chosen for the former value."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from dora_mm.utils.yaml12 import KeyPath

log = logging.getLogger(__name__)
STEPS, EPOCHS, WARMUP = ("train", "steps"), ("train", "epochs"), ("schedule", "warmup_steps")
RANK, ALPHA, SCALING = ("adapter", "rank"), ("adapter", "alpha"), ("adapter", "scaling")
SHARE = 0.1  # of the steps, for a warm-up of steps in a file that counts epochs


def fit_warmup(values: dict[str, Any], before: Mapping[str, Any], chosen: Sequence[KeyPath]) -> None:
    """Shortens a warm-up of the file that would be longer than an overridden training, to its share of the steps.

    Args:
        values: Those of the file with all overrides; they are changed.
        before: Those of the file.
        chosen: The keys of the overrides.
    """
    if EPOCHS in chosen and WARMUP not in chosen:
        _fit_to_epochs(values, before)
        return
    steps, warmup, planned = value_at(values, STEPS), value_at(values, WARMUP), value_at(before, STEPS)
    if STEPS not in chosen or WARMUP in chosen or type(steps) is not int or type(warmup) is not int or warmup < steps:
        return
    share = warmup / planned if type(planned) is int and planned > warmup else SHARE
    values["schedule"]["warmup_steps"] = fitted = int(share * steps)
    log.info("schedule.warmup_steps: %d instead of %d, for train.steps=%d", fitted, warmup, steps)


def _fit_to_epochs(values: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Shortens a warm-up with fewer epochs; in place of steps, whose number is not known yet, it becomes a share."""
    epochs, warmup = value_at(values, EPOCHS), value_at(values, WARMUP)
    if type(epochs) is not int or type(warmup) is not int or warmup == 0:
        return
    planned, steps = value_at(before, EPOCHS), value_at(before, STEPS)
    if type(planned) is int and 0 < epochs < planned:
        values["schedule"]["warmup_steps"] = fitted = int(warmup * epochs / planned)
        log.info("schedule.warmup_steps: %d instead of %d, for train.epochs=%d", fitted, warmup, epochs)
    elif type(steps) is int and steps > warmup:
        del values["schedule"]["warmup_steps"]
        values["schedule"]["warmup_ratio"] = share = float(f"{warmup / steps:.3g}")
        log.info("schedule.warmup_ratio: %g instead of %d steps, for train.epochs=%d", share, warmup, epochs)


def warn_of_scaling(values: Mapping[str, Any], before: Mapping[str, Any], chosen: Sequence[KeyPath]) -> None:
    """Says that an override of the rank alone changes the scaling, alpha / rank, where that is not meant to.

    Args:
        values: As those of `fit_warmup`, and so are the others.
        before: Those of the file.
        chosen: The keys of the overrides.
    """
    rank, old, alpha = value_at(values, RANK), value_at(before, RANK), value_at(before, ALPHA)
    is_meant = ALPHA in chosen or value_at(values, SCALING) == "sqrt"
    if RANK not in chosen or is_meant or None in (old, alpha) or rank == old:
        return
    log.warning(
        "adapter.rank=%d leaves adapter.alpha at %g: the update is scaled by %g, where the file has %g. To keep that: "
        "--set adapter.alpha=%g",
        *(rank, alpha, alpha / rank, alpha / old, rank * alpha / old),
    )


def value_at(values: Any, path: Sequence[str | int]) -> Any:
    """The value at a key path; None where there is none."""
    for part in path:
        if isinstance(values, Mapping):
            values = values.get(part)
        else:
            values = values[part] if isinstance(part, int) and isinstance(values, list) else None
    return values
