"""Trainings of drawn settings, in processes of their own that kill themselves where a drawing says so."""

import multiprocessing
import os
import random
import signal
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch._dynamo  # noqa: F401  which an optimizer would import in each process
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from dora_mm.config.schema import PipelineConfig
from dora_mm.config.training import EMAConfig, OptimizerConfig, ScheduleConfig, TrainConfig, ValidationConfig
from dora_mm.core import DoRASpec, adapter_parameters, inject
from dora_mm.train import checkpoint
from dora_mm.train.loop import fit
from dora_mm.train.metrics import read_metrics
from dora_mm.train.optim import OPTIMIZERS, build_optimizer
from dora_mm.train.processes import join_processes
from dora_mm.train.run import training_run
from dora_mm.train.schedule import Schedule
from dora_mm.train.state_file import read_state
from dora_mm.train.validation import OVERALL, STAGE, Validation
from dora_mm.train.weights import EMA, WeightAverage, result_of
from dora_mm.utils.losses import LossSum
from dora_mm.utils.randomness import generator
from dora_mm.utils.tensor_writer import save_tensors
from tests.shared.small_training import but_for_seconds

STEPS = 7
WITHOUT_GPU = tuple(name for name, kind in OPTIMIZERS.items() if not kind.needs_gpu)
SCHEDULES = ("constant", "cosine", "linear", "restarts", "polynomial", "warmup_stable_decay")
OBJECTIVES = ("rows", "tokens", "weights")
PLACES = ("loss", "after_step", "on_step_end", "saving")  # where a process can be killed
PROCESSES = multiprocessing.get_context("forkserver")  # it imports this module once, and forks for each training
PROCESSES.set_forkserver_preload([__name__])


@dataclass(frozen=True)
class Kill:
    """Where a process is killed: in which step, at which place, and which of the processes."""

    step: int
    place: str
    rank: int


class RandomConfig(PipelineConfig):
    """The settings of a training."""

    command: ClassVar[str] = "train"
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    train: TrainConfig
    ema: EMAConfig | None
    evaluate: ValidationConfig
    objective: str
    dropout: float
    num_processes: int
    output: str = ""


def random_run_of(number: int) -> tuple[RandomConfig, list[Kill]]:
    """The drawing of this number: a training, and where it is killed. Few in a row have each optimizer once."""
    drawn = random.Random(number)
    name = WITHOUT_GPU[number % len(WITHOUT_GPU)]
    num_processes = 1 + number // len(WITHOUT_GPU) % 2 if number >= 2 * len(WITHOUT_GPU) else 1 + number % 2
    averages = name == "schedule_free"
    shape = "constant" if averages else drawn.choice(SCHEDULES)
    every = drawn.choice([0, 1, 2, 3])
    config = RandomConfig.model_validate(
        {
            "pipeline": "drawn",
            "name": "drawn",
            "optimizer": {"name": name, "lr": 1.0 if name == "prodigy" else 0.02},
            "schedule": {"name": shape, "warmup_steps": drawn.choice([0, 2])},
            "train": {
                "steps": STEPS,
                "batch_size": 3,
                "gradient_accumulation_steps": drawn.choice([1, 2, 3]),
                "max_grad_norm": drawn.choice([None, 0.5]),
                "checkpoint_every": drawn.choice([1, 2, 3]),
                "keep_checkpoints": 99,
                "log_every": drawn.choice([1, 3]),
                "track": (),
            },
            "ema": None if averages else drawn.choice([None, {"decay": 0.8}]),
            "evaluate": {"every": every, "patience": drawn.choice([None, 1, 2]) if every else None},
            "objective": drawn.choice(OBJECTIVES),
            "dropout": drawn.choice([0.0, 0.3]),
            "num_processes": num_processes,
        }
    )
    first, second = sorted(drawn.sample(range(1, STEPS + 1), 2))
    steps = drawn.choice([[first], [first, second]])
    kills = [Kill(step, drawn.choice(PLACES), drawn.randrange(num_processes)) for step in steps]
    return config, [replace(kill, rank=0) if kill.place == "saving" else kill for kill in kills]  # only that one saves


# --- a training, as the pipelines wire one --------------------------------------------------------------------------


def train(config: RandomConfig, run: Path, end: Path, resume: bool, kill: Kill | None) -> None:
    """Trains to the end, or to where it is killed; `end` receives what only the process itself knows."""
    accelerator = join_processes(config.train)
    rank, count = accelerator.process_index, accelerator.num_processes
    killer = Killer(kill if kill and kill.rank == rank else None)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(config.dropout), nn.Linear(12, 3))
    inject(network, ["0", "3"], DoRASpec(rank=2, dropout=config.dropout))
    parameters = adapter_parameters(network)
    optimizer = build_optimizer(parameters, config.optimizer)
    prepared, schedule = accelerator.prepare(optimizer), Schedule(optimizer, config.schedule, config.train.steps)
    average = WeightAverage(parameters, config.ema.decay) if config.ema else None
    result = result_of(prepared)

    def loss(batch: torch.Tensor, stream: torch.Generator) -> LossSum:
        killer.at("loss")
        return objective(config.objective, network(batch), stream)

    def held_out() -> dict[str, float]:
        network.eval()
        with torch.no_grad():
            numbers = range(rank, 4, count)
            own = [objective("rows", network(batch(1000 + n, 0)), generator(0, n, "fixed")) for n in numbers]
        network.train()
        sums = torch.stack([torch.stack([found.total, found.count]) for found in own]).sum(0)
        return {"held_out_loss": LossSum(*accelerator.reduce(sums, "sum")).mean.item()}  # pyright: ignore

    def save(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / "best.safetensors", {name: p.detach().clone() for name, p in parameters.items()}, {})

    config = config.model_copy(update={"output": str(run)})
    with training_run(accelerator, config, {}, run if resume else None, config.train) as opened:
        killer.watch()
        measure = result(average.measured(held_out) if average else held_out)
        done, writes = checkpoint.last_step(opened.checkpoints), accelerator.is_main_process
        validate = Validation(opened, config.evaluate, measure, by_loss, result(save), done, writes=writes)

        def after_step(step: int) -> None:
            if average:
                average.update(step)
            killer.finished = step
            killer.at("after_step")

        def on_step_end(step: int) -> None:
            killer.at("on_step_end")
            if validate.is_due(step, config.train.steps):
                validate(step)

        killer.finished = done
        done = fit(
            accelerator=accelerator,
            run=opened,
            config=config.train,
            seed=3,
            networks={"network": network},
            parameters=parameters,
            optimizer=prepared,
            schedule=schedule,
            batch_at=lambda number: batch(number, rank),
            loss=loss,
            state={EMA: average} if average else {},
            after_step=after_step,
            on_step_end=on_step_end,
            should_stop=validate.should_stop,
        )
        validate(done)
        validate.close()
    state = {
        "parameters": {name: p.detach() for name, p in parameters.items()},
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "average": average.values if average else {},
        "generator": torch.get_rng_state(),
        "steps": done,
    }
    torch.save(state, end.with_name(f"{end.name}-{rank}.pt"))


class Killer:
    """Kills its process at one place, in one step."""

    def __init__(self, kill: Kill | None):
        self.kill, self.finished = kill, 0

    def at(self, place: str) -> None:
        if self.kill is None or self.kill.place != place:
            return
        if self.finished + (place == "loss") >= self.kill.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """Waits for a checkpoint that is half written: all of its files are, and none was flushed."""
        flush = checkpoint.flush

        def flushed(path: Path) -> None:
            self.at("saving")
            flush(path)

        checkpoint.flush = flushed


def batch(number: int, rank: int) -> torch.Tensor:
    """The inputs (rows, 6) of a process in a micro-batch, more in some than in others."""
    return torch.randn(2 + number % 3, 6, generator=generator(0, number, f"batch {rank}"))


def objective(name: str, predicted: torch.Tensor, stream: torch.Generator) -> LossSum:
    """The mean over rows; over tokens, of which rows have different numbers; or by weights of rows."""
    errors = F.mse_loss(predicted, torch.randn(predicted.shape, generator=stream), reduction="none")
    rows = torch.arange(1.0, 1 + len(errors))
    if name == "rows":
        return LossSum(errors.mean(1).sum(), torch.tensor(float(len(errors))))
    if name == "weights":
        return LossSum((errors.mean(1) * rows).sum(), rows.sum())
    shown = torch.arange(3.0) < rows[:, None]
    return LossSum((errors * shown).sum(), shown.sum().float())


def by_loss(row: Mapping[str, Any]) -> dict[str, float]:
    return {OVERALL: -row["held_out_loss"]}


# --- its processes ---------------------------------------------------------------------------------------------------


def launch(config: RandomConfig, run: Path, end: Path, *, resume: bool = False, kill: Kill | None = None) -> list[int]:
    """Trains in as many processes as the config says; where one is killed, so are the others. Returns exit codes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    values = (config.model_dump(), run, end, resume, kill and asdict(kill), port)
    started = [PROCESSES.Process(target=_one, args=(rank, *values)) for rank in range(config.num_processes)]
    for process in started:
        process.start()
    left = {process.sentinel: process for process in started}
    while left:
        for sentinel in wait(list(left)):
            if left.pop(sentinel).exitcode:
                for other in left.values():
                    other.kill()
    for process in started:
        process.join()
    return [process.exitcode for process in started]  # type: ignore[misc]


def _one(
    rank: int, config: dict[str, Any], run: Path, end: Path, resume: bool, kill: dict[str, Any] | None, port: int
) -> None:
    torch.set_num_threads(1)
    log = os.open(end.with_name(f"{end.name}-{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(run.parent)
    if config["num_processes"] > 1:
        size = str(config["num_processes"])
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    train(RandomConfig.model_validate(config), run, end, resume, Kill(**kill) if kill else None)


# --- what is left ----------------------------------------------------------------------------------------------------


def everything(run: Path, ends: list[Path]) -> dict[str, Any]:
    """All that a training has left: checkpoints, curves, the best adapter, and the state of each process at its end."""
    found: dict[str, Any] = {end.name.split("-")[-1]: torch.load(end, weights_only=True) for end in ends}
    for folder in checkpoint.checkpoints(run / "checkpoints"):
        state = read_state(folder / checkpoint.STATE)
        state["progress"].pop("seconds")
        found[folder.name] = {"weights": load_file(folder / checkpoint.WEIGHTS), **state}
    found["curves"] = but_for_seconds(read_metrics(run / "metrics.jsonl"))
    found["validations"] = read_metrics(run / STAGE / "metrics.jsonl")
    found["best"] = {path.parent.name: load_file(path) for path in sorted(run.glob("best/*/best.safetensors"))}
    return found


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """The places in which two values differ in any bit."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if one.keys() != other.keys():
            return [f"{where}: {sorted(map(str, one.keys() ^ other.keys()))} is only in one"]
        return [place for key in one for place in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [place for index, pair in pairs for place in differences(*pair, f"{where}/{index}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        same = same and one.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes()
    else:
        same = type(one) is type(other) and repr(one) == repr(other)
    return [] if same else [f"{where}: {one} is not {other}"]
