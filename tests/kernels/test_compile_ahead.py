"""The kernels compile for GPUs that are not in this machine, spill nothing, and fit into their shared memory."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", minversion="3.4")  # earlier versions call the compiler differently


def test_no_kernel_spills_or_needs_more_than_there_is():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.kernels.compile_ahead"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name.split()[0] for name in found} == {"sm_80", "sm_89", "sm_90"}
    assert len(found) == 63
    assert {name: usage for name, usage in found.items() if usage["stack"]} == {}
    assert {name: usage for name, usage in found.items() if usage["shared_left"] < 0} == {}
