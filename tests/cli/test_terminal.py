"""What a command says on a terminal, and what on a pipe."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

from dora_mm.sampling.pictures import PictureProgress

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


def draw_pictures() -> None:
    with PictureProgress(40, "pictures") as progress:
        for _ in range(40):
            progress.advance(1)


def test_pictures_have_a_bar_on_a_terminal(monkeypatch, caplog):
    caplog.set_level("INFO")
    ours, theirs = pseudo_terminal()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        draw_pictures()
        monkeypatch.undo()
    assert "/40" in read_all(ours)
    assert not caplog.messages


def test_pictures_have_some_lines_on_a_pipe(monkeypatch, caplog):
    caplog.set_level("INFO")
    with os.fdopen(os.pipe()[1], "w") as pipe:
        monkeypatch.setattr(sys, "stderr", pipe)
        draw_pictures()
        monkeypatch.undo()
    assert caplog.messages == [f"pictures: {number} of 40 pictures" for number in range(2, 41, 2)]
