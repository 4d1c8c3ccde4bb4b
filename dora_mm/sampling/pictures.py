"""Draws pictures with SDXL in batches; a picture depends only on its prompts, its seed and the settings."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dora_mm.models.schedulers import SCHEDULERS, make_scheduler, scheduler_name
from dora_mm.models.sdxl.encoding import encode_for_pipeline, num_chunks

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 30.0  # of logged progress, without a terminal that shows a bar
MOST_ENCODED = 256  # prompts that are kept: 0.6 MB each for SDXL in fp32

Prompts = tuple[str, str | None]  # of one picture: the prompt, and the negative prompt or None


class UnusablePictureError(ValueError):
    """A picture that has values which are not numbers, or is black."""


class PictureSampler:
    """Draws batches of pictures, each with its own noise.

    A picture does not depend on the others of its batch, up to rounding in the larger products.

    Args:
        pipe: The pipeline of the model. Its scheduler is replaced while a batch is drawn with another one.
    """

    def __init__(self, pipe: StableDiffusionXLPipeline):
        self.pipe = pipe
        self.scheduler: Any = pipe.scheduler
        self._schedulers: dict[str, Any] = {}
        self._encoded: dict[Prompts, dict[str, Tensor]] = {}

    def forget_prompts(self) -> None:
        """Encodes prompts again from now on, since the text encoders were changed."""
        self._encoded.clear()

    def num_chunks(self, prompts: Prompts) -> int:
        """The number of chunks of tokens in the longer one of a picture's prompts."""
        return max(num_chunks(self.pipe, text) for text in prompts if text is not None)

    def scheduler_title(self, name: str | None) -> str:
        """What A1111 calls a scheduler; `None` is the model's own."""
        name = name or scheduler_name(self.scheduler)
        return SCHEDULERS[name].title if name else type(self.scheduler).__name__

    def why_not(self, scheduler: str | None, steps: int) -> str | None:
        """Why a scheduler (None: the model's own) cannot take this number of steps; None if it can."""
        made = self._scheduler(scheduler) if scheduler else deepcopy(self.scheduler)
        try:
            made.set_timesteps(steps)
        except ValueError as error:
            return str(error)
        return None

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[Prompts],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance: float,
        width: int,
        height: int,
        scheduler: str | None = None,
    ) -> list[Image.Image | UnusablePictureError]:
        """Draws a batch of pictures.

        Args:
            prompts: The prompts of each picture; all have the same `num_chunks`.
            seeds: The seed of each.
            steps: The number of denoising steps.
            guidance: The scale of classifier-free guidance.
            width: In pixels.
            height: In pixels.
            scheduler: The name of the scheduler; None is the model's own.

        Returns:
            The pictures, with an error in the place of each that cannot be used.
        """
        self.pipe.scheduler = self._scheduler(scheduler)
        encoded = [self._encode(each) for each in prompts]
        embeddings: dict[str, Any] = {name: torch.cat([each[name] for each in encoded]) for name in encoded[0]}
        try:
            drawn: Any = self.pipe(
                **embeddings,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=height,
                width=width,
                output_type="pt",
            )
        finally:
            self.pipe.scheduler = self.scheduler
        return [problem_of(pixels) or self._picture(pixels) for pixels in drawn.images]

    def _scheduler(self, name: str | None) -> Any:
        """The scheduler of a name, made once: it warns where it does not suit the model."""
        if name is None:
            return self.scheduler
        if name not in self._schedulers:
            self._schedulers[name] = make_scheduler(name, self.scheduler)
        return self._schedulers[name]

    def _encode(self, prompts: Prompts) -> dict[str, Tensor]:
        """Encodes the prompts of one picture alone, so that they do not depend on the batch in the last bits."""
        if prompts not in self._encoded:
            if len(self._encoded) >= MOST_ENCODED:
                del self._encoded[next(iter(self._encoded))]
            self._encoded[prompts] = encode_for_pipeline(self.pipe, *prompts)
        return self._encoded[prompts]

    def _picture(self, pixels: Tensor) -> Image.Image:
        processor: Any = self.pipe.image_processor
        return processor.postprocess(pixels[None], "pil", [False])[0]


def problem_of(pixels: Tensor) -> UnusablePictureError | None:
    """Says why a picture (3, H, W) cannot be used; None where it can."""
    if not pixels.isfinite().all():
        return UnusablePictureError(
            "has values that are not numbers (NaN): in half precision SDXL needs another VAE, see model.vae"
        )
    return None if pixels.any() else UnusablePictureError("is black")


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
    """Samples one picture per pair of prompt and seed, all with the same settings.

    Args:
        pipe: The pipeline.
        prompts: The prompts.
        seeds: A seed for each prompt.
        steps: The number of denoising steps.
        guidance: The scale of classifier-free guidance.
        negative_prompt: For all pictures. None is SDXL's zero embedding; "" is the encoded empty text.
        batch_size: Pictures per batch.
        height: In pixels; None is the model's own.
        width: In pixels; None is the model's own.
        description: Label of a progress bar, or of lines in the log without a terminal; None shows no progress.

    Returns:
        The pictures, in the order of the prompts. Those that cannot be used are black, and named in the log.
    """
    sampler, side = PictureSampler(pipe), own_size(pipe)
    settings = {"steps": steps, "guidance": guidance, "height": height or side, "width": width or side}
    jobs = [((prompt, negative_prompt), seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    groups: dict[int, list[int]] = {}
    for index, (job, _) in enumerate(jobs):
        groups.setdefault(sampler.num_chunks(job), []).append(index)
    pictures: dict[int, Any] = {}
    with Progress(len(jobs), description) as progress:
        for group in groups.values():
            for start in range(0, len(group), batch_size):
                batch = group[start : start + batch_size]
                drawn = sampler.draw([jobs[i][0] for i in batch], [jobs[i][1] for i in batch], **settings)
                pictures |= zip(batch, drawn, strict=True)
                progress.advance(len(batch))
    for index, picture in pictures.items():
        if isinstance(picture, UnusablePictureError):
            log.warning("The picture of %r with seed %d %s.", prompts[index], seeds[index], picture)
            pictures[index] = Image.new("RGB", (settings["width"], settings["height"]))
    return [pictures[index] for index in range(len(jobs))]


def own_size(pipe: StableDiffusionXLPipeline) -> int:
    """The model's resolution; the pipeline's own default assumes SDXL's if the UNet's config has no `sample_size`."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor


class Progress:
    """A progress bar over pictures, or lines in the log without a terminal.

    Args:
        total: The number of pictures.
        description: The label; None shows nothing.
    """

    def __init__(self, total: int, description: str | None):
        shown = description is not None and sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=description, unit="picture", disable=not shown, leave=False)
        self.description = None if shown else description
        self.total, self.done, self.last_line = total, 0, time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def advance(self, count: int) -> None:
        """Counts pictures that were drawn."""
        self.done += count
        self.bar.update(count)
        if self.description is not None and time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            log.info("%s: %d of %d pictures", self.description, self.done, self.total)
