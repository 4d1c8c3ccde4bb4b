"""A resumed run whose files are not as they were: it is refused, or ends as if nothing had happened."""

import contextlib
import json
import random
import shutil
import sys
import types

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from dora_mm import cli
from dora_mm.config import load_config
from dora_mm.config.training import ValidationConfig
from dora_mm.train.checkpoint import last_step
from dora_mm.train.metrics import read_metrics
from dora_mm.train.run import training_run
from dora_mm.train.state_file import read_state
from dora_mm.train.validation import Validation
from tests.shared.small_training import but_for_seconds, interrupt_at, small_training

CONFIG = """\
pipeline: train_diffusion
model: {path: some/model}
adapter: {rank: 4}
data: {folder: PICTURES, resolution: 128}
optimizer: {lr: 0.05}
train: {steps: 12, batch_size: 4, checkpoint_every: 4}
"""
STOP = 9  # the checkpoints are those of steps 8 and 9
REFUSED, SAME, RECORDED = "refused", "the same result", "recorded in changes.jsonl"
FILES = {  # what may come of a flipped bit
    "config.yaml": {REFUSED, RECORDED},
    "inputs.json": {REFUSED},
    "versions.json": {SAME},
    "metrics.jsonl": {REFUSED},
    "metrics.sha256": {REFUSED},
    "validation/metrics.jsonl": {REFUSED},
    "validation/metrics.sha256": {REFUSED},
    "checkpoints/step-000008/checkpoint.json": {SAME},
    "checkpoints/step-000008/state.safetensors": {SAME},
    "checkpoints/step-000008/trained_weights.safetensors": {SAME},
    "checkpoints/step-000009/checkpoint.json": {SAME},
    "checkpoints/step-000009/state.safetensors": {SAME},
    "checkpoints/step-000009/trained_weights.safetensors": {SAME},
}
FLIPS = 2  # in each file


def train(config, *, resume=None, stop=None):
    """A small recipe, which reads seed and rate of its config."""
    with training_run(Accelerator(cpu=True), config, {"the data": "abc"}, resume, config.train) as run:
        training = small_training(
            run,
            optimizer={"name": config.optimizer.name, "lr": config.optimizer.lr},
            seed=config.seed,
            steps=config.train.steps,
            checkpoint_every=4,
            after_step=interrupt_at(stop),
        )
        weights = training.network[0].weight.detach()

        def measure():
            return {"vqa": float(weights.sum())}  # a score that depends on the weights

        done = last_step(run.checkpoints)
        validate = Validation(run, ValidationConfig(every=3), measure, dict, lambda folder: None, done)
        training.fit(on_step_end=lambda step: validate.is_due(step, config.train.steps + 1) and validate(step))


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a run, which is interrupted at a step."""
    (tmp_path / "pictures").mkdir()
    file = tmp_path / "mine.yaml"
    file.write_text(CONFIG.replace("PICTURES", str(tmp_path / "pictures")))
    module = types.ModuleType("dora_mm.pipelines.train_diffusion")
    module.main = train
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def run(name, stop=STOP, **values):
        settings = [f"{key}={value}" for key, value in {"output": tmp_path / name, **values}.items()]
        with pytest.raises(KeyboardInterrupt) if stop else contextlib.nullcontext():
            train(load_config(file, settings), stop=stop)
        return tmp_path / name

    return run


def result(run):
    """All that a finished run has computed."""
    end = run / "checkpoints" / "step-000012"
    state = read_state(end / "state.safetensors")["optimizer"]["state"]
    curves = [but_for_seconds(read_metrics(run / name / "metrics.jsonl")) for name in ("", "validation")]
    return load_file(end / "trained_weights.safetensors"), state, curves


def assert_same(one, other):
    weights, state, curves = one
    others, other_state, other_curves = other
    assert curves == other_curves
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert all(torch.equal(state[i][key], other_state[i][key]) for i in state for key in state[i])


def resumed(run, wanted) -> str:
    """What comes of a resumption; another result with exit code 0 fails."""
    if cli.main(["train", "--resume", str(run)]) == 2:
        return REFUSED
    if (run / "changes.jsonl").exists():
        return RECORDED
    assert_same(result(run), wanted)
    return SAME


def flipped(data: bytes, number: int) -> bytes:
    """The data with one bit changed."""
    position = random.Random(number).randrange(len(data) * 8)
    return data[: position // 8] + bytes([data[position // 8] ^ 1 << position % 8]) + data[position // 8 + 1 :]


@pytest.mark.slow
def test_a_flipped_bit_in_any_file_changes_no_result(start, tmp_path):
    wanted, run = result(start("whole", stop=None)), start("run")
    files = {str(file.relative_to(run)) for file in run.rglob("*") if file.is_file() and "tensorboard" not in str(file)}
    assert files == set(FILES)
    for name, expected in FILES.items():
        for number in range(FLIPS):
            broken = shutil.copytree(run, tmp_path / "broken")
            (broken / name).write_bytes(flipped((run / name).read_bytes(), number))
            assert resumed(broken, wanted) in expected, (name, number)
            shutil.rmtree(broken)


@pytest.mark.slow
def test_a_file_of_another_run_or_a_missing_one_changes_no_result(start, tmp_path):
    wanted, run = result(start("whole", stop=None)), start("run")
    other = start("other", seed=1)
    for name in FILES:
        for source in (other / name, None):
            broken = shutil.copytree(run, tmp_path / "broken")
            shutil.copy(source, broken / name) if source else (broken / name).unlink()
            outcome = resumed(broken, wanted)
            without_digest = source is None and name.endswith("sha256")  # a person may delete the curves
            assert outcome == (SAME if name == "versions.json" or "checkpoints" in name or without_digest else REFUSED)
            shutil.rmtree(broken)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(start, capsys, caplog):
    run = start("run")
    newest = run / "checkpoints" / "step-000009"
    (newest / "state.safetensors").write_bytes(b"half")
    assert cli.main(["train", "--resume", str(run)]) == 0
    (damaged, goes_on) = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert damaged == (
        f"The checkpoint {newest} is damaged (state.safetensors is not as it was saved), and set aside as "
        "damaged-step-000009."
    )
    assert goes_on == "The run goes on from the checkpoint of step 8."
    assert (run / "checkpoints" / "damaged-step-000009" / "state.safetensors").read_bytes() == b"half"
    for checkpoint in (run / "checkpoints").glob("step-*"):
        (checkpoint / "checkpoint.json").write_text("{}")
    assert cli.main(["train", "--resume", str(run), "--set", "train.steps=14"]) == 2
    assert "has no checkpoint that is intact (step-000012: checkpoint.json cannot be read" in capsys.readouterr().err
    assert last_step(run / "checkpoints") == 12


def test_a_training_that_diverged_goes_on_with_a_lower_rate(start, caplog):
    """The rates of the remaining steps are those of a schedule with the lower one, and the change is recorded."""
    caplog.set_level("INFO")
    run = start("run")
    assert cli.main(["train", "--resume", str(run), "--set", "optimizer.lr=0.005"]) == 0
    (row,) = (json.loads(line) for line in (run / "changes.jsonl").read_text().splitlines())
    assert row == {"step": STOP, "key": "optimizer.lr", "before": 0.05, "after": 0.005}
    rates = {row["step"]: row["lr"] for row in read_metrics(run / "metrics.jsonl")}
    wanted = {row["step"]: row["lr"] for row in read_metrics(start("whole", stop=None) / "metrics.jsonl")}
    assert rates[9] == wanted[9]
    assert rates[12] == pytest.approx(wanted[12] / 10, rel=1e-12)
    assert "optimizer.lr changes from 0.05 to 0.005" in caplog.text
    assert "rates of a run of" not in caplog.text  # its length is the same
    state = read_state(run / "checkpoints" / "step-000012" / "state.safetensors")
    assert {group["initial_lr"] for group in state["optimizer"]["param_groups"]} == {0.005}


def test_an_absurd_rate_gets_one_advice(start, capsys, caplog):
    caplog.set_level("INFO")
    with pytest.raises(ValueError, match="and would be again in a resumed run with this optimizer.lr: go on with a"):
        start("run", stop=None, **{"optimizer.name": "adafactor", "optimizer.lr": 1e37})
    run = caplog.text.partition("To go on: dora-mm ")[2].strip()
    assert run.endswith("--set optimizer.lr=1e+36")
    assert cli.main(["train", "--resume", str(start("again")), "--set", "optimizer.lr=0.001"]) == 0
