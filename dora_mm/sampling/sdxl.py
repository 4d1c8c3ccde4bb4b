"""Sampling from an SDXL pipeline in batches; a picture depends only on its prompt, its seed and the settings."""

import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from tqdm import tqdm

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 30.0  # of logged progress, without a terminal that shows a bar


@torch.no_grad()
def sample(
    pipe: StableDiffusionXLPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 25,
    guidance: float = 5.0,
    negative_prompt: str | None = None,
    batch_size: int = 8,
    height: int | None = None,
    width: int | None = None,
    description: str | None = None,
) -> list[Image.Image]:
    """Samples one picture per pair of prompt and seed.

    The noise of a picture comes from its own seed, so the picture does not depend on its batch (up to rounding in the
    larger product).

    Args:
        pipe: The pipeline.
        prompts: The prompts.
        seeds: A seed for each prompt.
        steps: Number of denoising steps.
        guidance: Scale of classifier-free guidance.
        negative_prompt: For all pictures. None is SDXL's zero embedding; "" is the encoded empty text.
        batch_size: Pictures per batch.
        height: In pixels; None is the model's own.
        width: In pixels; None is the model's own.
        description: Label of a progress bar, or of lines in the log without a terminal; None shows no progress.

    Returns:
        The pictures, in the order of the prompts.
    """
    jobs = list(zip(prompts, seeds, strict=True))
    pictures: list[Image.Image] = []
    shown = description is not None and sys.stderr.isatty()
    last_line = time.monotonic()
    with tqdm(total=len(jobs), desc=description, unit="picture", disable=not shown, leave=False) as bar:
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            drawn: Any = pipe(
                [prompt for prompt, _ in batch],
                negative_prompt=None if negative_prompt is None else [negative_prompt] * len(batch),
                generator=[torch.Generator("cpu").manual_seed(seed) for _, seed in batch],
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=height or _own_size(pipe),
                width=width or _own_size(pipe),
            )
            pictures += drawn.images
            bar.update(len(batch))
            if description is not None and not shown and time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                log.info("%s: %d of %d pictures", description, len(pictures), len(jobs))
    return pictures


def _own_size(pipe: StableDiffusionXLPipeline) -> int:
    """The model's resolution; the pipeline's own default assumes SDXL's if the UNet's config has no `sample_size`."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor
