"""Commands that write are killed at file events, and repeated: in a process with one thread."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_kills():
    command = [sys.executable, "-m", "tests.kill", "--kills", "20"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 disturbances from seed 0, 0 with other files" in done.stdout
