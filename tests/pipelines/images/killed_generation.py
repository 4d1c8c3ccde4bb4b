"""Runs a batch generation whole; and again in forked processes that are killed, each at another point, then to its end.

python -m tests.pipelines.images.killed_generation NUMBERS JOBS ARGUMENT...    NUMBERS of POINTS: 0,2,5
"""

import os
import signal
import sys
from pathlib import Path

from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image

from dora_mm.cli import main
from dora_mm.recipes import PIPELINES
from dora_mm.utils import atomic

# what is interrupted, and at which of its calls in that process
POINTS = (
    (StableDiffusionXLPipeline, "from_pretrained", 1),  # while loading
    (atomic.os, "replace", 2),  # while the run directory is made
    (UNet2DConditionModel, "forward", 1),
    (UNet2DConditionModel, "forward", 4),  # in the middle of a batch
    (Image.Image, "save", 1),  # in the middle of writing an image
    (Image.Image, "save", 6),
    (atomic.os, "replace", 9),  # an image is written, and has not got its name
    (UNet2DConditionModel, "forward", 3),
    (Image.Image, "save", 7),
    (Image.Image, "save", "sheet"),
)


def kill_at(owner, name, call):
    """Makes a function kill the process, at a call of this number or for a file of this name."""
    original, calls = getattr(owner, name), []

    def killing(*args, **options):
        calls.append(args)
        is_file = name == "save"
        if (len(calls) == call) if isinstance(call, int) else call in str(args[1]):
            if is_file:
                Path(args[1]).write_bytes(b"\x89PNG half")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    setattr(owner, name, staticmethod(killing) if name == "from_pretrained" else killing)


def run(arguments, point):
    """Runs the command in a forked process; returns its status."""
    process = os.fork()
    if process == 0:
        if point is not None:
            kill_at(*point)
        os._exit(main(arguments))
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


if __name__ == "__main__":
    PIPELINES.load("sample")  # once, for all processes
    points = [POINTS[int(number)] for number in sys.argv[1].split(",")]
    whole, killed = (["sample", *sys.argv[2:], f"output={name}"] for name in ("whole", "killed"))
    print([run(whole, None), *(run(killed, point) for point in [*points, None])])
