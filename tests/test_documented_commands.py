"""The commands of README, of docs and of the heads of configs run, in order, as a new user would run them.

Models that are not here are tiny ones with random weights, data are made in the documented layout, and `--set` cuts
steps, sizes and rows (tests/documented). Nothing else differs from what the documents say.
"""

import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from dora_mm.cli import main
from dora_mm.train.campaigns import subprocesses
from tests.documented.checkout import Checkout
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
