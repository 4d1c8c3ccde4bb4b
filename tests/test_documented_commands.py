"""The commands of README, of docs and of the heads of configs run, in order, as a new user would run them.

Models that are not here are tiny ones with random weights, data are made in the documented layout, and `--set` cuts
steps, sizes and rows (tests/documented). Nothing else differs from what the documents say.
"""

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dora_mm.cli import main
from dora_mm.config import load_config
from dora_mm.studies.campaigns import subprocesses
from tests.documented.checkout import Checkout
from tests.documented.cuts import cuts
from tests.documented.texts import DOCS, ROOT, commands, configs, head_commands, is_synopsis, text_of

FAMILIES = sorted({path.parent.name for path in configs()})


def run_all(found: list[list[str]], checkout: Checkout, capfd) -> None:
    """Runs commands in order, and fails at the first one that does."""
    for arguments in found:
        if not is_synopsis(arguments):
            code = checkout.run(arguments)
            output = capfd.readouterr()
            assert code == 0, f"dora-mm {shlex.join(arguments)}\n{output.out[-2000:]}\n{output.err[-2000:]}"


def in_this_process(command: list[str], **_: object) -> SimpleNamespace:
    """Runs a training of a comparison here, instead of in a process that first imports torch for some seconds."""
    assert command[1:3] == ["-m", "dora_mm"]
    code = main(command[3:])
    return SimpleNamespace(returncode=code, poll=lambda: code, wait=lambda: code, terminate=lambda: None)


@pytest.fixture
def checkout(tmp_path, monkeypatch, tiny_folder, tiny_vlm):
    """The folder of a new user, which is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocesses, "subprocess", SimpleNamespace(Popen=in_this_process, STDOUT=subprocess.STDOUT))
    return Checkout(tiny_folder, tiny_vlm)


def test_readme(checkout, capfd):
    run_all(commands(text_of(ROOT / "README.md")), checkout, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("document", [path for path in DOCS if commands(text_of(path))], ids=lambda path: path.stem)
def test_docs(document: Path, checkout, capfd):
    run_all(commands(text_of(document)), checkout, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_of_configs(family: str, checkout, capfd):
    heads = [text_of(path) for path in configs() if path.parent.name == family]
    elsewhere = [arguments for document in DOCS for arguments in commands(text_of(document))]
    found = [arguments for head in heads for arguments in head_commands(head)]
    run_all([arguments for arguments in found if arguments not in elsewhere], checkout, capfd)


@pytest.mark.slow
def test_commands_of_several_processes(checkout):
    """Those of torchrun, with one process on each of several machines, which are this one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    found = [given for given in commands(text_of(ROOT / "docs" / "gpu.md"), "torchrun ") if "--resume" not in given]
    groups = [[given] for given in found if "--nnodes" not in given] + [[g for g in found if "--nnodes" in g]]
    assert len(groups) == 6
    for group in groups:
        started = [
            subprocess.Popen(_launcher(given, port), env={**os.environ, "PYTHONPATH": str(ROOT)}) for given in group
        ]
        assert [process.wait(timeout=900) for process in started] == [0] * len(group), group


def _launcher(given: list[str], port: str) -> list[str]:
    given = [{"HOST": "localhost", "29500": port, "8": "1"}.get(argument, argument) for argument in given]
    start = [sys.executable, "-m", "torch.distributed.run", *([] if "--nnodes" in given else ["--master-port", port])]
    config, overrides = given[given.index("dora_mm") + 2], given[given.index("--set") + 1 :] if "--set" in given else []
    small = cuts(load_config(config, overrides), lambda path: False)
    return [*start, *given, "--set", *small]
