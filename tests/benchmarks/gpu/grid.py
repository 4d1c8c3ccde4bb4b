"""The first trainings of the full grid of configs/sdxl/tuned.yaml: an entry of `make gpu`."""

import os
import signal
import tempfile
import threading
from pathlib import Path

from dora_mm import cli
from tests.benchmarks.gpu import ROOT
from tests.benchmarks.gpu.run import Run

CONFIG = ROOT / "configs" / "sdxl" / "tuned.yaml"
FIRST = ["ranks=[1]", "seeds=[0, 1]", "variants=[]", "extra_rates=0", "workers=4"]  # five rates, the best ones twice
TINY = ["steps=21", "learning_rates.lora=[0.001, 0.01, 0.1]", "learning_rates.dora=[0.001, 0.01, 0.1]", "workers=1"]
TINY += ["images.tune.count=3", "images.report.count=3", "images.sampling.steps=1"]


def run(run: Run) -> None:
    """Saves a row of each training when it is finished; when its time is over, it stops the others."""
    rows = run.folder / f"{run.name}.csv"
    rows.unlink(missing_ok=True)  # else the grid would go on from them
    timer = threading.Timer(run.seconds_left(), os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            given = [*FIRST, *(TINY if run.dry else []), f"rows={rows.resolve()}", f"output={Path(folder) / 'grid'}"]
            code = cli.main(["compare", str(CONFIG), "--set", *given])
    finally:
        timer.cancel()
    if code == cli.TERMINATED:
        run.leave_out("the other trainings: the time of this entry is over")
    elif code:
        run.fail(f"dora-mm compare ended with code {code}")
