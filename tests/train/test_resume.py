"""The loop: resuming is exact, interruptions save a checkpoint, accumulation equals a larger batch."""

import errno
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dora_mm.cli import user_message
from dora_mm.config.training import OptimizerConfig
from dora_mm.train import optim
from dora_mm.train.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from dora_mm.train.interrupt import DeferredInterrupt
from dora_mm.train.metrics import TrainingProgress, read_metrics
from dora_mm.train.optim import build_optimizer
from dora_mm.train.run import DivergedError
from dora_mm.train.weights import result_of
from dora_mm.utils.losses import LossSum
from dora_mm.utils.run_directory import SAVE_NOW
from tests.shared.small_training import but_for_seconds, interrupt_at, metrics, new_run, small_training

OPTIMIZERS = {
    "adamw": {"lr": 0.05},
    "adafactor": {"lr": 0.05},
    "schedule_free": {"lr": 0.05},
    "prodigy": {"lr": 1.0, "betas": [0.9, 0.99]},
}


def test_all_that_need_no_gpu_are_resumed_here():
    assert OPTIMIZERS.keys() == {name for name, kind in optim.OPTIMIZERS.items() if not kind.needs_gpu}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("stop", [1, 5, 11])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, name, stop):
    """Although its result is looked at in every step, which is another one than what is trained if schedule-free."""
    if name == "schedule_free":
        pytest.importorskip("schedulefree")

    def train(run, **settings):
        found, results = small_training(run, **shared, **settings), []

        def on_step_end(step):
            with result_of(found.optimizer):
                results.append([p.detach().clone() for p in found.network.parameters()])

        try:
            assert found.fit(on_step_end=on_step_end) == 12
        finally:
            found.result = results[-1] if results else None
            trainings.append(found)

    trainings: list[Any] = []
    optimizer = {"name": name, **OPTIMIZERS[name]}
    shared: Any = {"optimizer": optimizer, "schedule": "constant", "gradient_accumulation_steps": 2}
    train(new_run(tmp_path / "uninterrupted"))
    run = new_run(tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        train(run, after_step=interrupt_at(stop))
    train(run)
    uninterrupted, _, second = trainings
    assert all(torch.equal(*pair) for pair in zip(uninterrupted.result, second.result, strict=True))
    for one, two in zip(uninterrupted.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(one, two)
    states = [part.optimizer.optimizer.state_dict()["state"] for part in (uninterrupted, second)]
    for one, two in zip(states[0].values(), states[1].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(two[key])) for key in one)


def test_the_loss_that_is_shown_is_the_mean_of_the_first_steps_and_then_follows_the_last_ones():
    progress = TrainingProgress(500, 10, shown=False)
    progress.start(0)
    for loss in (9.0, *[1.0] * 7):
        progress.advance(loss, 1e-4)
    assert progress.mean_loss == pytest.approx((9 + 7) / 8)
    for _ in range(400):
        progress.advance(0.5, 1e-4)
    assert progress.mean_loss == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("stop", [1, 4, 6, 11])
def test_the_curves_of_a_resumed_run_are_those_of_an_uninterrupted_one(tmp_path, stop):
    uninterrupted, parts = new_run(tmp_path / "uninterrupted"), new_run(tmp_path / "parts")
    small_training(uninterrupted).fit()
    with pytest.raises(KeyboardInterrupt):
        small_training(parts, after_step=interrupt_at(stop)).fit()
    time.sleep(0.2)  # the pause is no training
    small_training(parts).fit()
    assert but_for_seconds(metrics(parts)) == but_for_seconds(metrics(uninterrupted))
    seconds = [row["seconds"] for row in metrics(parts)]
    assert seconds == sorted(seconds)


def test_the_curves_go_on_from_the_last_checkpoint_after_a_kill(tmp_path):
    uninterrupted, parts = new_run(tmp_path / "uninterrupted"), new_run(tmp_path / "parts")
    small_training(uninterrupted, checkpoint_every=4).fit()

    def killed(step):
        if step == 7:
            raise RuntimeError  # saves nothing, as a kill

    with pytest.raises(RuntimeError):
        small_training(parts, checkpoint_every=4, after_step=killed).fit()
    before = metrics(parts)
    small_training(parts, checkpoint_every=4).fit()
    after = metrics(parts)
    assert [row["step"] for row in before] == [3, 4, 6]
    assert after[:2] == before[:2]
    assert but_for_seconds(after) == but_for_seconds(metrics(uninterrupted))
    assert [row["seconds"] for row in after] == sorted(row["seconds"] for row in after)


def test_a_checkpoint_has_its_row_so_that_a_kill_after_few_steps_leaves_curves(tmp_path):
    run = new_run(tmp_path / "run")
    train = {"steps": 4, "log_every": 10, "checkpoint_every": 2}

    def killed(step):
        if step == 3:
            raise RuntimeError  # saves nothing, as a kill

    with pytest.raises(RuntimeError):
        small_training(run, after_step=killed, **train).fit()
    assert [row["step"] for row in metrics(run)] == [2]
    small_training(run, **train).fit()
    assert [row["step"] for row in metrics(run)] == [2, 4]


def test_a_signal_during_a_step_loses_no_row(tmp_path, set_handler):
    set_handler(signal.SIGINT, signal.default_int_handler)
    run, seen = new_run(tmp_path / "run"), []

    def loss(x, generator):
        seen.append(x)
        if len(seen) == 3:
            signal.raise_signal(signal.SIGINT)
        return training.network(x).square().mean()

    training = small_training(run, loss=loss)
    with pytest.raises(KeyboardInterrupt):
        training.fit()
    assert [row["step"] for row in metrics(run)] == [3]


def test_dropout_repeats_and_resumes(tmp_path):
    def with_dropout(run, **settings):
        training = small_training(run, dropout=0.5, **settings)
        torch.manual_seed(hash(run.path.name) % 1000)  # an arbitrary state of PyTorch's global generator
        return training

    uninterrupted = with_dropout(new_run(tmp_path / "uninterrupted"), gradient_accumulation_steps=2)
    uninterrupted.fit()
    again = with_dropout(new_run(tmp_path / "again"), gradient_accumulation_steps=2)
    again.fit()
    run = new_run(tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        with_dropout(run, gradient_accumulation_steps=2, after_step=interrupt_at(5)).fit()
    resumed = with_dropout(run, gradient_accumulation_steps=2)
    resumed.fit()
    plain = small_training(new_run(tmp_path / "plain"), gradient_accumulation_steps=2)
    plain.fit()
    for one, two, three, four in zip(
        *(m.network.parameters() for m in (uninterrupted, again, resumed, plain)), strict=True
    ):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
        assert not torch.equal(one, four)


def test_a_resumed_run_logs_no_step_twice(tmp_path):
    run = new_run(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        small_training(run, after_step=interrupt_at(7), checkpoint_every=2, keep_checkpoints=9).fit()
    for newer in checkpoints(run.checkpoints)[2:]:  # as if the process had been killed right after step 4
        import shutil

        shutil.rmtree(newer)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # half a line
    small_training(run).fit()
    assert [row["step"] for row in read_metrics(run.path / "metrics.jsonl")] == [2, 3, 4, 6, 9, 12]


def test_a_checkpoint_is_saved_when_a_person_asks_for_it(tmp_path):
    run = new_run(tmp_path / "run")

    def ask(step):
        if step in (5, 6):
            (run.path / SAVE_NOW).touch()

    small_training(run, after_step=ask, checkpoint_every=6, keep_checkpoints=9).fit()
    assert [path.name for path in checkpoints(run.checkpoints)] == ["step-000005", "step-000006", "step-000012"]
    assert not (run.path / SAVE_NOW).exists()


def test_each_row_has_the_mean_loss_of_its_steps(tmp_path):
    """Also where the run was interrupted between two rows."""
    each, run = new_run(tmp_path / "each"), new_run(tmp_path / "run")
    small_training(each, log_every=1).fit()
    with pytest.raises(KeyboardInterrupt):
        small_training(run, log_every=5, after_step=interrupt_at(8)).fit()
    small_training(run, log_every=5).fit()
    losses = [row["last_loss"] for row in metrics(each)]
    means = [sum(losses[a:b]) / (b - a) for a, b in ((0, 5), (5, 10), (10, 12))]
    assert [row["last_loss"] for row in metrics(run)] == pytest.approx(means, rel=1e-6)


def test_old_checkpoints_are_deleted(tmp_path):
    run = new_run(tmp_path / "run")
    small_training(run, checkpoint_every=2, keep_checkpoints=3).fit()
    assert [path.name for path in checkpoints(run.checkpoints)] == ["step-000008", "step-000010", "step-000012"]


def test_one_that_a_kill_left_is_deleted_when_the_run_goes_on(tmp_path):
    run = new_run(tmp_path / "run")
    small_training(run, checkpoint_every=2, keep_checkpoints=4).fit()
    small_training(run, checkpoint_every=2, keep_checkpoints=2).fit()
    assert [path.name for path in checkpoints(run.checkpoints)] == ["step-000010", "step-000012"]


def test_an_unfinished_checkpoint_does_not_count(tmp_path):
    run = new_run(tmp_path / "run")
    partial = run.checkpoints / ".step-000005.partial"
    partial.mkdir(parents=True)
    (partial / "trained_weights.safetensors").write_bytes(b"half")
    assert small_training(run, steps=3).fit() == 3


class FullDisk:
    """A file on a disk that has 100 kB left."""

    def __init__(self, file):
        self.file, self.left = file, 100_000

    def write(self, data):
        self.left -= len(data)
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def flush(self):
        self.file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *about):
        self.file.close()


def test_a_full_disk_is_reported_to_the_user_and_leaves_no_partial_checkpoint(tmp_path, monkeypatch):
    real = Path.open

    def opened(path, *args, **kwargs):
        file = real(path, *args, **kwargs)
        return FullDisk(file) if path.name == "state.safetensors" else file

    monkeypatch.setattr(Path, "open", opened)
    state = SimpleNamespace(state_dict=lambda: {"moments": torch.zeros(100_000)})
    with pytest.raises((OSError, RuntimeError)) as error:
        save_checkpoint(tmp_path, 1, {"w": nn.Parameter(torch.zeros(2))}, {"optimizer": state}, keep=1)
    assert "the disk is full" in user_message(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run = new_run(tmp_path / "run")
    training = small_training(run, steps=3)
    training.fit()
    (checkpoint,) = checkpoints(run.checkpoints)
    with pytest.raises(ValueError, match="belongs to another model"):
        load_checkpoint(checkpoint, {"other": nn.Parameter(torch.zeros(1))}, {})


@pytest.fixture
def set_handler():
    """Sets signal handlers for one test: background jobs of a shell, such as in CI, start with SIGINT ignored."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield signal.signal
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_a_signal_takes_effect_at_the_end_of_the_step(tmp_path, set_handler):
    set_handler(signal.SIGINT, signal.default_int_handler)
    run = new_run(tmp_path / "run")
    weights = []

    def loss(x, generator):
        if not weights:
            signal.raise_signal(signal.SIGINT)
        weights.append(x)
        return training.network(x).square().mean()

    training = small_training(run, loss=loss)
    with pytest.raises(KeyboardInterrupt):
        training.fit()
    assert [path.name for path in checkpoints(run.checkpoints)] == ["step-000001"]


def test_an_ignored_signal_is_not_the_first_of_two(set_handler):
    """The second of two deferred signals would take effect at once, in the middle of a step."""
    set_handler(signal.SIGINT, signal.SIG_IGN)
    set_handler(signal.SIGTERM, signal.default_int_handler)
    done = []

    def step():
        with DeferredInterrupt():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            done.append("step")

    with pytest.raises(KeyboardInterrupt):
        step()
    assert done == ["step"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    training = small_training(
        new_run(tmp_path / "run"), loss=lambda x, generator: training.network(x).mean() * float("nan")
    )
    with pytest.raises(ValueError, match="The loss is nan at step 1"):
        training.fit()


@pytest.mark.parametrize("every", [0, 2])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, every):
    """The loss of a step is that of the weights before it."""
    run = new_run(tmp_path / "run")
    training: Any = None

    def break_weights(step):
        if step == 4:
            training.network[3].bias.data[1] = torch.inf

    training = small_training(run, after_step=break_weights, steps=4, checkpoint_every=every)
    kept = "the checkpoint of step 2 stays as it is" if every else "nothing was saved"
    text = rf"^3.bias has values that are NaN or infinite after step 4 \({kept}\), and would be again"
    with pytest.raises(DivergedError, match=text):
        training.fit()
    assert [path.name for path in checkpoints(run.checkpoints)] == (["step-000002"] if every else [])


def test_an_interruption_saves_no_weights_that_are_not_finite(tmp_path):
    run = new_run(tmp_path / "run")
    training: Any = None

    def break_and_interrupt(step):
        training.network[0].weight.data[0, 0] = torch.nan
        raise KeyboardInterrupt

    training = small_training(run, after_step=break_and_interrupt)
    with pytest.raises(ValueError, match="^0.weight has values that are NaN or infinite after step 1 .nothing"):
        training.fit()
    assert checkpoints(run.checkpoints) == []


def test_a_checkpoint_that_is_not_finite_is_refused(tmp_path):
    run = new_run(tmp_path / "run")
    training = small_training(run)
    training.fit()
    training.network[0].weight.data[0, 0] = torch.nan
    path = save_checkpoint(run.checkpoints, 13, training.parts["parameters"], {}, keep=5)
    with pytest.raises(ValueError, match="0.weight has values that are NaN or infinite: delete it"):
        load_checkpoint(path, training.parts["parameters"], {})


@pytest.mark.parametrize("sizes", [(4, 4, 4), (1, 5, 3), (0, 2, 1), (0, 0, 0)])
def test_a_step_is_the_mean_over_all_rows_of_its_batches(tmp_path, sizes):
    """Not the mean of their means, in which a row of a small batch weighs more."""
    training = small_training(new_run(tmp_path / "run"), steps=1, gradient_accumulation_steps=3, max_grad_norm=None)
    batches = [torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in sizes]
    optimizer, found = training.optimizer.optimizer, {}
    training.parts["batch_at"] = lambda number: batches[number]
    training.parts["loss"] = lambda x, stream: LossSum(training.network(x).square().sum(), torch.tensor(float(len(x))))
    optimizer.register_step_pre_hook(lambda *_: found.update({n: p.grad.clone() for n, p in parameters.items()}))
    parameters = dict(training.network.named_parameters())
    expected = training.network(torch.cat(batches)).square().sum() / max(1, sum(sizes))
    gradients = torch.autograd.grad(expected, list(parameters.values()))
    training.fit()
    for name, gradient in zip(found, gradients, strict=True):
        torch.testing.assert_close(found[name], gradient)
    assert metrics(SimpleNamespace(path=tmp_path / "run"))[-1]["loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_magnitudes_can_have_a_separate_learning_rate():
    parameters = {"a.lora_A": nn.Parameter(torch.zeros(2)), "a.magnitude": nn.Parameter(torch.zeros(2))}
    optimizer = build_optimizer(parameters, OptimizerConfig(lr=0.1, magnitude_lr=0.01))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == {id(parameters["a.lora_A"]): 0.1, id(parameters["a.magnitude"]): 0.01}


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer({}, OptimizerConfig(lr=0.1))
