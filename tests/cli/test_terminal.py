"""What a command says on a terminal, and what on a pipe."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

# Nothing can import torch: what is said before that is said at once
REFUSED = "import sys\nsys.modules['torch'] = None\nfrom dora_mm.cli import main\nsys.exit(main(['grid', 'no.yaml']))"
DRAWN = """
import logging
logging.basicConfig(level=logging.INFO, format="%(message)s")
from dora_mm.sampling.pictures import PictureProgress
with PictureProgress(40, "pictures") as progress:
    for _ in range(40):
        progress.advance(1)
"""


def on_terminal(code: str) -> str:
    """What a process writes to a terminal, its standard error."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, stdout=theirs)
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        written += part
    process.wait()
    os.close(ours)
    return written.decode()


def on_pipe(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr


def test_the_first_word_on_a_terminal_comes_before_torch():
    first, *others = on_terminal(REFUSED).splitlines()
    assert first == "dora-mm grid: starting ..."
    assert others[0].startswith("dora-mm: no.yaml does not exist")
    assert on_pipe(REFUSED).startswith("dora-mm: no.yaml does not exist")


@pytest.mark.parametrize("write", [on_terminal, on_pipe])
def test_pictures_have_a_bar_or_some_lines(write):
    shown = write(DRAWN)
    if write is on_pipe:
        assert shown.splitlines() == [f"pictures: {number} of 40 pictures" for number in range(2, 41, 2)]
    else:
        assert "/40" in shown
        assert "of 40 pictures" not in shown
