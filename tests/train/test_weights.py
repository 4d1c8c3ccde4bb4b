"""Averages of weights, over steps and over checkpoints; and runs of all settings together that stop and go on."""

import shutil
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from dora_mm import DoRASpec, adapter_parameters, inject, load_adapter
from dora_mm.cli import main
from dora_mm.config.training import ValidationConfig
from dora_mm.formats.tools import native
from dora_mm.train.checkpoint import checkpoints, last_step, save_checkpoint
from dora_mm.train.metrics import read_metrics
from dora_mm.train.state_file import read_state
from dora_mm.train.validation import Validation
from dora_mm.train.weights import WeightAverage, result_of
from dora_mm.utils.run_directory import RunDirectory
from tests.shared.small_training import but_for_seconds, interrupt_at, new_run, small_training


def test_the_average_is_that_of_a_few_lines():
    parameter, expected = nn.Parameter(torch.zeros(3)), torch.zeros(3)
    average = WeightAverage({"w": parameter}, 0.5)
    for step in range(1, 9):
        parameter.data += step
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * parameter.detach()
    torch.testing.assert_close(average.values["w"], expected)
    assert average.values["w"].dtype == torch.float32
    with average.applied():
        assert torch.equal(parameter, average.values["w"])
    assert not torch.equal(parameter, average.values["w"])


def test_the_average_is_measured_beside_the_parameters():
    parameter = nn.Parameter(torch.ones(1))
    average = WeightAverage({"w": parameter}, 0.5)
    parameter.data.fill_(3.0)
    assert average.measured(lambda: {"loss": float(parameter.detach())})() == {"loss": 3.0, "ema/loss": 1.0}


SETTINGS = {
    "optimizer": st.sampled_from([{"lr": 0.05}, {"name": "adafactor", "lr": 0.05}, {"name": "prodigy", "lr": 1.0}]),
    "schedule": st.sampled_from(["constant", "cosine", "linear", "restarts", "polynomial", "warmup_stable_decay"]),
    "gradient_accumulation_steps": st.sampled_from([1, 3]),
    "max_grad_norm": st.sampled_from([None, 1.0]),
    "dropout": st.sampled_from([0.0, 0.5]),
    "checkpoint_every": st.sampled_from([0, 4]),
}


def train(path, ema: float | None, patience: int | None, stop: int | None = None, **values) -> None:
    """A training with all that has a state; it is interrupted after step `stop`, or goes on where one was."""
    run = RunDirectory(path) if path.exists() else new_run(path)
    training = small_training(run, **values)
    average = WeightAverage(training.parts["parameters"], ema) if ema is not None else None
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(5))

    def measure() -> dict[str, float]:
        with torch.no_grad(), result_of(training.optimizer):
            return {"loss": float(training.network.eval()(x).square().mean())}

    measured = average.measured(measure) if average else measure
    config = ValidationConfig(every=2, patience=patience)
    qualities = lambda row: {"overall": -row["loss"]}  # noqa: E731
    validate = Validation(run, config, measured, qualities, lambda folder: None, last_step(run.checkpoints))

    def on_step_end(step: int) -> None:
        if validate.is_due(step, 12):
            validate(step)
            training.network.train()
        if step == stop:
            interrupt_at(stop)(step)

    hooks = {"after_step": average.update, "state": {"ema": average}} if average else {"after_step": None}
    training.fit(on_step_end=on_step_end, should_stop=validate.should_stop, **hooks)
    validate.close()


def state_of(run) -> tuple[int, dict, dict, list, list]:
    """All that the last checkpoint of a run and its curves hold, but for seconds."""
    newest = checkpoints(run / "checkpoints")[-1]
    state = read_state(newest / "state.safetensors")
    del state["progress"]["seconds"]
    rows = [read_metrics(run / name) for name in ("metrics.jsonl", "validation/metrics.jsonl")]
    weights = load_file(newest / "trained_weights.safetensors")
    return last_step(run / "checkpoints"), weights, state, but_for_seconds(rows[0]), rows[1]


def assert_same(one, two) -> None:
    assert type(one) is type(two)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for pair in zip(one, two, strict=True):
            assert_same(*pair)
    else:
        assert one == two


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    values=st.fixed_dictionaries(SETTINGS),
    ema=st.sampled_from([None, 0.9]),
    patience=st.sampled_from([None, 2]),
    stop=st.integers(1, 11),
)
@pytest.mark.slow
def test_a_run_of_any_settings_that_stops_goes_on_to_the_same_bits(tmp_path_factory, values, ema, patience, stop):
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "whole", ema, patience, **values)
    if stop < last_step(folder / "whole" / "checkpoints"):
        with pytest.raises(KeyboardInterrupt):
            train(folder / "parts", ema, patience, stop=stop, **values)
        train(folder / "parts", ema, patience, **values)
        assert_same(state_of(folder / "whole"), state_of(folder / "parts"))
    shutil.rmtree(folder)


def adapted() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    inject(network, ["0", "1"], DoRASpec(rank=2, alpha=2.0), backend="torch")
    return network


def test_checkpoints_are_averaged_to_an_adapter(tmp_path, capsys):
    run = new_run(tmp_path / "run")
    (run.path / "config.yaml").write_text("optimizer: {lr: 0.1}\n")
    network = adapted()
    parameters = {f"model.{name}": p for name, p in adapter_parameters(network).items()}
    save = partial(save_checkpoint, parts={}, keep=9, header=native.header_of({"model": network}, parameters))
    for step in (2, 4, 6):
        for parameter in parameters.values():
            parameter.data += step
        save(run.checkpoints, step, parameters)
    files = [load_file(path / "trained_weights.safetensors") for path in checkpoints(run.checkpoints)]
    for last, used in ((None, files), (2, files[1:])):
        assert main(["average", str(run.path), *(["--last", str(last)] if last else [])]) == 0
        loaded = adapted()
        load_adapter({"model": loaded}, run.path / "adapter-average")
        for name, parameter in adapter_parameters(loaded).items():
            expected = torch.stack([file[f"model.{name}"] for file in used]).double().mean(0).float()
            assert torch.equal(parameter, expected)
    assert "average of the steps 4, 6" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["no run", "one checkpoint", "a damaged one", "schedule-free"])
def test_what_cannot_be_averaged_is_said(tmp_path, capsys, wrong):
    run = new_run(tmp_path / "run")
    (run.path / "config.yaml").write_text(f"optimizer: {{name: {'schedule_free' if wrong[0] == 's' else 'adamw'}}}\n")
    for step in (1, 2)[: 1 if wrong == "one checkpoint" else 2]:
        save_checkpoint(run.checkpoints, step, {"model.w": nn.Parameter(torch.ones(2))}, {}, keep=9)
    if wrong == "a damaged one":
        (run.checkpoints / "step-000001" / "trained_weights.safetensors").write_bytes(b"half")
    path = run.checkpoints if wrong == "no run" else run.path
    assert main(["average", str(path)]) == 2
    messages = {
        "no run": "is not a run directory",
        "one checkpoint": "has 1 checkpoints to average: train with train.keep_checkpoints above 1",
        "a damaged one": "step-000001 is damaged: trained_weights.safetensors is not as it was saved",
        "schedule-free": "schedule_free is an average already",
    }
    assert messages[wrong] in capsys.readouterr().err
