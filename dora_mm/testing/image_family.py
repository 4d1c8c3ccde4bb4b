"""Check of a family of image models: against its pipeline of diffusers, and for what every family promises."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

import dora_mm
from dora_mm.config.models import ModelConfig, validated
from dora_mm.core import DoRASpec
from dora_mm.data.images.buckets import Framing
from dora_mm.models.images.families import family_of, load_image_model
from dora_mm.models.images.vae import posterior_of
from dora_mm.sampling.image_sampler import sample
from dora_mm.testing.common import CLOSE, distance, failures, randomize, resume_failures, write_images

SHORT, LONG = "a cat", "a small red ball beside a large green tree, in front of a house"
SEED, STEPS, GUIDANCE = 3, 3, 5.0
LEVELS = 2  # of 255: how far images may be apart


def check_image_family(
    folder: str | Path, settings: Mapping[str, Any] | None = None, *, trains: bool = True
) -> list[str]:
    """Checks a family of image models on a model of it, which should be tiny.

    Args:
        folder: The model, as a folder of diffusers.
        settings: The family's section of the config.
        trains: Whether trainings run, too: one at once, one that is resumed.

    Returns:
        A sentence for each failure; empty: the family is right.
    """
    check = ImageFamilyCheck(Path(folder), settings or {})
    found = [check.noise_levels, check.images, check.steps, check.guidance, check.latents, check.batch]
    return failures([*found, check.fresh_adapter, check.adapter_file, *([check.resume] if trains else [])])


@dataclass
class Calls:
    """The inputs of a denoiser and of a VAE's decoder, in the order of calls.

    Attributes:
        denoised: The latents that the denoiser is given, flat.
        decoded: The latents that the VAE decodes.
    """

    denoised: list[Tensor] = field(default_factory=list)
    decoded: list[Tensor] = field(default_factory=list)


class ImageFamilyCheck:
    """The checks of a model: each returns a sentence per failure.

    Args:
        folder: The model.
        settings: The family's section of the config.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        name = family_of(str(folder)).name
        self.folder = folder
        self.section = {"path": str(folder), **({name: dict(settings)} if settings else {})}
        self.model: Any = load_image_model(validated(ModelConfig, self.section))
        self.side = self.model.resolution
        self.framing = Framing((self.side, self.side), (self.side, self.side), 0, 0, (self.side, self.side), False)

    @cached_property
    def official(self) -> Any:
        """The pipeline as diffusers itself opens it."""
        pipe = self.model.pipeline_class().from_pretrained(self.folder)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @property
    def denoiser(self) -> nn.Module:
        return self.model.components[self.model.denoiser]

    @cached_property
    def pixels(self) -> Tensor:
        """An image of noise (1, 3, H, W)."""
        return torch.rand(1, 3, self.side, self.side, generator=torch.Generator().manual_seed(SEED)) * 2 - 1

    @cached_property
    def shape(self) -> torch.Size:
        """Of the latents of an image as the denoiser has them."""
        return self.model.normalized(self.model.encode_images(self.pixels).mean).shape

    # --- against the pipeline ----------------------------------------------------------------------------------------

    def noise_levels(self) -> list[str]:
        self._sampled()
        _, pipe = self._pipeline_calls(GUIDANCE)
        ours, theirs = pipe.scheduler.sigmas.float(), self.official.scheduler.sigmas.float()
        if distance(ours, theirs) <= CLOSE:
            return []
        both = [", ".join(f"{level:.3f}" for level in levels) for levels in (ours, theirs)]
        return [f"noise levels of {STEPS} steps: {both[0]}, where the pipeline has {both[1]}"]

    def images(self) -> list[str]:
        apart = _apart(self._generated(), self._sampled())
        return [f"images are {apart} of 255 away from those of plain diffusers"] if apart > LEVELS else []

    def steps(self) -> list[str]:
        return self._steps(1.0)

    def guidance(self) -> list[str]:
        return self._steps(GUIDANCE)

    def latents(self) -> list[str]:
        found = []
        calls, pipe = self._pipeline_calls(1.0)
        _, last = self._predicted(pipe, 1.0)
        normalized = self.model.normalized(_of_one_frame(calls.decoded[0]))
        if distance(normalized, last) > CLOSE:
            found.append("`normalized` is not the inverse of what the pipeline does to latents before it decodes them")
        mode = _of_one_frame(posterior_of(self.official.vae, self.pixels).mode())
        if distance(self.model.encode_images(self.pixels).mean, mode) > CLOSE:
            found.append("`encode_images` is not the posterior of the VAE")
        return found

    def _steps(self, guidance: float) -> list[str]:
        """Whether the denoiser gets the same latents in each step by `predict` and in the pipeline."""
        calls, pipe = self._pipeline_calls(guidance)
        ours, _ = self._predicted(pipe, guidance)
        for step, latents in enumerate(ours):
            theirs = calls.denoised[step * len(calls.denoised) // STEPS][: len(latents)]
            if distance(latents, theirs) > CLOSE:
                what = f"with guidance {guidance:g}" if guidance > 1 else "without guidance"
                return [f"`predict` {what}: the latents of step {step + 1} are not those of the pipeline"]
        return []

    def _pipeline_calls(self, guidance: float) -> tuple[Calls, Any]:
        """A run of the pipeline with the family's own inputs, and the pipeline."""
        encoded = [self.model.encode_for_sampling(LONG, "")]
        sizes = {"width": self.side, "height": self.side}
        inputs = self.model.pipeline_inputs(encoded, steps=STEPS, guidance=guidance, **sizes)
        pipe = self.model.pipeline()
        with self._recorded() as calls, torch.no_grad():
            pipe(**inputs, generator=torch.Generator().manual_seed(SEED), output_type="pt")
        return calls, pipe

    def _predicted(self, pipe: Any, guidance: float) -> tuple[list[Tensor], Tensor]:
        """The inputs of the denoiser in each step by `predict`, from the pipeline's noise, and the last latents."""
        scheduler = deepcopy(pipe.scheduler)
        scheduler._step_index = scheduler._begin_index = None
        x = torch.randn(self.shape, generator=torch.Generator().manual_seed(SEED))
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
        prompts, ours = self.model.encode_prompts([LONG, ""]), []
        with torch.no_grad():
            for t in scheduler.timesteps:
                scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
                time = (t if self.model.noise.num_steps else t / scheduler.config.num_train_timesteps).expand(1)
                with self._recorded() as calls:
                    with_prompt, without = (self.model.predict(scaled, time, [p], [self.framing]) for p in prompts)
                ours.append(calls.denoised[0])
                x = scheduler.step(self._guided(with_prompt, without, guidance), t, x, return_dict=False)[0]
        return ours, x

    def _guided(self, with_prompt: Tensor, without: Tensor, guidance: float) -> Tensor:
        """A prediction with classifier-free guidance, as the pipeline makes it of two."""
        found = without + guidance * (with_prompt - without)
        if guidance == 1 or not getattr(self.model, "rescales_guided_tokens", False):
            return found
        tokens, wanted = (pixel_unshuffle(each, self.model.patch) for each in (found, with_prompt))
        return pixel_shuffle(
            tokens * wanted.norm(dim=1, keepdim=True) / tokens.norm(dim=1, keepdim=True), self.model.patch
        )

    def _generated(self) -> Image.Image:
        settings = {"steps": STEPS, "guidance": GUIDANCE, "height": self.side, "width": self.side}
        return sample(self.model, [LONG], [SEED], negative_prompt="", **settings)[0]

    def _sampled(self) -> Image.Image:
        """The image of plain diffusers: the family's numbers, but texts and no noise levels of its own."""
        encoded = [self.model.encode_for_sampling(LONG, "")]
        sizes = {"width": self.side, "height": self.side}
        inputs = self.model.pipeline_inputs(encoded, steps=STEPS, guidance=GUIDANCE, **sizes)
        numbers = {key: value for key, value in inputs.items() if isinstance(value, int | float)}
        texts: dict[str, Any] = {"prompt": LONG, "negative_prompt": "", "num_inference_steps": STEPS}
        if most := getattr(self.model.settings, "max_tokens", None):
            texts["max_sequence_length"] = most
        known = inspect.signature(type(self.official).__call__).parameters
        inputs = numbers | {key: value for key, value in texts.items() if key in known}
        return self.official(**inputs, generator=torch.Generator().manual_seed(SEED)).images[0]

    @contextmanager
    def _recorded(self) -> Iterator[Calls]:
        """A context in which the inputs of the denoiser and of the VAE's decoder are kept."""
        calls, vae = Calls(), self.model.vae
        first = next(iter(inspect.signature(self.denoiser.forward).parameters))

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else kwargs[first]
            tensors = given if isinstance(given, list | tuple) else [given]
            calls.denoised.append(torch.cat([tensor.flatten().clone() for tensor in tensors]))

        def decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.decoded.append(z.clone())
            return type(vae).decode(vae, z, *args, **kwargs)

        hook = self.denoiser.register_forward_pre_hook(keep, with_kwargs=True)
        vae.decode = decode
        try:
            yield calls
        finally:
            hook.remove()
            del vae.decode

    # --- what every family promises ----------------------------------------------------------------------------------

    def batch(self) -> list[str]:
        both = self._predict([SHORT, LONG])
        rows = [self._predict([prompt], row) for row, prompt in enumerate((SHORT, LONG))]
        if max(distance(both[row], one_by_one[0]) for row, one_by_one in enumerate(rows)) > CLOSE:
            return ["a prompt in a batch with a longer one, which pads it, is not predicted as it is alone"]
        return []

    def fresh_adapter(self) -> list[str]:
        found, before = [], self._predict([SHORT, LONG])
        with self._adapted():
            if not torch.equal(self._predict([SHORT, LONG]), before):
                found.append("a fresh adapter changes what the model predicts")
            randomize([self.denoiser])
            if distance(self._predict([SHORT, LONG]), before) < CLOSE:
                found.append("an adapter of the target map's default parts changes nothing")
            dora_mm.set_strength(self.denoiser, 0.0)
            if not torch.equal(self._predict([SHORT, LONG]), before):
                found.append("an adapter at strength 0 changes what the model predicts")
        return found

    def adapter_file(self) -> list[str]:
        with TemporaryDirectory() as folder, self._adapted():
            randomize([self.denoiser])
            dora_mm.save_adapter({self.model.denoiser: self.denoiser}, folder)
            ours = self._generated()
            self.official.load_lora_weights(folder)
        try:
            apart = _apart(ours, self._sampled())
        finally:
            self.official.unload_lora_weights()
        if apart <= LEVELS:
            return []
        return [f"images with the adapter's file are {apart} of 255 away from those of load_lora_weights of diffusers"]

    def resume(self) -> list[str]:
        with TemporaryDirectory() as scratch:
            sides = dict.fromkeys((f"{number}.png" for number in range(4)), (self.side, self.side))
            images = write_images(Path(scratch) / "images", sides)
            config = {
                "pipeline": "train_diffusion",
                "model": self.section,
                "adapter": {"rank": 2},
                "data": {"folder": str(images), "resolution": self.side, "instance_prompt": LONG},
                "optimizer": {"lr": 0.1},
            }
            return resume_failures(Path(scratch), config)

    def _predict(self, prompts: list[str], row: int = 0) -> Tensor:
        """The predictions of rows of two noised latents, from a row on."""
        rows = slice(row, row + len(prompts))
        x = torch.randn(2, *self.shape[1:], generator=torch.Generator().manual_seed(SEED))
        time = self.model.noise.times(torch.tensor([0.3, 0.7]), self.shape[2:])
        encoded = self.model.encode_prompts(prompts)
        with torch.no_grad():
            return self.model.predict(x[rows], time[rows], encoded, [self.framing] * len(prompts))

    @contextmanager
    def _adapted(self) -> Iterator[None]:
        """A context in which the default parts of the denoiser are adapted."""
        dora_mm.inject(self.denoiser, self.model.target_maps[self.model.denoiser], DoRASpec(rank=4))
        try:
            yield
        finally:
            dora_mm.remove(self.denoiser)


def _of_one_frame(latents: Tensor) -> Tensor:
    return latents.squeeze(2) if latents.ndim == 5 else latents


def _apart(ours: Image.Image, theirs: Image.Image) -> int:
    """The largest difference of two images, of 255."""
    both = [np.asarray(image, dtype=int) for image in (ours, theirs)]
    return int(np.abs(both[0] - both[1]).max()) if both[0].shape == both[1].shape else 255
