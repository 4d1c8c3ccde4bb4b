"""Times training steps of SDXL here against diffusers' advanced DreamBooth script, and what they take of main memory.

    python -m tests.benchmarks.bench_sdxl_trainer SCRIPT [--repeats 3] [--steps 30] [--output results/<machine>]

SCRIPT is `train_dreambooth_lora_sdxl_advanced.py` of a checkout of diffusers, which no package has. Both train the
embedded model on the same 20 pictures with one caption, with the same rank, batch, rate and optimizer in fp32. Each
training is a process of its own with one thread, in turn; a step is the processor time from one step of the optimizer
to the next, without the first ones.
"""

import argparse
import atexit
import json
import os
import resource
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.results_table import write_times

SAMPLES = Path(__file__).parents[2] / "samples"
CAPTION = "a TOK icon, in the style of TOK"
NUM_IMAGES, BATCH, RANK, RESOLUTION, RATE = 20, 4, 8, 128, 1e-3  # whole batches, since the script keeps smaller ones
WARM = 5  # steps that are not counted
VARIANTS = {  # arguments of the script and of dora-mm
    "LoRA": ([], ["adapter.method=lora"]),
    "DoRA": (["--use_dora"], []),
    "DoRA, two new tokens": (
        ["--use_dora", "--train_text_encoder_ti", "--train_text_encoder_ti_frac", "1.0"],
        ["tokens={TOK: {count: 2}}"],
    ),
}
CONFIG = f"""
pipeline: train_diffusion
seed: 0
model: {{path: {SAMPLES}/tiny-sdxl}}
adapter: {{rank: {RANK}, parts: [unet.attn, unet.cross]}}
data: {{folder: pictures, resolution: {RESOLUTION}, instance_prompt: "{CAPTION}"}}
optimizer: {{name: adamw, lr: {RATE}}}
train: {{steps: STEPS, batch_size: {BATCH}}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "xeon_2_cores")
    given = parser.parse_args()
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = folder / "pictures"
        images.mkdir()
        for image in sorted((SAMPLES / "3d_icon").glob("*.webp"))[:NUM_IMAGES]:
            shutil.copy(image, images)
        for _ in range(given.repeats):
            for variant, (theirs, ours) in VARIANTS.items():
                for trainer, arguments in (
                    ("diffusers' script", [str(given.script.resolve()), *script_arguments(given.steps), *theirs]),
                    ("dora-mm", ["dora_mm", *own_arguments(folder, given.steps), *ours]),
                ):
                    measured = run(arguments, folder)
                    print(variant, trainer, measured, f"load {os.getloadavg()[0]:.1f}", flush=True)
                    found.setdefault((variant, trainer), []).append(measured)
    rows = [row(variant, trainer, runs) for (variant, trainer), runs in found.items()]
    write_times(given.output, "sdxl_trainer", rows, "diffusers", "peft", "transformers", "accelerate")


def script_arguments(steps: int) -> list[str]:
    """The folder of the run is relative, since the script puts its name into one of a file."""
    settings = {
        "pretrained_model_name_or_path": SAMPLES / "tiny-sdxl",
        "instance_data_dir": "pictures",
        "instance_prompt": CAPTION,
        "output_dir": "run",
        "resolution": RESOLUTION,
        "train_batch_size": BATCH,
        "max_train_steps": steps,
        "rank": RANK,
        "learning_rate": RATE,
        "text_encoder_lr": RATE,
        "lr_scheduler": "constant",
        "dataloader_num_workers": 0,
        "seed": 0,
    }
    return [*(f"--{name}={value}" for name, value in settings.items()), "--cache_latents"]


def own_arguments(folder: Path, steps: int) -> list[str]:
    config = folder / "config.yaml"
    config.write_text(CONFIG.replace("STEPS", str(steps)))
    return ["train", config.name, "--set", "output=run"]


def run(arguments: Sequence[str], folder: Path) -> dict[str, float]:
    """What a training in a process of its own takes: processor seconds of a step, of it all, and memory."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    report = folder / "report.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(SAMPLES.parent)}
    command = [sys.executable, "-c", f"from {__spec__.name} import watch; watch()", str(report), *arguments]
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    return json.loads(report.read_text())


def watch() -> None:
    """Runs a script or a module, whose arguments follow, and writes what its steps and the process took."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    report, program, *arguments = sys.argv[1:]
    ends: list[float] = []
    register_optimizer_step_post_hook(lambda *given: ends.append(time.process_time()))
    atexit.register(lambda: Path(report).write_text(json.dumps(summary(ends))))
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def summary(ends: Sequence[float]) -> dict[str, float]:
    """The median time between two steps, the whole, and the peak of memory."""
    steps = [later - sooner for sooner, later in zip(ends[WARM:], ends[WARM + 1 :], strict=False)]
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"step": statistics.median(steps), "whole": time.process_time(), "gigabytes": gigabytes, "steps": len(ends)}


def row(variant: str, trainer: str, runs: Sequence[dict[str, float]]) -> dict[str, object]:
    """A row of medians over the trainings."""
    steps = [run["step"] for run in runs]
    figures = {
        "seconds_a_step": statistics.median(steps),
        "least": min(steps),
        "largest": max(steps),
        "whole": statistics.median(run["whole"] for run in runs),
        "gigabytes": statistics.median(run["gigabytes"] for run in runs),
    }
    rounded = {name: round(value, 3) for name, value in figures.items()}
    return {"variant": variant, "trainer": trainer, **rounded, "steps": int(runs[0]["steps"]), "runs": len(runs)}


if __name__ == "__main__":
    main()
