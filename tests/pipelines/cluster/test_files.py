"""The files of configs/cluster: each is read by the tool that it is for, and states what it needs once."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dora_mm.config import load_config
from tests.documented.texts import text_of
from tests.pipelines.cluster.machines import FILES, container, documents

SCRIPTS = sorted(FILES.glob("*.sbatch"))
KUBERNETES = sorted(path.relative_to(FILES).as_posix() for path in FILES.glob("kubernetes/*.yaml"))
SKYPILOT = sorted(path.relative_to(FILES).as_posix() for path in FILES.glob("skypilot/*.yaml"))
ALL = [path.name for path in SCRIPTS] + KUBERNETES + SKYPILOT


def tool(name: str) -> str:
    """A program of the environment or of the system."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    return found or pytest.skip(f"{name} is not installed")


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def shell_of(name: str) -> str:
    """The shell commands of a file of Slurm, Kubernetes or SkyPilot."""
    if name in KUBERNETES:
        return "".join(container(name)["args"])
    return documents(name)[0]["run"] if name in SKYPILOT else text_of(FILES / name)


def launched(name: str) -> list[str]:
    """The arguments of dora-mm in a file, with its variables as text."""
    (command,) = re.findall(r"-m dora_mm (.*?) *&?$", shell_of(name), re.MULTILINE)
    return shlex.split(command)


def test_there_is_a_file_for_training_and_one_for_images():
    assert [path.stem for path in SCRIPTS] == ["sample", "train"]
    assert [Path(name).stem for name in KUBERNETES] == [Path(name).stem for name in SKYPILOT] == ["sample", "train"]


@pytest.mark.parametrize("name", ALL)
def test_the_command_is_one_of_ours_and_the_same_after_an_interruption(name):
    """With the values that the file leaves to a person replaced by ones that there are."""
    command, job, *others = [argument for argument in launched(name) if argument != "$@"]
    assert command == Path(name).stem
    assert (others[:2] == ["--resume", "auto"]) == (command == "train")
    values = {"train": "configs/sdxl/tiny_3d_icon.yaml", "sample": "configs/sdxl/jobs.yaml"}
    settings = others[others.index("--set") + 1 :]
    assert job.startswith("$")
    assert settings[0].startswith("output=$")
    load_config(values[command], settings + ["prompts=[a]"] * (command == "sample"))


@pytest.mark.parametrize("name", KUBERNETES)
def test_the_pods_of_a_job_find_each_other(name):
    """The service, the names and the numbers in several places of a file agree."""
    service, job = documents(name)
    pods, found = job["spec"]["template"]["spec"], container(name)
    variables = {each["name"]: each["value"] for each in found["env"]}
    title = job["metadata"]["name"]
    assert service["metadata"]["name"] == pods["subdomain"] == title
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": title}
    assert variables["MASTER_ADDR"] == f"{title}-0.{title}"
    assert str(job["spec"]["completions"]) == str(job["spec"]["parallelism"]) == variables["NODES"]
    assert found["resources"]["limits"]["nvidia.com/gpu"] == variables["GPUS"]
    user = re.search(r"^USER (\d+):(\d+)$", text_of(FILES / "Dockerfile"), re.MULTILINE)
    assert user is not None
    assert [pods["securityContext"][key] for key in ("runAsUser", "runAsGroup")] == [
        int(part) for part in user.groups()
    ]


@pytest.mark.parametrize("name", ALL)
def test_the_shell_commands_have_no_known_mistakes(name, tmp_path):
    (tmp_path / "script").write_text(shell_of(name))
    run("bash", "-n", str(tmp_path / "script"))
    run(tool("shellcheck"), "--shell", "bash", str(tmp_path / "script"))


@pytest.mark.parametrize("name", KUBERNETES)
def test_kubernetes_reads_its_files(name):
    checker = pytest.importorskip(
        "kubernetes_validate", reason="its schemas are large: pip install kubernetes-validate"
    )
    for document in documents(name):
        checker.validate(document, "1.33", strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", SKYPILOT)
def test_skypilot_reads_its_files(name, monkeypatch, tmp_path):
    """`python3 -m venv V && V/bin/pip install skypilot`, and SKYPILOT_PYTHON=V/bin/python."""
    python = os.environ.get("SKYPILOT_PYTHON") or pytest.skip("SKYPILOT_PYTHON names no Python with skypilot")
    monkeypatch.setenv("HOME", str(tmp_path))
    code = (
        f"import sky; task = sky.Task.from_yaml({str(FILES / name)!r}); assert task.storage_mounts; sky.Dag().add(task)"
    )
    run(python, "-c", code)
