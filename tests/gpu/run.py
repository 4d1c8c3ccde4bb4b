"""Runs commands of dora-mm on one side of a comparison: `python -m tests.gpu.run GPU|cpu COMMANDS.json RESULTS.json`.

COMMANDS.json is a list of lists of words. RESULTS.json receives, per command, its exit code, its error, what came back
from the GPU and how often, and the most bytes that it held. On the CPU, a bias is added behind the gain of a layer, as
on every accelerator: see `core/steps.py`.
"""

import contextlib
import io
import json
import os
import sys
import traceback
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
from tests.gpu import device, streams


def run(words: list[str]) -> dict:
    from accelerate.state import AcceleratorState

    from dora_mm.cli import main

    device.waits.clear()
    streams.memory.peak = streams.memory.now
    AcceleratorState._reset_state(reset_partial_state=True)  # as in a process of its own
    said, error = io.StringIO(), None
    try:
        with contextlib.redirect_stderr(said):
            code = main(words)
    except Exception:
        code, error = 1, traceback.format_exc()
    error = f"{' '.join(words)}: {error or said.getvalue()}" if code else None
    return {
        "code": code,
        "error": error,
        "waits": dict(device.waits.most_common()),
        "peak": streams.memory.peak,
        "said": said.getvalue(),
    }


if __name__ == "__main__":
    side, commands, results = sys.argv[1:]
    if side == "card":
        device.install()
    else:
        from dora_mm.core import steps

        steps.is_divisor = lambda gain: False
    Path(results).write_text(json.dumps([run(words) for words in json.loads(Path(commands).read_text())], indent=1))
