"""The files of configs/cluster run here with two processes; one is killed, and the same command ends with the same bits."""

import signal
from pathlib import Path

import pytest
import yaml

from dora_mm.cli import main
from dora_mm.train.checkpoint import last_step
from tests.cluster.machines import free_port, kill_rank, kill_session, pod, pre_stop, sky, slurm
from tests.pipelines.images.test_sample import content, style  # noqa: F401
from tests.pipelines.processes import wait_for
from tests.shared.data.images_made import write_images

pytestmark = pytest.mark.slow
STEPS, EVERY = 24, 4
LIMIT = 300  # seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_folder):
    """A config of two processes."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "pictures").mkdir()
    write_images(folder / "pictures")
    config = {
        "pipeline": "train_diffusion",
        "model": {"path": str(tiny_folder)},
        "adapter": {"rank": 2, "parts": ["unet.attn"]},
        "data": {"folder": str(folder / "pictures"), "resolution": 64, "caption_dropout": 0.2},
        "optimizer": {"lr": 0.01},
        "train": {"steps": STEPS, "batch_size": 1, "checkpoint_every": EVERY, "keep_checkpoints": 99},
    }
    (folder / "style.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def weights(folder):
    """The weights of a run that nothing interrupts, by the task of SkyPilot."""
    values = {"CONFIG": folder / "style.yaml", "RUN_DIR": folder / "runs" / "sky"}
    with sky("skypilot/train.yaml", values, 2, folder / "sky.log") as task:
        assert task.wait(LIMIT) == 0, (folder / "sky.log").read_text()
    return weights_of(folder / "runs" / "sky")


def weights_of(run: Path) -> bytes:
    return (run / "checkpoints" / f"step-{STEPS:06d}" / "trained_weights.safetensors").read_bytes()


def test_slurm_resumes_after_a_kill_and_at_the_time_limit(folder, weights):
    run, log = folder / "runs" / "slurm", folder / "slurm.log"

    def job(nodes, gpus):
        return slurm("train.sbatch", [str(folder / "style.yaml"), str(run), "train.log_every=1"], nodes, gpus, log)

    with job(nodes=2, gpus=1) as script:
        wait_for(run / "checkpoints" / f"step-{EVERY:06d}", script)
        kill_rank(script, 1)
        assert script.wait(LIMIT) != 0
    killed_at = last_step(run / "checkpoints")
    assert EVERY <= killed_at < STEPS, log.read_text()

    with job(nodes=2, gpus=1) as script:
        wait_for(run / "checkpoints" / f"step-{killed_at + EVERY:06d}", script)
        script.send_signal(signal.SIGUSR1)
        assert script.wait(LIMIT) != 0
    assert len((folder / "stubs" / "requeued").read_text().splitlines()) == 1
    assert not (run / "save-now").exists()
    assert killed_at < last_step(run / "checkpoints") < STEPS, log.read_text()

    with job(nodes=1, gpus=2) as script:
        assert script.wait(LIMIT) == 0, log.read_text()
    assert weights_of(run) == weights


def test_kubernetes_resumes_after_the_end_of_a_pod(folder, weights):
    run, logs = folder / "runs" / "pods", [folder / f"pod-{index}.log" for index in range(2)]
    values = {"CONFIG": folder / "style.yaml", "RUN_DIR": run, "GPUS": 1, "MASTER_ADDR": "localhost"}
    values |= {"MASTER_PORT": free_port(), "HF_HOME": folder}
    first, second = (pod("kubernetes/train.yaml", index, values, logs[index]) for index in range(2))
    with first as main_pod, second as other:
        wait_for(run / "checkpoints" / f"step-{EVERY:06d}", main_pod)
        assert pre_stop("kubernetes/train.yaml", {"RUN_DIR": run}) == 0
        assert not (run / "save-now").exists()
        saved = last_step(run / "checkpoints")
        kill_session(other)
        assert main_pod.wait(LIMIT) != 0
    assert EVERY < saved <= last_step(run / "checkpoints") < STEPS, logs[0].read_text()

    first, second = (pod("kubernetes/train.yaml", index, values, logs[index]) for index in range(2))
    with first as main_pod, second as other:
        assert [main_pod.wait(LIMIT), other.wait(LIMIT)] == [0, 0], logs[0].read_text()
    assert weights_of(run) == weights


@pytest.fixture
def images(style, tmp_path, monkeypatch):  # noqa: F811
    """The files of a job of images that one process has generated."""
    rows = [f"thing {number},1-4,{number % 3 / 2}\n" for number in range(10)]
    (tmp_path / "jobs.csv").write_text("prompt,seed,strength\n" + "".join(rows))
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "jobs.csv", "--set", "output=one", f"adapter.path={style}"]) == 0
    return content(tmp_path / "one")


def test_images_of_two_processes_are_those_of_one(images, style, tmp_path):  # noqa: F811
    """Of each file; and of pods, one of which ends before its batch and is replaced."""
    jobs, log = tmp_path / "jobs.csv", tmp_path / "log"
    with slurm("sample.sbatch", [str(jobs), "slurm", f"adapter.path={style}"], 2, 1, log) as script:
        assert script.wait(LIMIT) == 0, log.read_text()
    assert content(tmp_path / "slurm") == images
    values = {"JOBS": jobs, "ADAPTER": style, "RUN_DIR": tmp_path / "sky"}
    with sky("skypilot/sample.yaml", values, 2, log) as task:
        assert task.wait(LIMIT) == 0, log.read_text()
    assert content(tmp_path / "sky") == images

    run = tmp_path / "pods"
    values = {**values, "RUN_DIR": run, "NODES": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}

    def pods():
        return (pod("kubernetes/sample.yaml", index, values, tmp_path / f"pod-{index}.log") for index in range(2))

    first, second = pods()
    with first as main_pod, second as other:
        wait_for(run / "samples", main_pod)
        kill_session(other)
        with next(each for index, each in enumerate(pods()) if index == 1) as replaced:
            assert [main_pod.wait(LIMIT), replaced.wait(LIMIT)] == [1, 1]
    assert 0 < len(list((run / "samples").glob("*.png"))) < 40
    first, second = pods()
    with first as main_pod, second as other:
        assert [main_pod.wait(LIMIT), other.wait(LIMIT)] == [0, 0], (tmp_path / "pod-0.log").read_text()
    assert content(run) == images
