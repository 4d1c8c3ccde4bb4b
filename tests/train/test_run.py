"""What a run says of itself, and what changes in its directory when it is extended."""

import json
import logging
import shlex
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from dora_mm.config import load_config
from dora_mm.config.training import OptimizerConfig
from dora_mm.train.run import lower_rate, training_run
from dora_mm.utils.lock import only_writer
from tests.shared.killed import files_in
from tests.shared.small_training import interrupt_at, metrics, new_run, small_training

CONFIG = """\
pipeline: train_diffusion
model: {path: some/model}
adapter: {rank: 4}
data: {folder: images, resolution: 128}
optimizer: {lr: 1e-4}
train: {steps: 12, batch_size: 4}
"""


@pytest.fixture
def train(tmp_path, caplog):
    """Runs the small training in a run directory; returns the directory and what was said."""
    caplog.set_level(logging.INFO)
    file = tmp_path / "mine.yaml"
    file.write_text(CONFIG)

    def run(*overrides, resume=None, deciding=MappingProxyType({}), **settings):
        caplog.clear()
        config = load_config(resume / "config.yaml" if resume else file, [f"output={tmp_path / 'run'}", *overrides])
        steps = config.train.steps
        with training_run(Accelerator(cpu=True), config, {}, resume, config.train, deciding) as directory:
            small_training(directory, steps=steps, schedule="constant", **settings).fit()
            for name in ("adapter", "samples"):
                (directory.path / name).mkdir(exist_ok=True)
            (directory.path / "summary.json").write_text("{}")
        return directory

    return run


def said(caplog):
    return [line for line in caplog.messages if "Run " in line]


def test_a_run_says_where_it_is_and_how_to_go_on_at_its_start_and_end(train, tmp_path, caplog):
    train()
    how = f"dora-mm train --resume {shlex.quote(str(tmp_path / 'run'))}"
    assert said(caplog) == [
        f"Run {tmp_path / 'run'}. After a stop: {how}",
        f"\nRun {tmp_path / 'run'} is finished. To train longer: {how} --set train.steps=24",
    ]


STOPS = {
    "Ctrl-C": ({"after_step": interrupt_at(7)}, KeyboardInterrupt, "saved at step 7 of 12"),
    "a loss that is not finite": (
        {"loss": lambda x, generator: torch.tensor(float("nan"), requires_grad=True)},
        ValueError,
        "nothing saved yet",
    ),
    "a full disk": ({"after_step": None, "checkpoint_every": 5}, OSError, "saved at step 5 of 12"),
}


@pytest.mark.parametrize("stop", STOPS)
def test_a_run_says_how_to_go_on_when_it_stops(train, tmp_path, caplog, stop):
    settings, error, kept = STOPS[stop]
    if stop == "a full disk":

        def full(step):
            if step == 8:
                raise OSError(28, "No space left on device")

        settings = {**settings, "after_step": full}
    with pytest.raises(error):
        train(**settings)
    run = tmp_path / "run"
    lower = " --set optimizer.lr=1e-05" if stop == "a loss that is not finite" else ""
    how = f"dora-mm train --resume {shlex.quote(str(run))}{lower}"
    assert said(caplog)[-1] == f"\nRun {run} has stopped, {kept}. To go on: {how}"
    assert len(said(caplog)) == 2


@pytest.mark.parametrize(
    ("name", "rate", "lower"), [("adamw", 0.01, "0.001"), ("prodigy", 1, "0.1"), ("prodigy", 0.2, "0.1")]
)
def test_the_rate_to_go_on_with_is_one_of_the_optimizer(name, rate, lower):
    config = SimpleNamespace(optimizer=OptimizerConfig(name=name, lr=rate))
    assert lower_rate(config) == f"optimizer.lr={lower}"


def test_a_path_with_a_blank_is_quoted(train, tmp_path, caplog):
    train(f"output={tmp_path / 'a b'}")
    assert f"dora-mm train --resume '{tmp_path / 'a b'}'" in said(caplog)[0]


def test_an_extended_run_saves_its_config_what_changed_and_the_earlier_results(train, tmp_path, caplog):
    run = train()
    resumed = train("train.steps=20", "sample.steps=3", resume=run.path)
    assert load_config(resumed.path / "config.yaml").train.steps == 20
    rows = [json.loads(line) for line in (run.path / "changes.jsonl").read_text().splitlines()]
    assert rows == [
        {"step": 12, "key": "train.steps", "before": 12, "after": 20},
        {"step": 12, "key": "sample.steps", "before": 25, "after": 3},
    ]
    assert "train.steps changes from 12 to 20" in caplog.messages
    assert said(caplog)[0].startswith(f"Run {run.path}, at step 12 of 20. After a stop: ")
    assert sorted(path.name for path in (run.path / "step-000012").iterdir()) == ["adapter", "summary.json"]
    assert (run.path / "adapter").is_dir()
    assert [row["step"] for row in metrics(run)] == [3, 6, 9, 12, 15, 18, 20]
    train(resume=run.path)  # a plain resumption changes nothing
    assert len((run.path / "changes.jsonl").read_text().splitlines()) == 2
    assert not (run.path / "step-000020").exists()


def test_results_are_kept_whenever_a_finished_run_goes_on_with_another_config(train, tmp_path):
    run = train()
    with pytest.raises(ValueError, match="loss is nan"):  # stopped before the first new checkpoint
        train("train.steps=14", resume=run.path, **STOPS["a loss that is not finite"][0])
    assert (run.path / "diverged.txt").read_text().startswith("The loss is nan")
    train("train.steps=12", resume=run.path)
    assert not (run.path / "diverged.txt").exists()
    train("train.steps=14", resume=run.path)
    kept = {folder.name: sorted(path.name for path in folder.iterdir()) for folder in run.path.glob("step-*")}
    assert kept == dict.fromkeys(("step-000012", "step-000012-2"), ["adapter", "summary.json"])


def test_a_kill_while_results_are_moved_loses_none(train, tmp_path):
    run = train()
    (run.path / "step-000012").mkdir()
    (run.path / "adapter").rename(run.path / "step-000012" / "adapter")  # as far as it had come
    train("train.steps=14", resume=run.path)
    assert sorted(path.name for path in (run.path / "step-000012").iterdir()) == ["adapter", "summary.json"]


def test_a_run_cannot_end_before_its_last_checkpoint(train, tmp_path):
    run = train()
    with pytest.raises(ValueError, match=r"train.steps: .* has finished 12 steps, so it cannot end at 5"):
        train("train.steps=5", resume=run.path)
    assert load_config(run.path / "config.yaml").train.steps == 12


def test_a_run_goes_on_with_other_software_and_says_so(train, tmp_path, caplog):
    run = train()
    file = run.path / "versions.json"
    file.write_text(file.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "2.0.0"'))
    train(resume=run.path)
    (said_aloud,) = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert said_aloud == (
        "12 of 12 finished steps were computed under other circumstances, which may change last bits: "
        f"torch 2.0.0 is {torch.__version__}"
    )


def test_a_run_goes_on_with_other_threads_and_says_so(train, caplog):
    """They divide sums among them, so that last bits differ."""
    run = train()
    file, threads = run.path / "versions.json", torch.get_num_threads()
    file.write_text(file.read_text().replace(f'"threads": {threads}', f'"threads": {threads + 7}'))
    train(resume=run.path)
    (said_aloud,) = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert said_aloud.endswith(f"threads {threads + 7} is {threads}")


def test_a_run_goes_on_with_other_kernels_and_says_so(train, monkeypatch, caplog):
    run = train()
    monkeypatch.setattr("dora_mm.backend.implementation", lambda backend: "triton 3.6.0")  # as on a GPU
    train(resume=run.path)
    (said_aloud,) = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert said_aloud.endswith("adapted layers torch is triton 3.6.0")


def test_a_run_has_one_writer(train, tmp_path):
    run = train()
    with only_writer(run.path):
        before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
        with pytest.raises(ValueError, match=r"run has a writer already, process \d+ on .* \(since 2"):
            train("train.steps=14", resume=run.path)
        assert {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()} == before
    train("train.steps=14", resume=run.path)
    assert not (run.path / ".lock").exists()


def test_what_a_killed_writer_has_left_goes_at_the_next_start(train, tmp_path):
    run = train()
    (run.checkpoints / ".step-000014.partial").mkdir()
    (run.checkpoints / ".step-000014.partial" / "state.safetensors").touch()
    (run.path / ".summary.json.1a2b3c4d-1.partial").touch()
    (run.path / ".lock").write_text("{")
    train("train.steps=13", resume=run.path)
    assert not list(run.path.rglob("*.partial"))


def test_what_decides_by_a_checkpoint_whether_a_run_goes_on_does_so_before_anything_is_written(train):
    class Limit:
        def load_state_dict(self, state_dict):
            raise ValueError(f"the limit cannot change after step {state_dict['last_epoch']}")

    run = train("train.steps=2").path
    before = files_in(run)
    with pytest.raises(ValueError, match="the limit cannot change after step 2"):
        train("train.steps=4", resume=run, deciding={"schedule": Limit()})
    assert files_in(run) == before


def test_each_batch_is_trained_once_and_in_order_whatever_is_accumulated(tmp_path):
    seen = []

    def loss(x, generator):
        seen.append(x)
        return x.new_zeros((), requires_grad=True).expand(1)

    small_training(new_run(tmp_path / "run"), steps=4, gradient_accumulation_steps=3, loss=loss).fit()
    batches = [torch.randn(4, 6, generator=torch.Generator().manual_seed(number)) for number in range(12)]
    assert all(map(torch.equal, seen, batches))
    assert len(seen) == 12
