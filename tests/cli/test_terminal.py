"""What a command says on a terminal, and what on a pipe."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import time

from dora_mm.utils import progress
from dora_mm.utils.progress import Progress

# Nothing can import torch: what is said before that is said at once
REFUSED = "import sys\nsys.modules['torch'] = None\nfrom dora_mm.cli import main\nsys.exit(main(['grid', 'no.yaml']))"


def pseudo_terminal() -> tuple[int, int]:
    """Both ends of a terminal of 24 lines of 100 characters: what it shows, and what is written to."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    return ours, theirs


def read_all(ours: int) -> str:
    """What was written to a terminal whose other end is closed."""
    written = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    return written.decode()


def on_terminal(code: str) -> str:
    """What a process writes to a terminal."""
    ours, theirs = pseudo_terminal()
    process = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, stdout=theirs)
    os.close(theirs)
    shown = read_all(ours)
    process.wait()
    return shown


def on_pipe(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr


def test_the_first_word_on_a_terminal_comes_before_torch():
    first, *others = on_terminal(REFUSED).splitlines()
    assert first == "dora-mm grid: starting ..."
    assert others[0].startswith("dora-mm: no.yaml does not exist")
    assert on_pipe(REFUSED).startswith("dora-mm: no.yaml does not exist")


def test_work_has_a_bar_on_a_terminal(monkeypatch, caplog):
    caplog.set_level("INFO", logger="dora_mm")
    monkeypatch.setattr(progress, "BAR_AFTER", 0.05)
    monkeypatch.setattr(progress, "BAR_REFRESH", 0.05)
    ours, theirs = pseudo_terminal()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with Progress("loading a model"):
            time.sleep(0.1)
        with Progress("sampling", 40, "images", keep=True) as drawing:
            drawing.note = "loss 0.5"
            with drawing.part(10) as on_step:
                on_step(0.55)
                time.sleep(0.2)
            drawing.advance(30)
            drawing.report()  # is for pipes
        monkeypatch.undo()
    shown = read_all(ours)
    assert "loading a model [00:0" in shown
    assert "sampling:  14%|" in shown
    assert "| 6/40 [00:0" in shown
    assert "loss 0.5" in shown
    assert shown.rstrip("\r\n").rpartition("\r")[2].startswith("sampling: 100%|")
    assert not caplog.messages
