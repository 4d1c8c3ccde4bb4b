"""What a training will cost: the memory by part, a measured step, and warnings about slow hardware."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dora_mm.config.training import OptimizerConfig, TrainConfig, ValidationConfig
from dora_mm.preview import training as preview
from dora_mm.preview.memory import memory_rows, memory_table, optimizer_values
from dora_mm.preview.training import measure_step, slow_hardware, when
from tests.shared.small_training import mean_of, small_training


def test_a_step_is_measured_with_what_it_keeps_for_the_backward_pass():
    cost = measure_step(**small_training().parts)
    assert 0 < cost.seconds < 5
    inputs, hidden, tanh = 4 * 6, 4 * 8, 4 * 8  # at least the input of each Linear, and the output of Tanh
    assert 4 * (inputs + hidden) <= cost.activations <= 4 * 4 * (inputs + hidden + tanh)
    assert cost.source == preview.KEPT
    with_batches_of_16 = small_training()
    with_batches_of_16.parts["batch_at"] = lambda number: torch.zeros(16, 6)
    with_batches_of_16.parts["loss"] = lambda x, generator: mean_of(with_batches_of_16.network(x).square())
    assert measure_step(**with_batches_of_16.parts).activations > 2 * cost.activations


@pytest.mark.parametrize(("name", "number"), [("adamw", 2), ("prodigy", 4)])
def test_the_numbers_that_an_optimizer_keeps(name, number):
    assert optimizer_values(OptimizerConfig(name=name, lr=1.0)) == number


def test_the_memory_by_part():
    network = nn.Linear(1000, 500, bias=False)
    network.requires_grad_(False)
    half = nn.Linear(1000, 1000, bias=False, dtype=torch.bfloat16)
    trained = nn.Parameter(torch.zeros(250_000))
    network.extra = trained
    table = memory_table({"one": network, "half": half}, {"extra": trained}, OptimizerConfig(lr=1.0), None)
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["one,", "500,000", "frozen", "in", "float32", "cpu", "2.0"],
        ["half,", "1,000,000", "frozen", "in", "bfloat16", "cpu", "2.0"],
        ["250,000", "trained", "cpu", "1.0"],
        ["gradients", "cpu", "1.0"],
        ["optimizer", "state", "(adamw,", "2", "numbers", "each)", "cpu", "2.0"],
        ["together,", "without", "activations", "cpu", "8.0"],
    ]


def accelerator(precision="no", device="cpu"):
    return SimpleNamespace(device=torch.device(device), mixed_precision=precision)


def test_emulated_half_precision_is_warned_of(monkeypatch):
    monkeypatch.setattr(preview, "half_precision_slowdown", lambda dtype: 16.0)
    (warning,) = slow_hardware(accelerator("bf16"), [])
    assert "emulates bf16, some 16 times slower than float32" in warning
    assert slow_hardware(accelerator("no"), []) == []
    assert slow_hardware(accelerator("bf16", "cuda"), []) == []
    monkeypatch.setattr(preview, "half_precision_slowdown", lambda dtype: 0.6)
    assert slow_hardware(accelerator("bf16"), []) == []


def test_the_slowdown_is_measured():
    assert 0 < preview.half_precision_slowdown(torch.bfloat16) < 10_000
    assert preview.half_precision_slowdown(torch.float32) < 4


def test_a_large_model_without_a_gpu_is_warned_of_and_not_measured():
    with torch.device("meta"):
        large = nn.Linear(30_000, 20_000)
    assert "no GPU, and the model has 0.6 billion parameters" in slow_hardware(accelerator(), [large])[0]
    assert "There is no GPU" in slow_hardware(accelerator(), None)[0]
    assert slow_hardware(accelerator(device="cuda"), [large]) == []
    why_not = preview.why_not_measured(accelerator(), [large], shard=False)
    assert why_not == "a step of this model takes minutes to hours without a GPU"


def test_tensors_of_several_networks_count_once_and_quantised_ones_as_they_will_be_stored():
    inner = nn.Linear(100, 100, bias=False, device="meta").requires_grad_(False)
    outer = nn.Sequential(inner, nn.Linear(100, 10, bias=False, device="meta").requires_grad_(False))
    trained = {"t": nn.Parameter(torch.zeros(1000, device="meta"))}
    optimizer = OptimizerConfig(name="adamw_8bit", lr=1.0)
    cost = preview.StepCost(None, 5_000_000, "an estimate")
    stored = {id(inner.weight): 5_000}
    table = memory_table(
        {"inner": inner, "outer": outer}, trained, optimizer, cost, stored=stored, target_device="cuda"
    )
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["inner,", "10,000", "frozen", "in", "float32", "cuda", "0.0"],
        ["outer,", "1,000", "frozen", "in", "float32", "cuda", "0.0"],
        ["1,000", "trained", "cuda", "0.0"],
        ["gradients", "cuda", "0.0"],
        ["optimizer", "state", "(adamw_8bit,", "2", "numbers", "of", "8", "bits", "each)", "cuda", "0.0"],
        ["activations", "(an", "estimate)", "cuda", "5.0"],
        ["together", "cuda", "5.0"],
    ]


def test_the_memory_is_that_of_the_largest_batch():
    training = small_training()
    training.parts["loss"] = lambda x, generator: mean_of(training.network(x).square())
    training.parts["batch_at"] = lambda number: torch.zeros(4, 6)
    small = measure_step(**training.parts)
    large = measure_step(**training.parts, largest=lambda number: torch.zeros(40, 6))
    assert large.activations > 5 * small.activations


def test_the_batches_of_a_step_count_and_so_does_preparing_them():
    training = small_training()
    training.parts["config"] = training.parts["config"].model_copy(update={"gradient_accumulation_steps": 4})
    training.parts["loss"] = lambda x, generator: mean_of(training.network(x).square())
    parts = {key: value for key, value in training.parts.items() if key != "batch_at"}

    def slowly(number: int) -> torch.Tensor:
        time.sleep(0.2)
        return torch.zeros(4, 6)

    beside = preview.measure_accumulated(parts, slowly, prepared=True)
    assert 0.8 <= beside.seconds < 1.6
    within = preview.measure_accumulated(parts, slowly, prepared=False)
    assert 0.8 <= within.seconds < 1.6
    assert preview.measure_accumulated(parts, lambda number: torch.zeros(4, 6), prepared=True).seconds < 0.8


def test_lines_on_length_and_time():
    train = TrainConfig(steps=1500, batch_size=2, gradient_accumulation_steps=4)
    assert preview.length_line(train, 750) == "length    1,500 steps, 2 epochs of 750 steps; up to 4 batches per step"
    single = train.model_copy(update={"gradient_accumulation_steps": 1})
    assert preview.length_line(single, 3000) == "length    1,500 steps, 0.5 epochs of 3,000 steps"
    assert preview.length_line(train.model_copy(update={"steps": 1}), 1) == (
        "length    1 step, 1 epoch of 1 step; up to 4 batches per step"
    )
    for seconds, shown in ((0.01, "15 s"), (1.0, "25.0 min"), (10.0, "4.2 h")):
        line = preview.time_line(preview.StepCost(seconds, 0, ""), 1500, "validation")
        assert line == f"time      {seconds:.2f} s a step (measured), {shown} for 1,500 steps, validation not included"


def test_a_step_of_many_tokens_is_not_measured_on_a_processor():
    with torch.device("meta"):
        network = nn.Linear(10_000, 10_000)
    assert preview.why_not_measured(accelerator(), [network], shard=False, num_tokens=1000) is None
    assert preview.why_not_measured(accelerator(), [network], shard=False, num_tokens=10_000) == preview.TOO_SLOW
    work = {"num_tokens": 1000, "tower_work": 10**12}  # of a tower whose patches become few tokens
    assert preview.why_not_measured(accelerator(), [network], shard=False, **work) == preview.TOO_SLOW
    assert preview.why_not_measured(accelerator(device="cuda"), [network], shard=False, num_tokens=10_000) is None
    assert preview.why_not_measured(accelerator(device="cuda"), [network], shard=True) == preview.SHARDED


@pytest.mark.parametrize(("steps", "text"), [(30, "at the end"), (501, "after every 500 steps"), (None, "after every")])
def test_a_validation_that_no_step_reaches_is_one_at_the_end(steps, text):
    assert when(ValidationConfig(every=500), steps).startswith(text)


def test_dtypes_of_frozen_weights_have_their_numbers():
    network = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 1, bias=False).bfloat16())
    parameters = {"trained": torch.nn.Parameter(torch.ones(1))}
    (name, *_), *_ = memory_rows({"net": network}, parameters, OptimizerConfig(lr=1.0), None)
    assert name == "net, 9 frozen in bfloat16 (3), float32 (6)"
