"""Batches of pictures from an SDXL pipeline; one picture is a function of its prompt and its seed alone."""

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
SECONDS_BETWEEN_LINES = 30.0  # of progress, where no terminal shows a bar


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
    """One picture per pair of prompt and seed.

    The noise of a picture comes from its own seed, so it does not depend on its batch (up to the rounding of the
    larger product).

    Args:
        negative_prompt: None is SDXL's zero embedding; "" is the encoded empty text.
        height, width: in pixels; None is the model's own.
        description: shows a progress bar under this name; plain lines where there is no terminal.
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
    """The pipeline's own default assumes latents of SDXL's size where the UNet's config has none."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor
