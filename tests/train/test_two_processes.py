"""`fit` in two processes of one group: as in one that accumulates, divided or not, and resumed by as many or others."""

import shutil

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from dora_mm import DoRASpec, adapter_parameters, inject
from dora_mm.config.training import OptimizerConfig, ScheduleConfig, TrainConfig
from dora_mm.core.wrappers.sharded import is_sharded, shard_frozen
from dora_mm.train.loop import fit
from dora_mm.train.metrics import read_metrics
from dora_mm.train.optim import build_optimizer
from dora_mm.train.processes import from_main_process, of_all_processes
from dora_mm.train.schedule import Schedule
from dora_mm.train.weights import EMA, WeightAverage
from dora_mm.utils.losses import LossSum
from dora_mm.utils.run_directory import RunDirectory
from tests.shared.two_processes import needs_fsdp, run_in_two

STEPS = 4


def batch(number: int) -> torch.Tensor:
    """Rows of this number among those of all processes, more or fewer."""
    return torch.randn(2 + number % 3, 6, generator=torch.Generator().manual_seed(number))


def train(
    run: RunDirectory, *, steps: int = STEPS, accumulated: int = 1, shard: bool = False
) -> dict[str, torch.Tensor]:
    """A regression with noise and dropout, clipped, averaged; returns the trained parameters and their average."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)).requires_grad_(False)
    inject(network, ["0", "3"], DoRASpec(rank=2, cache="norms"))
    parameters, accelerator = adapter_parameters(network), Accelerator(cpu=True)
    if shard:
        shard_frozen(network, [network[0]], parameters.values(), accelerator.device)
        assert any(map(is_sharded, network.parameters()))
    often = {"checkpoint_every": 1, "keep_checkpoints": 9, "log_every": 1}
    config = TrainConfig(steps=STEPS, batch_size=1, gradient_accumulation_steps=accumulated, max_grad_norm=0.3, **often)
    optimizer = build_optimizer(parameters, OptimizerConfig(lr=0.05))
    average = WeightAverage(parameters, 0.9)

    def loss(x, generator):
        losses = (network(x) - torch.randn(len(x), 3, generator=generator)).square().mean(1)
        return LossSum(losses.sum(), torch.tensor(float(len(x))))

    fit(
        accelerator=accelerator,
        run=run,
        config=config,
        seed=0,
        networks={"network": network.train()},
        parameters=parameters,
        optimizer=accelerator.prepare(optimizer),
        schedule=Schedule(optimizer, ScheduleConfig(name="cosine"), STEPS),
        batch_at=lambda number: batch(number * accelerator.num_processes + accelerator.process_index),
        loss=loss,
        state={EMA: average},
        after_step=average.update,
    )
    return {name: p.detach().clone() for name, p in parameters.items()} | average.values


def _trains(rank, folder):
    assert of_all_processes([3 - rank, 2 + rank], Accelerator(cpu=True)) == [[3, 2], [2, 3]]
    assert from_main_process(["the day before midnight", "the day after"][rank]) == "the day before midnight"

    def run(name):
        return RunDirectory(folder / name)

    whole, divided = train(run("whole")), train(run("divided"), shard=True)
    for name, value in divided.items():  # gathered weights lie elsewhere, and some processors then round otherwise
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6)
    torch.distributed.barrier()  # `fit` saves without waiting
    if rank == 0:
        shutil.copytree(folder / "divided", folder / "resumed")
        shutil.rmtree(folder / "resumed" / "checkpoints" / f"step-{STEPS:06d}")
    torch.distributed.barrier()
    resumed = train(run("resumed"), shard=True)
    assert all(torch.equal(value, divided[name]) for name, value in resumed.items())
    from_one = train(run("one_then_two"))
    if rank == 0:
        torch.save((whole, from_one), folder / "trained.pt")


def halfway(folder, name: str, copy: str) -> RunDirectory:
    """A copy of a run as it was after half of its steps."""
    made = shutil.copytree(folder / name, folder / copy)
    for step in range(STEPS // 2, STEPS):
        shutil.rmtree(made / "checkpoints" / f"step-{step + 1:06d}")
    return RunDirectory(made)


def losses(folder):
    return [[row["loss"], row["grad_norm"]] for row in read_metrics(folder / "metrics.jsonl")]


@needs_fsdp
def test_two_processes_are_one_that_accumulates(tmp_path):
    """Also where the other number of them goes on: the batches, their noise and dropout are the same."""
    for name in ("whole", "divided", "one"):
        (tmp_path / name).mkdir()
    expected = train(RunDirectory(tmp_path / "one"), accumulated=2)
    halfway(tmp_path, "one", "one_then_two")
    run_in_two(tmp_path, _trains, tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    from_two = train(halfway(tmp_path, "whole", "two_then_one"), accumulated=2)
    for found in (*torch.load(tmp_path / "trained.pt", weights_only=True), from_two):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    for name in ("whole", "one_then_two", "two_then_one"):
        torch.testing.assert_close(*map(torch.tensor, (losses(tmp_path / name), losses(tmp_path / "one"))))
    assert losses(tmp_path / "resumed") == losses(tmp_path / "divided")
