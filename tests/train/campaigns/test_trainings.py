"""Trainings of a campaign: parallel ones, failures, interruptions, resuming, and the choice of learning rates."""

import json
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from dora_mm.config.training import LearningRates
from dora_mm.eval.comparison import FULL, Variant
from dora_mm.train.campaigns import subprocesses
from dora_mm.train.campaigns import trainings as module
from dora_mm.train.campaigns.subprocesses import TrainingProcess, check_process, start_process
from dora_mm.train.campaigns.trainings import Training, Trainings, candidate_rates, next_rate

LORA, DORA = Variant("lora", 2), Variant("dora", 2)


@pytest.fixture
def trainings(tmp_path):
    return Trainings(tmp_path, "base.yaml", 2, lambda training: [f"seed={training.seed}"])


def test_an_interrupted_training_is_resumed(trainings, monkeypatch):
    training = Training(LORA, 0.01, 0)
    commands = []

    def start(name, arguments, log_file, threads):
        commands.append(arguments)
        return TrainingProcess(name, SimpleNamespace(returncode=0, poll=lambda: 0), log_file)

    monkeypatch.setattr(module, "start_process", start)
    run = trainings.run(training)
    new = ["train", "base.yaml", "--set", "seed=0", "--set", f"output={run}"]
    trainings.train([training])
    assert commands[-1] == new
    run.mkdir(parents=True)
    trainings.train([training])  # killed before config.yaml was written
    assert commands[-1] == new
    assert not run.exists()  # the new training would refuse a folder that exists
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").touch()
    trainings.train([training])
    assert commands[-1] == ["train", "--resume", str(run)]
    assert not (run / "checkpoints").exists()
    (run / "summary.json").touch()
    trainings.train([training])
    assert len(commands) == 3


class Stub:
    """Starts real processes in place of trainings: they sleep, then exit with `status`."""

    def __init__(self, seconds, status=0):
        self.seconds, self.status = seconds, status
        self.started = []

    def __call__(self, name, arguments, log_file, threads):
        code = f"import time, sys; time.sleep({self.seconds}); sys.exit({self.status})"
        log_file.parent.mkdir(parents=True, exist_ok=True)
        log_file.write_text("dora-mm: no such file")
        process = subprocess.Popen([sys.executable, "-c", code])
        self.started.append((process, threads))
        return TrainingProcess(name, process, log_file)


SIX = [Training(LORA, 0.01, seed) for seed in range(6)]


def test_trainings_run_in_parallel(trainings, monkeypatch):
    stub = Stub(0.0)
    num_running = []

    def start(*args):
        job = stub(*args)
        num_running.append(sum(process.poll() is None for process, _ in stub.started))
        return job

    monkeypatch.setattr(module, "start_process", start)
    trainings.train(SIX)
    assert len(stub.started) == 6
    assert max(num_running) == 2
    assert {threads for _, threads in stub.started} == {max(1, torch.get_num_threads() // 2)}


def test_a_failure_stops_the_other_trainings(trainings, monkeypatch):
    slow, failing = Stub(60.0), Stub(0.0, status=2)
    monkeypatch.setattr(
        module, "start_process", lambda name, *rest: (slow if name.endswith("seed0") else failing)(name, *rest)
    )
    with pytest.raises(ValueError, match="the training lora-r2-lr0.01-seed[1-5] .*dora-mm: no such file"):
        trainings.train(SIX)
    assert len(slow.started) == len(failing.started) == 1
    assert slow.started[0][0].returncode == -signal.SIGTERM


def test_an_interruption_reaches_the_trainings(trainings, monkeypatch):
    stub = Stub(60.0)
    monkeypatch.setattr(module, "start_process", stub)
    monkeypatch.setattr(subprocesses.time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trainings.train(SIX)
    assert [process.returncode for process, _ in stub.started] == [-signal.SIGTERM] * 2


def test_an_extreme_best_rate_makes_the_search_try_another(trainings, monkeypatch):
    scored = []

    def value(training):
        scored.append(training.rate)
        return training.rate if training.variant == DORA and training.rate < 5 else -abs(training.rate - 0.01)

    monkeypatch.setattr(Trainings, "train", lambda self, trainings: None)
    candidates = {DORA: (1e-2, 1e-3, 1e-1), LORA: (1e-3, 1e-2, 1e-1)}
    chosen = trainings.choose_rates(candidates, value, seed=0, extra_rates=2)
    assert scored == pytest.approx([1e-3, 1e-2, 1e-1, 1e-3, 1e-2, 1e-1, 1.0, 10.0])
    assert chosen == {DORA: (pytest.approx(1.0), False), LORA: (1e-2, False)}
    tried = json.loads((trainings.folder / "rates" / "dora-r2.json").read_text())
    assert len(tried) == 5

    without_extra = trainings.choose_rates(candidates, value, seed=0, extra_rates=0)
    assert [str(chosen) for chosen in without_extra.values()] == ["0.1*", "0.01"]
    assert next_rate({1e-3: 3.0, 1e-2: 2.0}) == pytest.approx(1e-4)


def test_candidates_are_those_of_the_method():
    rates = LearningRates(full=(1.0, 2.0, 3.0), lora=(4.0, 5.0, 6.0), dora=(7.0, 8.0, 9.0))
    found = candidate_rates(rates, [FULL, DORA, Variant("dora", 1)])
    assert found == {FULL: (1.0, 2.0, 3.0), DORA: (7.0, 8.0, 9.0), Variant("dora", 1): (7.0, 8.0, 9.0)}


def test_the_error_of_a_failed_training_is_reported(tmp_path, monkeypatch):
    job = start_process("lora", ["train", "nowhere.yaml"], tmp_path / "logs" / "x.txt", 1)
    job.process.wait()
    with pytest.raises(ValueError, match=r"the training lora .*dora-mm: .*nowhere\.yaml"):
        check_process(job)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    job = start_process("lora", ["train", "some.yaml"], tmp_path / "logs" / "y.txt", 1)
    job.process.wait()
    with pytest.raises(RuntimeError, match="lora failed with exit code 1"):
        check_process(job)
