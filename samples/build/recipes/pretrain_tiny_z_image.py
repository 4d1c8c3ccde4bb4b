"""Pretrains the embedded Z-Image from scratch, around the VAE of the embedded SDXL model.

Transformer and text encoder learn the flat icons of some hundred things: all that samples/lego shows, and some of those
that adapters are scored on. They never see a brick: adapters learn those.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL

from dora_mm.config.loader import dump_config
from dora_mm.config.paths import resolve_path
from dora_mm.data.images.buckets import Framing
from dora_mm.models.images.components import load_vae
from dora_mm.models.images.z_image import GROUP, ZImage
from dora_mm.tasks.diffusion import ConditionedLatents
from dora_mm.utils.randomness import generator
from dora_mm.utils.run_directory import RunDirectory
from samples.build.pretraining.batches import batch_indices
from samples.build.pretraining.flow_training import encode_icons, of_things, short_caption, show_samples, train_flow
from samples.build.pretraining.icons import DEFAULT_STYLE, Icon, caption, read_icons
from samples.build.pretraining.tiny_flow import save
from samples.build.pretraining.tiny_z_image import build_tiny_z_image, encode
from samples.build.schema import PretrainTinyZImageConfig

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


def train(config: PretrainTinyZImageConfig, model: ZImage, icons: list[Icon], run: RunDirectory) -> None:
    """Trains transformer and text encoder; captions fit into the first group of tokens: a second is a third slower."""
    latents = model.normalized(encode_icons(model, icons))
    side, size = model.resolution, config.train.batch_size
    framings = [Framing((side, side), (side, side), 0, 0, (side, side), False)] * size

    def batch_at(number: int) -> dict[str, Any]:
        rows = batch_indices(len(icons), size, number, config.seed)
        stream = generator(config.seed, number, "captions")
        captions = [short_caption(model, icons[row], stream, config.unnamed_style, GROUP) for row in rows]
        kept = torch.rand(size, generator=stream) >= config.caption_dropout
        return {
            "latents": latents[rows],
            "captions": [text if keep else "" for text, keep in zip(captions, kept, strict=True)],
        }

    def conditioned(batch: dict[str, Any]) -> ConditionedLatents:
        return ConditionedLatents(batch["latents"], encode(model, batch["captions"]), framings)

    trained = {"transformer": model.transformer, "text_encoder": model.text_encoder}
    train_flow(config, model, trained, batch_at, conditioned, run, lambda step: show(config, model, run, step))


def show(config: PretrainTinyZImageConfig, model: ZImage, run: RunDirectory, step: int | None = None) -> None:
    """Saves the current model and images sampled from it; `step` is None at the end."""
    save(model, run.path / "tiny-z-image")
    show_samples(config, model, run, step)
