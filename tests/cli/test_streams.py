"""Work goes on, and ends with its own exit code, when nobody reads what it says any more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_terminal import pseudo_terminal

# A command that says much, then saves its work, and then fails if that is asked for
PROGRAM = """
import logging, sys, time, types
from pathlib import Path

from dora_mm.cli import main
from dora_mm.utils import progress
from dora_mm.utils.json_text import read_json

progress.BAR_AFTER = progress.BAR_REFRESH = progress.FIRST_LINE = progress.NEXT_LINE = 0.01
file, fails = Path(sys.argv[1]), sys.argv[2] == "True"

def run(arguments, recipes):
    with progress.Progress("work", 5, "things") as work:
        for number in range(5):
            print("x" * 20_000)
            logging.getLogger("dora_mm.work").info("y" * 2_000)
            time.sleep(0.02)
            work.advance()
            while not Path(sys.argv[3]).exists():
                time.sleep(0.02)
    with file.open("w", encoding="utf-8") as opened:
        opened.write(str(opened.fileno()))
    if fails:
        read_json(Path("missing"))

sys.modules["dora_mm.cli.commands"] = types.SimpleNamespace(run=run)
sys.exit(main(["configs"]))
"""


def without_reader() -> int:
    theirs, ours = os.pipe()
    os.close(theirs)
    return ours


def closed_terminal() -> int:
    ours, theirs = os.openpty()
    os.close(ours)
    return theirs


def program(file: Path, fails: bool, wait_for: str = "/") -> list[str]:
    return [sys.executable, "-c", PROGRAM, str(file), str(fails), wait_for]


def run(file: Path, redirections: str, fails: bool, **streams: int) -> tuple[int, str]:
    """The exit code, and what is on standard error.

    Args:
        file: Where the work is saved.
        redirections: As a shell has them.
        fails: Whether the command ends with a mistake.
        **streams: As `subprocess` has them.
    """
    command = ["sh", "-c", f'exec "$@" {redirections}', "sh", *program(file, fails)]
    ended = subprocess.run(
        command, **{"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, **streams}, check=False, timeout=60
    )
    return ended.returncode, (ended.stderr or b"").decode()


@pytest.mark.parametrize(("opened", "fails"), [(without_reader, False), (closed_terminal, True)])
def test_a_reader_that_has_gone(tmp_path, opened, fails):
    end = opened()
    code, errors = run(tmp_path / "work", "", fails, stdout=end)
    assert (code, "Traceback" in errors, (tmp_path / "work").exists()) == (2 if fails else 0, False, True)
    code, _ = run(tmp_path / "quiet", "", fails, stdout=end, stderr=end)
    assert (code, (tmp_path / "quiet").exists()) == (2 if fails else 0, True)
    os.close(end)


def test_a_terminal_that_closes_behind_a_progress_bar(tmp_path):
    ours, theirs = pseudo_terminal()
    closed = tmp_path / "closed"
    command, shown = program(tmp_path / "work", False, str(closed)), b""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    while b"/5 [" not in shown:
        shown += os.read(ours, 4096)
    os.close(ours)
    closed.touch()
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "work").exists()


def test_streams_that_are_closed_from_the_beginning(tmp_path):
    assert run(tmp_path / "work", ">&- 2>&-", False)[0] == 0
    code, errors = run(tmp_path / "quiet", "<&- >&-", True)
    assert (code, "Traceback" in errors) == (2, False)
    for name in ("work", "quiet"):  # no file of the work stands where a library looks for a stream
        assert int((tmp_path / name).read_text(encoding="utf-8")) > 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's always full device")
def test_a_full_disk_is_said_once_and_is_an_error_of_what_was_asked_for_alone(tmp_path):
    code, errors = run(tmp_path / "work", ">/dev/full", False)
    assert (code, "the disk is full" in errors, "Exception ignored" in errors) == (2, True, False)
    code, _ = run(tmp_path / "log", "2>/dev/full", False)
    assert (code, (tmp_path / "log").exists()) == (0, True)
