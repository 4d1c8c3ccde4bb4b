"""A run directory as a training of images leaves it, without a training."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dora_mm.config.images import TrainDiffusionConfig
from dora_mm.config.loader import dump_config
from dora_mm.sampling.before_after import keep_images
from dora_mm.utils.run_directory import RunDirectory

PROMPTS = ("a bus", "a cat")
VALUES: dict[str, Any] = {
    "pipeline": "train_diffusion",
    "name": "style",
    "model": {"path": "tiny"},
    "adapter": {"rank": 4, "parts": ["unet.attn", "unet.ff"]},
    "data": {"folder": "pictures", "resolution": 64, "instance_prompt": "a TOK icon"},
    "optimizer": {"lr": 0.01},
    "train": {"steps": 40, "batch_size": 2},
    "sample": {"prompts": list(PROMPTS), "steps": 2, "seeds": [0, 5]},
}


def training_config(**sections: dict[str, Any]) -> TrainDiffusionConfig:
    """The config, with other values in its sections."""
    values = {**VALUES, **{name: {**VALUES.get(name, {}), **changed} for name, changed in sections.items()}}
    return TrainDiffusionConfig.model_validate(values)


def image(colour: Sequence[int]) -> Image.Image:
    return Image.new("RGB", (16, 16), tuple(colour))


def draw(
    run: RunDirectory, config: TrainDiffusionConfig, step: int, labels: Sequence[str] = ("before", "after")
) -> None:
    """Saves the images of a contact sheet, in a colour for each label and step."""
    count = len(config.sample.prompts) * len(config.sample.seeds)
    colours = {"before": (0, 0, 250), "after": (step, 200, 0), "average": (step, 0, 0)}
    keep_images(run, config, step, {label: [image(colours[label])] * count for label in labels})


def make_training(
    path: Path, drawn: Sequence[int] = (0, 10, 20, 40), kept: Sequence[int] = (20, 40), *, finished: bool = True
) -> RunDirectory:
    """A training of 40 steps, with images, curves, held-out losses and checkpoints."""
    run, config = RunDirectory(path), training_config()
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(dump_config(config))
    for step in drawn:
        draw(run, config, step)
    for step in kept:
        (run.checkpoints / f"step-{step:06d}").mkdir(parents=True)
    last = max(drawn, default=40)
    rows = [{"step": step, "loss": 1 / step, "lr": 0.01} for step in range(1, last + 1)]
    write_rows(path / "metrics.jsonl", rows)
    held = [{"step": step, "held_out_loss": 1 + (step - 20) ** 2 / 400} for step in range(0, last + 1, 10)]
    write_rows(path / "validation" / "metrics.jsonl", held)
    if finished:
        run.adapter.mkdir()
        (path / "summary.json").write_text(json.dumps({"steps": 40, "loss": 0.025, "best_step": 20}))
    return run


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
