"""Trains the parts of a small flow model, and shows what it generates on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from dora_mm.eval.images.classifier import spaced_concepts
from dora_mm.models.images.flow_model import FlowModel
from dora_mm.sampling.grids import image_grid
from dora_mm.sampling.image_sampler import sample
from dora_mm.tasks.diffusion import ConditionedLatents, DiffusionTask
from dora_mm.utils.run_directory import RunDirectory
from samples.build.pretraining.icons import Icon, caption, load_pixels, to_signed
from samples.build.pretraining.stages import train_stage
from samples.build.schema import PretrainStage, PretrainTinyFlowConfig


def train_flow(
    config: PretrainTinyFlowConfig,
    model: FlowModel,
    trained: dict[str, nn.Module],
    batch_at: Callable[[int], Any],
    conditioned: Callable[[Any], ConditionedLatents],
    run: RunDirectory,
    show: Callable[[int], None],
) -> None:
    """Trains a model, and leaves it with the average of the weights.

    Args:
        config: The config.
        model: The model.
        trained: The networks that are trained, by name.
        batch_at: Number of a batch -> the batch.
        conditioned: The batch with encoded captions, which have gradients.
        run: The run directory.
        show: Shows what the model generates with the average of the weights after a step.
    """
    task = DiffusionTask(model, config.loss)

    def loss(batch: Any, stream: torch.Generator) -> torch.Tensor:
        return task.loss(conditioned(batch), stream).mean

    if config.compile:
        model.transformer.compile_repeated_blocks()
    parameters = [p for network in trained.values() for p in network.parameters()]
    average = EMAModel(parameters, decay=config.ema_decay)

    def after_step(step: int) -> None:
        average.to(model.device)  # restored from a checkpoint, it is on the CPU
        average.step(parameters)

    def on_step_end(step: int) -> None:
        if config.sample.every and step % config.sample.every == 0 and step < config.train.steps:
            average.to(model.device)
            average.store(parameters)
            try:
                average.copy_to(parameters)
                show(step)
            finally:  # an interruption writes a checkpoint, which must contain the weights that are trained
                average.restore(parameters)

    hooks = {"after_step": after_step, "on_step_end": on_step_end}
    stage = PretrainStage(optimizer=config.optimizer, schedule=config.schedule, train=config.train)
    train_stage(config.seed, stage, trained, loss, batch_at, run, {"ema": average}, **hooks)
    average.copy_to(parameters)
    model.freeze()


def of_things(icons: list[Icon], reported: int) -> list[Icon]:
    """Those of the things in samples/lego, and of those that an evaluation of `reported` things chooses."""
    by_role = {role: [icon for icon in icons if icon.concept.role == role] for role in ("lego", "report")}
    chosen = spaced_concepts([icon.concept for icon in by_role["report"]], reported)
    return [*by_role["lego"], *(icon for icon in by_role["report"] if icon.concept in chosen)]


def short_caption(model: FlowModel, icon: Icon, stream: torch.Generator, unnamed: float, most: int) -> str:
    """Draws captions until one has at most so many tokens."""
    while model.num_tokens(found := caption(icon, stream, unnamed)) > most:
        pass
    return found


@torch.no_grad()
def encode_icons(model: FlowModel, icons: list[Icon]) -> torch.Tensor:
    """The latents (N, C, h, w) of all icons, as the VAE gives them."""
    return encode_pixels(model, load_pixels(icons, model.resolution))


@torch.no_grad()
def encode_pixels(model: FlowModel, pixels: torch.Tensor) -> torch.Tensor:
    """The latents (N, C, h, w) of images (N, 3, H, W) of uint8, as the VAE gives them."""
    return torch.cat([model.encode_images(to_signed(part)).mean for part in pixels.split(32)])


def show_samples(config: PretrainTinyFlowConfig, model: FlowModel, run: RunDirectory, step: int | None = None) -> None:
    """Saves images generated from the prompts of the config; `step` is None at the end."""
    if not config.sample.prompts:
        return
    prompts, seeds = list(config.sample.prompts), config.sample.seeds
    images = sample(
        model,
        prompts * len(seeds),
        [seed for seed in seeds for _ in prompts],
        steps=config.sample.steps,
        guidance=config.sample.guidance,
        negative_prompt=config.sample.negative_prompt,
        batch_size=config.sample.batch_size,
    )
    rows = [images[start : start + len(prompts)] for start in range(0, len(images), len(prompts))]
    image_grid(rows, [f"seed {seed}" for seed in seeds], prompts).save(sheet_path(run, step))


def sheet_path(run: RunDirectory, step: int | None, suffix: str = "") -> Path:
    """Where images after a step are saved, or those at the end."""
    if step is None:
        return run.contact_sheet.with_stem(run.contact_sheet.stem + suffix)
    run.samples.mkdir(exist_ok=True)
    return run.samples / f"step-{step:06d}{suffix}.png"
