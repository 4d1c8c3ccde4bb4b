"""Slurm, Kubernetes and SkyPilot as far as the files of configs/cluster see them: their commands and variables.

The scripts and commands of the files run untouched. Every node is this machine.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[3]
FILES = ROOT / "configs" / "cluster"
SRUN = """\
#!/bin/bash
# The command once for each node; with --kill-on-bad-exit all end with the first that fails. SIGTERM goes to all.
[[ $1 == --kill-on-bad-exit=1 ]] || exit 99
shift
echo $$ > "$STUBS/srun.pid"
trap 'kill $(jobs -p)' TERM
for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" & done
code=0
for ((node = 0; node < SLURM_NNODES; node++)); do
  wait -n || { code=$?; kill $(jobs -p) 2>/dev/null; }
done
exit $code
"""
SCONTROL = """\
#!/bin/bash
# The hosts of a list; a job that goes back to the queue gets SIGTERM first.
case "$1 $2" in
  "show hostnames") for ((node = 0; node < SLURM_NNODES; node++)); do echo localhost; done ;;
  "requeue $SLURM_JOB_ID") echo "$2" >> "$STUBS/requeued"; kill "$(cat "$STUBS/srun.pid")" ;;
  *) exit 99 ;;
esac
"""


def free_port() -> int:
    """A free port, of those that the sbatch files make of the numbers of jobs."""
    for port in range(20_000 + os.getpid() % 10_000, 40_000):
        with socket.socket() as free, suppress(OSError):
            free.bind(("localhost", port))
            return port
    raise OSError("no port is free")


def environment(**variables: object) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return {**own, "OMP_NUM_THREADS": "1", **paths, **{name: str(value) for name, value in variables.items()}}


@contextmanager
def started(command: list[str], log: Path, **variables: object) -> Iterator[subprocess.Popen]:
    """A command in a session of its own, of which nothing is left at the end of the context."""
    with log.open("a") as file:
        process = subprocess.Popen(
            command, cwd=log.parent, env=environment(**variables), stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield process
    finally:
        kill_session(process)


def kill_session(process: subprocess.Popen) -> None:
    """Kills everything that a command has started, as the end of a machine or container does."""
    with suppress(psutil.NoSuchProcess):
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def worker(process: subprocess.Popen, rank: int) -> psutil.Process:
    """One of the processes that torchrun has started."""
    started = psutil.Process(process.pid).children(recursive=True)
    return next(each for each in started if each.environ().get("RANK") == str(rank))


def slurm(file: str, arguments: list[str], nodes: int, gpus: int, log: Path) -> Any:
    """A context in which Slurm runs a batch script."""
    stubs = log.parent / "stubs"
    stubs.mkdir(exist_ok=True)
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    variables = {"STUBS": stubs, "PATH": f"{stubs}:{environment()['PATH']}"}
    variables |= {"SLURM_JOB_ID": free_port() - 20_000, "SLURM_JOB_NODELIST": "node[0-1]"}
    variables |= {"SLURM_NNODES": nodes, "SLURM_GPUS_ON_NODE": gpus}
    return started(["bash", str(FILES / file), *arguments], log, **variables)


def container(file: str) -> dict[str, Any]:
    """The container of a Kubernetes file's job."""
    (job,) = (each for each in documents(file) if each["kind"] == "Job")
    (found,) = job["spec"]["template"]["spec"]["containers"]
    return found


def documents(file: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FILES / file).read_text()))


def pod(file: str, index: int, values: Mapping[str, object], log: Path) -> Any:
    """A context in which the container of a job's pod runs, with other values of some variables."""
    found = container(file)
    variables = {each["name"]: each["value"] for each in found["env"]}
    assert set(values) <= set(variables)
    return started(found["command"] + found["args"], log, **{**variables, **values, "JOB_COMPLETION_INDEX": index})


def pre_stop(file: str, values: Mapping[str, object]) -> int:
    """Runs what a pod does before its end; returns the exit code."""
    command = container(file)["lifecycle"]["preStop"]["exec"]["command"]
    return subprocess.run(command, env=environment(**values), timeout=100, check=False).returncode


def sky(file: str, values: Mapping[str, object], gpus: int, log: Path) -> Any:
    """A context in which SkyPilot runs a task on one machine, which its `setup` has prepared."""
    (task,) = documents(file)
    assert set(values) <= set(task["envs"])
    home = log.parent / "home"
    home.mkdir(exist_ok=True)
    if not (home / "dora_mm").exists():
        (home / "dora_mm").symlink_to(sys.prefix)
    variables = {"SKYPILOT_NUM_NODES": 1, "SKYPILOT_NODE_RANK": 0, "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2"}
    variables |= {"SKYPILOT_NUM_GPUS_PER_NODE": gpus, "HOME": home, **task["envs"], **values}
    return started(["bash", "-c", task["run"]], log, **variables)
