"""Trainings of a campaign as processes: parallel ones, failures, interruptions, resuming."""

import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from dora_mm.studies.campaigns import subprocesses
from dora_mm.studies.campaigns import trainings as module
from dora_mm.studies.campaigns.subprocesses import TrainingProcess, check_process, start_process
from dora_mm.studies.campaigns.trainings import Training, Trainings
from dora_mm.studies.variants import Variant
from dora_mm.utils.lock import LOCK

LORA = Variant("lora", 2)


@pytest.fixture
def trainings(tmp_path):
    return Trainings(tmp_path, "base.yaml", 2, lambda training: [f"seed={training.seed}"])


def test_an_interrupted_training_is_resumed(trainings, monkeypatch):
    training = Training(LORA, 0.01, 0)
    commands, finished = [], []

    def start(name, arguments, log_file, threads):
        commands.append(arguments)
        return TrainingProcess(name, SimpleNamespace(returncode=0, poll=lambda: 0), log_file)

    monkeypatch.setattr(module, "start_process", start)
    run = trainings.run(training)
    new = ["train", "base.yaml", "--set", "seed=0", "--set", f"output={run}"]
    trainings.train([training], finished.append)
    assert commands[-1] == new
    run.mkdir(parents=True)
    trainings.train([training], finished.append)  # killed before config.yaml was written
    assert commands[-1] == new
    assert not run.exists()  # the new training would refuse a folder that exists
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").touch()
    trainings.train([training], finished.append)
    assert commands[-1] == ["train", "--resume", str(run)]
    assert not (run / "checkpoints").exists()
    (run / "summary.json").touch()
    (run / LOCK).touch()
    trainings.train([training], finished.append)  # killed behind its last file
    assert commands[3:] == [["train", "--resume", str(run)]]
    (run / LOCK).unlink()
    (run / "checkpoints").mkdir()
    trainings.train([training], finished.append)  # the campaign was killed when the training had ended
    assert not (run / "checkpoints").exists()
    assert len(commands) == 4
    assert finished == [training] * 5


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
    trainings.train(SIX, lambda training: None)
    assert len(stub.started) == 6
    assert max(num_running) == 2
    assert {threads for _, threads in stub.started} == {max(1, torch.get_num_threads() // 2)}


def test_a_failure_stops_the_other_trainings(trainings, monkeypatch):
    slow, failing = Stub(60.0), Stub(0.0, status=2)
    monkeypatch.setattr(
        module, "start_process", lambda name, *rest: (slow if name.endswith("seed0") else failing)(name, *rest)
    )
    with pytest.raises(ValueError, match="the training lora-r2-lr0.01-seed[1-5] .*dora-mm: no such file"):
        trainings.train(SIX, lambda training: None)
    assert len(slow.started) == len(failing.started) == 1
    assert slow.started[0][0].returncode == -signal.SIGTERM


def test_a_training_that_diverged_is_a_result(trainings, monkeypatch):
    stub, finished = Stub(0.0, status=2), []

    def start(name, *rest):
        (trainings.folder / "runs" / name).mkdir(parents=True)
        (trainings.folder / "runs" / name / "diverged.txt").write_text("The loss is nan\n")
        return stub(name, *rest)

    monkeypatch.setattr(module, "start_process", start)
    trainings.train(SIX, finished.append)
    assert sorted(training.seed for training in finished) == list(range(6))
    assert trainings.has_diverged(SIX[0])
    assert trainings.summary(SIX[0]) == {}
    trainings.train(SIX, finished.append)  # they are not trained again
    assert len(stub.started) == 6
    assert len(finished) == 12


def test_an_interruption_reaches_the_trainings(trainings, monkeypatch):
    stub = Stub(60.0)
    monkeypatch.setattr(module, "start_process", stub)
    monkeypatch.setattr(subprocesses.time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trainings.train(SIX, lambda training: None)
    assert [process.returncode for process, _ in stub.started] == [-signal.SIGTERM] * 2


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
