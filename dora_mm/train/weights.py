"""Weights that are shown, scored and saved instead of the trained ones, such as the moving average."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from dora_mm.formats.files.checks import first_not_finite
from dora_mm.train.checkpoint import WEIGHTS, checkpoints, damage, step_of
from dora_mm.train.optim import averaged_point
from dora_mm.utils import yaml12
from dora_mm.utils.lock import only_writer
from dora_mm.utils.run_directory import CONFIG
from dora_mm.utils.tensor_writer import save_tensors

EMA = "ema"


@contextlib.contextmanager
def swapped(values: Mapping[nn.Parameter, torch.Tensor]) -> Iterator[None]:
    """Gives parameters other values for a while; afterwards they have the very tensors of before."""
    kept = {parameter: parameter.data for parameter in values}
    try:
        for parameter, value in values.items():
            parameter.data = value
        yield
    finally:
        for parameter, value in kept.items():
            parameter.data = value


@contextlib.contextmanager
def result_of(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Gives the trained parameters the values that a training would end with now; also a decorator.

    They have these already, but with a schedule-free optimizer, which takes gradients at another point.
    """
    with swapped(averaged_point(optimizer) or {}):
        yield


class WeightAverage:
    """An exponential moving average of the trained parameters alone, A, B and m each; a part of checkpoints.

    The average of W' itself would not be of low rank.

    Args:
        parameters: The trained parameters by name.
        decay: How much of the average stays in a step; in the first ones at most (1 + step) / (10 + step).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float):
        self.parameters, self.decay = dict(parameters), decay
        self.values = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes the parameters in after `step` finished steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), [p.data for p in self.parameters.values()], 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Gives the parameters the values of the average; also a decorator."""
        with swapped({parameter: self.values[name] for name, parameter in self.parameters.items()}):
            yield

    def measured(self, measure: Callable[[], Mapping[str, float]]) -> Callable[[], dict[str, float]]:
        """Measures the parameters, and also the average, whose values are named "ema/..."."""

        def both() -> dict[str, float]:
            with self.applied():
                of_average = {f"{EMA}/{name}": value for name, value in measure().items()}
            return {**measure(), **of_average}

        return both

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in self.values.items():
            value.copy_(state_dict[name])


def average_checkpoints(run: Path, last: int | None = None) -> tuple[list[int], Path]:
    """Writes the mean of each tensor over kept checkpoints of a run to its adapter-average/, in the native form.

    Args:
        run: The run directory.
        last: How many of the newest checkpoints; None: all.

    Returns:
        The steps of the checkpoints, and the file.

    Raises:
        ValueError: There are less than two, or one is damaged; or they hold the point at which a schedule-free training
            takes gradients.
    """
    if not (run / CONFIG).is_file():
        raise ValueError(f"{run} is not a run directory: it has no {CONFIG}")
    optimizer = yaml12.read((run / CONFIG).read_text(encoding="utf-8")).value.get("optimizer", {})
    if optimizer.get("name") == "schedule_free":
        raise ValueError(f"{run}: the result of optimizer.name schedule_free is an average already, in its adapter/")
    kept = checkpoints(run / "checkpoints")[-(last or 0) :]
    if len(kept) < 2:
        raise ValueError(f"{run} has {len(kept)} checkpoints to average: train with train.keep_checkpoints above 1")
    for path in kept:
        if problem := damage(path):
            raise ValueError(f"{path} is damaged: {problem}")
    sums: dict[str, torch.Tensor] = {}
    header: dict[str, str] = {}
    for path in kept:
        with safe_open(path / WEIGHTS, "pt") as file:
            header = file.metadata() or {}
            for name in file.keys():  # noqa: SIM118
                sums[name] = sums.get(name, 0) + file.get_tensor(name).double()
    means = {name: (total / len(kept)).float() for name, total in sums.items()}
    assert first_not_finite(means.items()) is None
    steps = [step_of(path) for path in kept]
    folder = run / "adapter-average"
    with only_writer(run):
        folder.mkdir(exist_ok=True)
        save_tensors(folder / WEIGHTS, means, {**header, "averaged_steps": ", ".join(map(str, steps))})
    return steps, folder / WEIGHTS
