"""Pretrains the embedded Z-Image from scratch, around the VAE of the embedded SDXL model.

Transformer and text encoder learn the flat icons of some hundred things: all that samples/lego shows, and some of those
that adapters are scored on. They never see a brick: adapters learn those.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel

from dora_mm.config.loader import dump_config
from dora_mm.config.paths import resolve_path
from dora_mm.data.images.buckets import Framing
from dora_mm.eval.images.classifier import spaced_concepts
from dora_mm.models.images.components import load_vae
from dora_mm.models.images.z_image import GROUP, ZImage
from dora_mm.sampling.grids import image_grid
from dora_mm.sampling.image_sampler import sample
from dora_mm.tasks.diffusion import ConditionedLatents, DiffusionTask
from dora_mm.utils.randomness import generator
from dora_mm.utils.run_directory import RunDirectory
from samples.build.pretraining.batches import batch_indices
from samples.build.pretraining.icons import DEFAULT_STYLE, Icon, caption, load_pixels, read_icons, to_signed
from samples.build.pretraining.stages import train_stage
from samples.build.pretraining.tiny_z_image import build_tiny_z_image, encode, save
from samples.build.schema import PretrainStage, PretrainTinyZImageConfig

log = logging.getLogger(__name__)
CAPTIONS = 40  # of each icon, which the tokenizer is trained on


def main(config: PretrainTinyZImageConfig, *, resume: Path | None = None) -> None:
    """Trains the model.

    Writes to the run directory: checkpoints, metrics, sample images in samples/, the model in tiny-z-image/, and
    sheet.png.

    Args:
        config: The config.
        resume: The run directory to resume; None: a new run.

    Raises:
        ValueError: The icons or the VAE are missing.
    """
    every = read_icons(resolve_path(config.icons, "icons"), [DEFAULT_STYLE], split="pretrain")
    icons = of_things(every, config.reported)
    vae = load_vae(AutoencoderKL, resolve_path(config.vae, "vae"))
    stream = generator(config.seed, 0, "tokenizer")
    texts = [caption(icon, stream, config.unnamed_style) for icon in icons for _ in range(CAPTIONS)]
    model = build_tiny_z_image(
        vae,
        texts,
        seed=config.seed,
        num_merges=config.model.num_merges,
        text_width=config.model.text_width,
        width=config.model.width,
        layers=config.model.layers,
        heads=config.model.heads,
    )
    run = (
        RunDirectory.resume(resume) if resume else RunDirectory.create(config.name, dump_config(config), config.output)
    )
    model.to(Accelerator(mixed_precision=config.train.mixed_precision).device).freeze()
    train(config, model, icons, run)
    show(config, model, run)
    log.info("The model is in %s, sample images are in %s.", run.path / "tiny-z-image", run.contact_sheet)


def of_things(icons: Sequence[Icon], reported: int) -> list[Icon]:
    """Those of the things in samples/lego, and of those that an evaluation of `reported` things chooses."""
    by_role = {role: [icon for icon in icons if icon.concept.role == role] for role in ("lego", "report")}
    chosen = spaced_concepts([icon.concept for icon in by_role["report"]], reported)
    return [*by_role["lego"], *(icon for icon in by_role["report"] if icon.concept in chosen)]


def train(config: PretrainTinyZImageConfig, model: ZImage, icons: list[Icon], run: RunDirectory) -> None:
    """Trains transformer and text encoder, and leaves the model with the average of their weights."""
    latents = encode_icons(model, icons)
    side, size = model.resolution, config.train.batch_size
    framings = [Framing((side, side), (side, side), 0, 0, (side, side), False)] * size

    def batch_at(number: int) -> dict[str, Any]:
        rows = batch_indices(len(icons), size, number, config.seed)
        stream = generator(config.seed, number, "captions")
        captions = [short_caption(model, icons[row], stream, config.unnamed_style) for row in rows]
        kept = torch.rand(size, generator=stream) >= config.caption_dropout
        return {
            "latents": latents[rows],
            "captions": [text if keep else "" for text, keep in zip(captions, kept, strict=True)],
        }

    task = DiffusionTask(model, config.loss)

    def loss(batch: dict[str, Any], stream: torch.Generator) -> torch.Tensor:
        conditioned = ConditionedLatents(batch["latents"], encode(model, batch["captions"]), framings)
        return task.loss(conditioned, stream).mean

    trained = {"transformer": model.transformer, "text_encoder": model.text_encoder}
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
                show(config, model, run, step)
            finally:  # an interruption writes a checkpoint, which must contain the weights that are trained
                average.restore(parameters)

    hooks = {"after_step": after_step, "on_step_end": on_step_end}
    stage = PretrainStage(optimizer=config.optimizer, schedule=config.schedule, train=config.train)
    train_stage(config.seed, stage, trained, loss, batch_at, run, {"ema": average}, **hooks)
    average.copy_to(parameters)
    model.freeze()


def short_caption(model: ZImage, icon: Icon, stream: torch.Generator, unnamed: float) -> str:
    """Draws captions until one fits into the first group of tokens: a second one makes steps a third slower."""
    while model.num_tokens(found := caption(icon, stream, unnamed)) > GROUP:
        pass
    return found


@torch.no_grad()
def encode_icons(model: ZImage, icons: list[Icon]) -> torch.Tensor:
    """The latents (N, C, h, w) of all icons, as the transformer has them."""
    parts = load_pixels(icons, model.resolution).split(32)
    return torch.cat([model.normalized(model.encode_images(to_signed(part)).mean) for part in parts])


def show(config: PretrainTinyZImageConfig, model: ZImage, run: RunDirectory, step: int | None = None) -> None:
    """Saves the current model and images sampled from it; `step` is None at the end."""
    save(model, run.path / "tiny-z-image")
    if not config.sample.prompts:
        return
    run.samples.mkdir(exist_ok=True)
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
    path = run.contact_sheet if step is None else run.samples / f"step-{step:06d}.png"
    image_grid(rows, [f"seed {seed}" for seed in seeds], prompts).save(path)
