"""Times drawing with an adapter against plain diffusers, and the start of a job against a script of diffusers.

    python -m tests.benchmarks.bench_sampling [results/<machine>]

The embedded model with an adapter of rank 8 on its attention draws four pictures in a batch and saves them: without
adapter, as a job (merged), and in diffusers with the same file loaded through PEFT, fused and not. The contenders take
turns in one process. The start is the time of a process that loads the model and the adapter and saves one picture.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline

from dora_mm import DoRASpec, adapter_parameters, inject, save_adapter
from dora_mm.config.generation import ImageGenerationConfig
from dora_mm.config.models import ModelConfig
from dora_mm.models.images.families import load_image_model
from dora_mm.sampling.batch.requests import ImageRequest
from dora_mm.sampling.generating import adapted, generate_batch
from dora_mm.sampling.model import load_model
from tests.benchmarks.results_table import time_row, write_times
from tests.benchmarks.timing import alternate

MODEL = "samples/tiny-sdxl"
PROMPTS = ["a flat icon of a bus", "a flat icon of a rose", "a flat icon of a temple", "a flat icon of an alien"]
STEPS, GUIDANCE, SIDE = 20, 3.0, 128
ROUNDS, STARTS = 9, 5

SCRIPT = f"""
import sys
import torch
from diffusers import StableDiffusionXLPipeline

pipe = StableDiffusionXLPipeline.from_pretrained({MODEL!r}, add_watermarker=False)
pipe.load_lora_weights(sys.argv[1])
settings = dict(num_inference_steps={STEPS}, guidance_scale={GUIDANCE}, height={SIDE}, width={SIDE})
pipe({PROMPTS[0]!r}, generator=torch.Generator().manual_seed(0), **settings).images[0].save(sys.argv[2])
"""


def make_adapter(folder: Path) -> None:
    model = load_image_model(ModelConfig(path=MODEL))
    inject(model.unet, "sdxl-unet", DoRASpec(rank=8), parts=["attn", "cross"])
    for name, parameter in adapter_parameters(model.unet).items():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.02)
    save_adapter(model.unet, folder, metadata={"base_model": MODEL})


def pipeline(adapter: Path | None, *, fuse: bool = False) -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(MODEL, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipe.load_lora_weights(str(adapter))
    if fuse:
        pipe.fuse_lora()
    return pipe


def draw_plainly(pipe: StableDiffusionXLPipeline, folder: Path) -> float:
    started = time.perf_counter()
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "height": SIDE, "width": SIDE}
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    for number, image in enumerate(pipe(PROMPTS, generator=generators, **settings).images):
        image.save(folder / f"{number}.png")
    return (time.perf_counter() - started) / len(PROMPTS)


def time_drawing(adapter: Path, folder: Path) -> dict[str, list[float]]:
    """Seconds per picture."""
    loaded = load_model(ImageGenerationConfig(pipeline="sample", name="bench"), [str(adapter)])
    images = [
        ImageRequest(number, prompt, None, number, STEPS, GUIDANCE, None, None, None, ((str(adapter), 1.0),), 1.0)
        for number, prompt in enumerate(PROMPTS)
    ]
    job = loaded.plan(folder, images, len(images))

    def draw_job() -> float:
        started = time.perf_counter()
        job.done.clear()
        loaded.sampler.forget_prompts()
        generate_batch(job, job.batches[0], loaded.sampler)
        return (time.perf_counter() - started) / len(PROMPTS)

    pipes = {
        "diffusers, no adapter": pipeline(None),
        "diffusers, adapter through PEFT": pipeline(adapter),
        "diffusers, adapter fused": pipeline(adapter, fuse=True),
    }
    runs = {name: lambda pipe=pipe: draw_plainly(pipe, folder) for name, pipe in pipes.items()}
    with ExitStack() as stack:
        networks = list(loaded.model.adaptable.values())
        stack.enter_context(adapted(networks, ((str(adapter), 1.0),), loaded.load_adapter))
        return alternate({**runs, "dora-mm sample": draw_job}, ROUNDS, lambda: None)


def time_starts(adapter: Path, folder: Path) -> dict[str, list[float]]:
    """Seconds of a process that draws one picture."""
    script, jobs = folder / "script.py", folder / "jobs.jsonl"
    script.write_text(SCRIPT)
    jobs.write_text(json.dumps({"prompt": PROMPTS[0], "adapter": str(adapter)}))
    command = [sys.executable, "-m", "dora_mm", "sample", str(jobs), "--set", "contact_sheet=false", f"steps={STEPS}"]

    def run(*arguments: str) -> float:
        started = time.perf_counter()
        subprocess.run(arguments, check=True, capture_output=True)
        return time.perf_counter() - started

    numbers = iter(range(100))
    runs = {
        "start: script of diffusers": lambda: run(sys.executable, str(script), str(adapter), str(folder / "a.png")),
        "start: dora-mm sample": lambda: run(*command, f"output={folder / f'run{next(numbers)}'}"),
    }
    return alternate(runs, STARTS, lambda: None)


def main(results: Path | None) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_adapter(folder / "adapter")
        drawing = time_drawing(folder / "adapter", folder)
        starts = time_starts(folder / "adapter", folder)
    rows = []
    for times in (drawing, starts):
        reference = next(iter(times))
        for contender, seconds in times.items():
            ratios = [one / other for one, other in zip(seconds, times[reference], strict=True)]
            rows.append(time_row(contender, seconds) | {"ratio": round(statistics.median(ratios), 3)})
            print("{name:<34} {median_s:8.3f} s  ({min_s:.3f} to {max_s:.3f})  {ratio:.3f}".format(**rows[-1]))
    if results is not None:
        write_times(results, "sampling", rows, "diffusers", "peft")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
