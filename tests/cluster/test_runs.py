"""The files of configs/cluster run here with two processes; one is killed, and the same command ends with the same bits."""

import signal
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from dora_mm.train.checkpoint import last_step
from tests.cluster.machines import free_port, kill_rank, kill_session, pod, pre_stop, sky, slurm
from tests.pipelines.images.test_sample import content, style  # noqa: F401
from tests.pipelines.processes import wait_for
from tests.shared.data.images_made import write_images

pytestmark = pytest.mark.slow
STEPS, EVERY, ROWS = 24, 4, 5
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


def weights_of(run: Path) -> dict[str, bytes]:
    """The bits of all weights; the header of their file names the run."""
    found = load_file(run / "checkpoints" / f"step-{STEPS:06d}" / "trained_weights.safetensors")
    return {name: weight.numpy().tobytes() for name, weight in found.items()}


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
def images(style, tmp_path):  # noqa: F811
    """The files of a job of images that one process has generated, by the task of SkyPilot on one GPU."""
    rows = [f"thing {number},1-4,{number % 3 / 2},2\n" for number in range(ROWS)]
    (tmp_path / "jobs.csv").write_text("prompt,seed,strength,steps\n" + "".join(rows))
    values = {"JOBS": tmp_path / "jobs.csv", "ADAPTER": style, "RUN_DIR": tmp_path / "sky"}
    with sky("skypilot/sample.yaml", values, 1, tmp_path / "sky.log") as task:
        assert task.wait(LIMIT) == 0, (tmp_path / "sky.log").read_text()
    found = content(tmp_path / "sky")
    assert len([name for name in found if name.endswith(".png")]) == 4 * ROWS + 1
    return found


def test_slurm_generates_the_images_of_one_process(images, style, tmp_path):  # noqa: F811
    given = [str(tmp_path / "jobs.csv"), str(tmp_path / "run"), f"adapter.path={style}"]
    with slurm("sample.sbatch", given, 2, 1, tmp_path / "log") as script:
        assert script.wait(LIMIT) == 0, (tmp_path / "log").read_text()
    assert content(tmp_path / "run") == images


def test_kubernetes_generates_the_images_of_one_process_also_after_the_end_of_a_pod(images, style, tmp_path):  # noqa: F811
    """The first pod waits for the batch of the second one, and ends when that is replaced; the Job starts both again."""
    values = {"JOBS": tmp_path / "jobs.csv", "ADAPTER": style, "RUN_DIR": tmp_path / "run", "NODES": 2, "GPUS": 1}
    values |= {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "HF_HOME": tmp_path}
    logs = [tmp_path / f"pod-{index}.log" for index in range(2)]

    def job_pod(index):
        return pod("kubernetes/sample.yaml", index, values, logs[index])

    with job_pod(0) as main_pod, job_pod(1) as other:
        wait_for(tmp_path / "run" / "samples", main_pod)
        kill_session(other)
        with job_pod(1) as replaced:
            assert [main_pod.wait(LIMIT), replaced.wait(LIMIT)] == [1, 1]
    assert "process 1 was started a second time" in logs[1].read_text()
    with job_pod(0) as main_pod, job_pod(1) as other:
        assert [main_pod.wait(LIMIT), other.wait(LIMIT)] == [0, 0], logs[0].read_text()
    assert content(tmp_path / "run") == images
