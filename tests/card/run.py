"""Runs commands of dora-mm on the card of nothing: `python -m tests.card.run COMMANDS.json WAITS.json`.

COMMANDS.json is a list of lists of words. WAITS.json receives, per command, what came back from the card, and how often.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
from tests.card import device


def run(words: list[str]) -> dict:
    from accelerate.state import AcceleratorState

    from dora_mm.cli import main

    device.waits.clear()
    AcceleratorState._reset_state(reset_partial_state=True)  # as in a process of its own
    start = time.perf_counter()
    try:
        code = main(words)
    except Exception:
        traceback.print_exc()
        code = 1
    return {"code": code, "waits": dict(device.waits.most_common()), "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    commands, results = map(Path, sys.argv[1:])
    device.install()
    results.write_text(json.dumps([run(words) for words in json.loads(commands.read_text())], indent=1))
