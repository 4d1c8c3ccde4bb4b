import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import tests.rehearsal as about
from tests.rehearsal import models, stages
from tests.rehearsal.measuring import Measured
from tests.rehearsal.report import folder_name, machine, record, save
from tests.rehearsal.stages import ROOT, Stage, prepare, run_stage
from tests.shared.images import tiny_flux2_klein, tiny_krea2, tiny_qwen_image, tiny_z_image
from tests.shared.vl import tiny_vlm

SPARE = 4.0  # GB of the disk that stay free
SHORT = ("train.steps=2", "train.checkpoint_every=1", "train.gradient_accumulation_steps=1")
ON_GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Model:
    """A model that is rehearsed.

    Attributes:
        title: What it is.
        gigabytes: Its size on disk.
        build: Writes it to a folder.
        tiny: Writes a small one of the same kind; None: there is none.
        stages: The commands, by a size of images in pixels.
        side: That size on a CPU; a GPU takes 1,024.
        settings: What is said of the training in the page.
    """

    title: str
    gigabytes: float
    build: Callable[[Path], object]
    tiny: Callable[[Path], object] | None
    stages: Callable[[int], list[Stage]]
    side: int
    settings: str


def tiny_sdxl(folder: Path) -> None:
    from dora_mm.models.images.sdxl.random_weights import build_tiny_sdxl
    from tests.conftest import SIZES

    build_tiny_sdxl(**SIZES).pipeline().save_pretrained(folder)


def images(
    family: str, model: str, *settings: str, further: Mapping[str, Sequence[str]] | None = None
) -> Callable[[int], list[Stage]]:
    """The commands of an image model by the size of images."""
    given = (*SHORT, "sample.prompts=[]", *settings)
    return lambda side: stages.of_images(family, model, [f"data.resolution={side}", *given], further or {})


def questions(*settings: str) -> Callable[[int], list[Stage]]:
    """The commands of a model for questions by the size of images."""
    given = ("train.epochs=null", *SHORT, *settings)
    return lambda side: stages.of_questions([setting.format(side=side) for setting in given])


TEXT_ENCODERS = {"text encoders, too": ["adapter.parts=[unet.attn,unet.cross,text_encoders.attn]"]}
IN_BFLOAT16 = {"weights in bfloat16": ["model.quantization=null", "adapter.cache=norms"]}  # keeps no W'
STAYS = ("memory.stream=null", "memory.stream_text=null")  # on a CPU nothing waits, and a dry run is for GPUs
CACHED = (*STAYS, "data.text_cache=texts", "model.quantization=null", "adapter.cache=norms")
NO_FLOAT8 = ("model.quantization=null", "adapter.cache=weights")
MODELS = {
    "vlm": Model(
        "SmolVLM-256M-Instruct",
        0.5,
        models.smolvlm,
        lambda folder: tiny_vlm.build("idefics3", folder),
        questions("model.image_size={side}", "train.batch_size=1", "data.valid=null"),
        512,
        "One row with an image of {side} px a step in float32, with checkpointing.",
    ),
    "sdxl": Model(
        "SDXL base 1.0 as a folder, in float16",
        6.9,
        models.sdxl,
        tiny_sdxl,
        images("sdxl", "model", *NO_FLOAT8, further=TEXT_ENCODERS),
        256,
        "One image of {side} px a step in bfloat16, with checkpointing.",
    ),
    "single": Model(
        "SDXL base 1.0 as a single file, in float16",
        6.9,
        models.single,
        None,
        images("sdxl", "model/sd_xl_base_1.0.safetensors"),
        256,
        "As `new` writes it on a CPU: the UNet in float8, one image of {side} px a step, with checkpointing.",
    ),
    "z_image": Model(
        "Z-Image, in bfloat16",
        20.6,
        models.z_image,
        tiny_z_image.build,
        images("z_image", "model", *STAYS, "model.quantization=float8", further=IN_BFLOAT16),
        256,
        "Weights in float8, one image of {side} px a step, with checkpointing.",
    ),
    "klein": Model(
        "FLUX.2 klein base 4B, in bfloat16",
        16.0,
        models.klein,
        tiny_flux2_klein.build,
        images("flux2_klein", "model", "model.flux2_klein.max_tokens=32", *CACHED),
        128,
        "One image of {side} px a step in bfloat16, with checkpointing; prompts of 32 tokens, kept on the disk.",
    ),
    "qwen_image": Model(
        "Qwen-Image, cut to 6 of its 60 blocks and 6 of the 28 layers of its text encoder, in bfloat16",
        10.0,
        models.qwen_image,
        tiny_qwen_image.build,
        images("qwen_image", "model", "model.qwen_image.max_tokens=32", *CACHED),
        128,
        "One image of {side} px a step in bfloat16, with checkpointing; prompts kept on the disk.",
    ),
    "krea2": Model(
        "Krea 2, cut to 8 of its 28 blocks, in bfloat16",
        18.0,
        models.krea2,
        tiny_krea2.build,
        images("krea2", "model", "model.krea2.max_tokens=32", *CACHED),
        128,
        "One image of {side} px a step in bfloat16, with checkpointing; prompts of 32 tokens, kept on the disk.",
    ),
    "qwen": Model(
        "Qwen2.5-VL-3B-Instruct, in bfloat16",
        7.5,
        models.qwen,
        lambda folder: tiny_vlm.build("qwen2_5_vl", folder),
        questions("model.dtype=bfloat16", "train.mixed_precision=bf16", "train.batch_size=1", "data.valid=null"),
        0,
        "One row a step in bfloat16, with checkpointing.",
    ),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=about.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"{', '.join(MODELS)}; default: all")
    parser.add_argument("--keep", action="store_true", help="models and runs stay in build/rehearsal")
    parser.add_argument("--dry", action="store_true", help="tiny models: only whether it works")
    parser.add_argument("--output", type=Path, help="the folder of the results")
    given = parser.parse_args(arguments)
    if unknown := sorted(set(given.models) - set(MODELS)):
        parser.error(f"there is no model {', '.join(unknown)}: choose from {', '.join(MODELS)}")
    results = given.output or ROOT / "tests/benchmarks/results" / folder_name(machine())
    work = ROOT / "build/rehearsal"
    if given.dry:
        work = Path(tempfile.mkdtemp(prefix="rehearsal-"))
        results = given.output or work / "results"
    return max([rehearse(name, work / name, results, given) for name in given.models or MODELS], default=0)


def rehearse(name: str, folder: Path, results: Path, given: argparse.Namespace) -> int:
    """Builds a model, runs its commands and saves what they took; returns the exit code."""
    model = MODELS[name]
    if given.dry and model.tiny is None:
        print(f"{name}: left out, there is no tiny one", flush=True)
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = (0.0 if given.dry else model.gigabytes), shutil.disk_usage(folder).free / 1e9
    print(f"\n=== {name}: {model.title}, {needed} GB on disk, {free:.0f} GB are free", flush=True)
    if not (folder / "model").exists() and free < needed + SPARE:
        print(f"failed: no room: {needed + SPARE:.0f} GB have to be free in {folder}", flush=True)
        return 2
    try:
        if not (folder / "model").exists():
            (model.tiny if given.dry and model.tiny else model.build)(folder / "model")
        for path in [path for path in folder.iterdir() if path.name != "model"]:  # of an earlier run
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        prepare(folder)
        side = 64 if given.dry else 1024 if ON_GPU else model.side
        return run_all(name, model, folder, results, side)
    finally:
        if not given.keep:
            shutil.rmtree(folder)


def run_all(name: str, model: Model, folder: Path, results: Path, side: int) -> int:
    """Runs the commands of a model one after the other; one that fails stops them."""
    size = sum(file.stat().st_size for file in (folder / "model").rglob("*") if file.is_file()) / 1e6
    values = {"title": model.title, "disk": size, "settings": model.settings.format(side=side)}
    done, kept, left_out = [], [], []
    for stage in model.stages(side):
        if stage.writes and shutil.disk_usage(folder).free / 1e6 < size + SPARE * 1e3:
            left_out.append(f"{stage.label}: it writes another {size / 1e3:.1f} GB, for which there was no room.")
            continue
        found = run_stage(stage, folder)
        print(line_of(stage, found), flush=True)
        if found.code != (-9 if stage.killed else 0):
            print(f"failed: {found.command}: exit code {found.code}\n{found.output[-2000:]}", flush=True)
            return 1
        kept.append(stage)
        done.append(found)
        save(results, name, record(kept, done, {**values, "left_out": left_out}))
    page = save(results, name, record(kept, done, {**values, "left_out": left_out}))  # with what is left out at the end
    print(f"results in {page}", flush=True)
    return 0


def line_of(stage: Stage, found: Measured) -> str:
    sizes = [f"{name}: {peak.anonymous:,.0f} MB and {peak.mapped:,.0f} mapped" for name, peak in found.peaks.items()]
    times = f"{found.processor_seconds:7.1f} s of the processor, {found.seconds:6.1f} by the clock"
    return f"{stage.label:36} {times}; {', '.join(sizes)}"


if __name__ == "__main__":
    sys.exit(main())
