"""The commands that write, and what they read, all of it small: relative to the folder in which they are run."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors.torch import save_file

from dora_mm.cli import main as dora_mm_main
from dora_mm.models.images.sdxl.random_weights import build_tiny_sdxl
from dora_mm.sampling.manifest import ManifestEntry, write_manifest
from dora_mm.utils.run_directory import RunDirectory
from tests.kill.campaigns import CAMPAIGN, prepare_campaigns
from tests.kill.process import two_processes
from tests.shared.vl.small_towers import small_tower

FIXTURES = Path(__file__).parents[1] / "formats" / "fixtures"
ATTENTION = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1"
SIZES = {"num_merges": 300, "vae_channels": (8, 8, 16, 16), "latent_channels": 4, "unet_channels": (16, 32, 64)}
DRAW = {"steps": 1, "resolution": 64}
TRAIN = {
    "pipeline": "train_diffusion",
    "output": "out/run",
    "model": {"path": "model"},
    "adapter": {"rank": 2, "parts": ["unet.attn"]},
    "data": {"folder": "pictures", "resolution": 64, "instance_prompt": "a sks thing"},
    "optimizer": {"lr": 0.01},
    "train": {"steps": 3, "batch_size": 1, "checkpoint_every": 1},
    "sample": {"prompts": ["a sks bus"], "steps": 1},
}
JOB = {
    "pipeline": "sample",
    "output": "out/job",
    "model": {"path": "model"},
    "prompts": ["a bus", "a cat"],
    "steps": 1,
    "width": 64,
    "height": 64,
}


class Command(NamedTuple):
    """A command that writes.

    Attributes:
        run: Runs it.
        reads: A file that it reads, to which something may happen meanwhile.
        again: What the documents say to do after a kill; None: the same command.
        is_long: Whether it takes seconds.
        times: Patterns of files that hold times, such as the seconds that steps took.
        starts: Whether it starts other processes, which may end before it.
        is_external: Whether what writes is in processes that begin anew, where `tests.kill.process` disturbs it.
    """

    run: Callable[[], object]
    reads: str
    again: Callable[[], object] | None = None
    is_long: bool = False
    times: str = r"versions\.json|\.(svg|png)$"  # figures of matplotlib have their date
    starts: bool = False
    is_external: bool = False


def prepare() -> None:
    """What the commands read, in the current directory."""
    torch.manual_seed(0)
    Path("pictures").mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (60 * number, 90, 160)).save(f"pictures/{number}.png")
        Path(f"pictures/{number}.txt").write_text(f"a sks drawing of thing {number}")
    shutil.copy(FIXTURES / "lycoris_out.safetensors", "adapter.safetensors")
    shutil.copytree(FIXTURES / "peft_lora", "lora")
    weights = {f"{ATTENTION}.to_{name}.weight": torch.eye(8) * (1 + place) for place, name in enumerate("qkv")}
    save_file(weights, "base.safetensors", {"format": "pt"})
    save_file({name: W + 0.1 * torch.outer(W[0], W[1] + 1) for name, W in weights.items()}, "tuned.safetensors")
    Path("here").mkdir()
    Path("here/other.txt").write_text("of a person's")
    build_tiny_sdxl(resolution=64, unet_layers=1, text_widths=(16, 32), **SIZES).pipeline().save_pretrained("model")
    Path("drawn").mkdir()
    settings = {"prompt": "a bus", "seed": 0, "model": "tiny", "adapter": None, "strength": None}
    Image.new("RGB", (64, 64), (200, 90, 160)).save("drawn/1.png")
    write_manifest(Path("drawn"), [ManifestEntry(1, "1.png", "done", 1, settings)])
    vision = {**small_tower(Path()), "pretrained": "tower.safetensors"}
    features = {"pipeline": "extract_features", "output": "out/features", "images": ["pictures"], "batch_size": 1}
    for name, values in {"train": TRAIN, "job": JOB, "features": {**features, "vision": vision}}.items():
        Path(f"{name}.yaml").write_text(json.dumps(values))  # JSON is YAML
    prepare_campaigns()


def command(*arguments: str) -> Callable[[], object]:
    def run() -> None:
        if code := dora_mm_main(list(arguments)):
            sys.exit(code)

    return run


def train_again() -> None:
    """The run goes on by its name, if there is one; else the training is started again."""
    there = Path(TRAIN["output"], "config.yaml").is_file()
    command("train", *(["--resume", TRAIN["output"]] if there else ["train.yaml"]))()


def make_run() -> None:
    digest = Path("adapter.safetensors").stat().st_size
    RunDirectory.create("a", "seed: 1\n", "out/run", {"data": str(digest)})


def train_in_two_again() -> None:
    there = Path(TRAIN["output"], "config.yaml").is_file()
    two_processes("train", *(["--resume", TRAIN["output"]] if there else ["train.yaml"]))()


OURS = r"versions\.json|metrics|summary|events\.out|manifest|checkpoint\.json|state\.safetensors|\.html$"
NAMED_BY_TIME = r"events\.out.*"
THUMBNAIL = re.compile(r"/thumbnails/[0-9a-f]{16}\.webp$").search  # of an image, named by its path, time and size
COMMANDS: dict[str, Command] = {
    "new": Command(command("new", "sdxl", "style", "--images", "pictures"), "pictures/0.png"),
    "convert to a file": Command(
        command("convert", "adapter.safetensors", "out/a.safetensors", "--to", "kohya"), "adapter.safetensors"
    ),
    "convert beside others": Command(
        command("convert", "adapter.safetensors", "here/a.safetensors", "--to", "kohya"), "adapter.safetensors"
    ),
    "convert to a folder": Command(
        command("convert", "adapter.safetensors", "here", "--to", "diffusers"), "adapter.safetensors"
    ),
    "extract": Command(
        command("extract", "tuned.safetensors", "base.safetensors", "out/e.safetensors", "--rank", "2"),
        "tuned.safetensors",
    ),
    "combine": Command(command("combine", "lora", "lora", "out/c", "--to", "peft"), "lora/adapter_model.safetensors"),
    "analyse": Command(
        command("analyse", "tuned.safetensors", "--base", "base.safetensors", "--output", "out/analysis"),
        "tuned.safetensors",
    ),
    "gallery": Command(command("gallery", "drawn", "--output", "out/gallery"), "drawn/1.png"),
    "a run": Command(make_run, "adapter.safetensors"),
    "features": Command(command("features", "features.yaml"), "pictures/2.png"),
    "sample": Command(command("sample", "job.yaml"), "model/unet/config.json", None, True, OURS),
    "train": Command(command("train", "train.yaml"), "pictures/2.png", train_again, True, OURS),
    "train in two processes": Command(
        two_processes("train", "train.yaml"), "pictures/2.png", train_in_two_again, True, OURS, True, True
    ),
    "tune": Command(
        command(
            "tune", "base.yaml", "--rates", "1e-2", "1e-1", "--selection-metric", "held_out", "--output", "out/tune"
        ),
        "features/COCO_val2014_000000000043.npz",
        None,
        True,
        CAMPAIGN,
        True,
    ),
    "compare": Command(
        command("compare", "compare.yaml"), "features/COCO_val2014_000000000043.npz", None, True, CAMPAIGN, True
    ),
    "score": Command(
        command("score", "answers.json", "--suite", "docvqa", "--data", "docvqa.json", "--page", "out/answers.html"),
        "answers.json",
    ),
}


def files_of(folder: Path, times: str) -> dict[str, bytes]:
    """All files and folders with their contents, hidden ones among them; of those with times the name alone."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        has_time = re.search(times, name)
        found[re.sub(NAMED_BY_TIME, "", name) if has_time else name] = (
            b"" if path.is_dir() or has_time else path.read_bytes()
        )
    return found
