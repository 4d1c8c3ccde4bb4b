"""The loss of a slider: at strength t the denoiser should predict what lies t steps along an attribute.

Each micro-batch has one strength, so that each strength has a backward pass of its own. A checkpointed pass is repeated
in its backward pass, and repeats another one if the strength has changed in between. Micro-batches of a group have the
same noisy latents, and one of each strength. Shapes: B images, C channels of latents (h, w).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from dora_mm.config.images import DataConfig, LossConfig
from dora_mm.config.slider import Side, SliderConfig, TrainSliderConfig
from dora_mm.core import base_model, set_strength
from dora_mm.data.images.buckets import Framing
from dora_mm.data.images.folder import CaptionedImage, read_captioned_images
from dora_mm.models.images.image_model import ImageModel, Prompt
from dora_mm.models.images.noise import NoiseProcess
from dora_mm.tasks.diffusion import DiffusionTask
from dora_mm.tasks.image_batches import CaptionedBatches, free_vae
from dora_mm.tasks.prompt_encoder import PromptEncoder
from dora_mm.utils.losses import LossSum
from dora_mm.utils.randomness import generator

OWN_CAPTION = "slider.neutral"  # the source of the caption of images without one


@dataclass(frozen=True)
class SliderBatch:
    """B noisy latents, and what should be predicted for them at one strength."""

    noised: Tensor  # (B, C, h, w)
    times: Tensor  # (B,)
    prompts: Sequence[Prompt]  # B neutral captions
    framings: Sequence[Framing]
    target: Tensor  # (B, C, h, w), float32
    weights: Tensor  # (B,) of the losses, by their times
    strength: float


class SliderTask:
    """The loss of the denoiser at the strength of a batch, which stays set for the backward pass.

    Args:
        model: The model, adapted or not yet.
    """

    def __init__(self, model: ImageModel):
        self.model = model

    def loss(self, batch: SliderBatch, stream: torch.Generator) -> LossSum:
        """The mean squared error of each image times its weight, summed, and the number of images.

        Args:
            batch: The batch, which has all of its noise already.
            stream: Unused: the noise of a group of micro-batches is the same.
        """
        set_strength(self.model.components[self.model.denoiser], batch.strength)
        predicted = self.model.predict(batch.noised, batch.times, batch.prompts, batch.framings)
        errors = (predicted.float() - batch.target).square().mean(dim=(1, 2, 3)) * batch.weights
        return LossSum(errors.sum(), torch.tensor(float(len(errors)), device=errors.device))


def denoised_once(noise: NoiseProcess, x: Tensor, predicted: Tensor, t: Tensor, lower: Tensor) -> Tensor:
    """Noisy latents (B, C, h, w) one deterministic step less noisy.

    DDIM (Song et al. 2021, arXiv 2010.02502, equation 12 with sigma 0) for models that predict noise or v, Euler for
    those that predict a velocity: the latents and the noise that follow from the prediction, at the lower time.

    Args:
        noise: The noise process.
        x: The noisy latents.
        predicted: What the denoiser predicts for them.
        t: Their times (B,).
        lower: The times (B,) of the result.
    """
    clean, zeros = noise.clean(x, predicted, t), torch.zeros_like(x)
    e = (x - noise.noised(clean, zeros, t)) / noise.noised(zeros, torch.ones_like(x), t)
    return noise.noised(clean, e, lower)


class CaptionSliderBatches:
    """Batches of a slider between two captions, which need no images.

    The base model denoises the neutral caption from noise up to a step of its schedule, as the reference trainers do
    (the original concept sliders and ai-toolkit, both with guidance 3). Theirs has the adapter at work there; here the
    latents depend on (seed, number) alone, so that a resumed run repeats them. All images of a batch have one time.

    Args:
        model: The model.
        config: The config.
        process: (index, count) if several processes share the work.
    """

    def __init__(self, model: ImageModel, config: TrainSliderConfig, process: tuple[int, int] = (0, 1)):
        self.model, self.config, self.process = model, config.slider, process
        self.strengths, self.seed, self.batch_size = config.strengths, config.seed, config.train.batch_size
        self.prompts = PromptEncoder(model, trained=False)
        side = config.slider.resolution or model.resolution
        self.framing = Framing((side, side), (side, side), 0, 0, (side, side), False)
        self._last: tuple[int, _Group] | None = None

    @property
    def captions(self) -> list[str]:
        """All captions, each once; the empty one is that of guidance."""
        things = self.config.things or (None,)
        found = [self.config.caption(key, thing) for thing in things for key in get_args(Side)]
        return list(dict.fromkeys([*found, *([""] if self.config.guidance != 1 else [])]))

    def encode_all(self) -> None:
        """Encodes the captions ahead, so that the text encoders can be released."""
        self.prompts.keep(self.captions, 1)

    def __call__(self, number: int) -> SliderBatch:
        """This process's micro-batch of this number, on the model's device."""
        group, index = divmod(number, len(self.strengths))
        found, strength = self._group(group), self.strengths[index]
        target = found.neutral + strength * self.config.eta * found.direction
        weights = torch.ones(self.batch_size, device=target.device)
        return SliderBatch(found.noised, found.times, found.prompts, found.framings, target, weights, strength)

    @torch.no_grad()
    def _group(self, group: int) -> _Group:
        """What the micro-batches of a group share; the last one is kept."""
        if self._last is None or self._last[0] != group:
            with base_model([self.model.components[self.model.denoiser]]):
                self._last = group, self._computed(group * self.process[1] + self.process[0])
        return self._last[1]

    def _computed(self, number: int) -> _Group:
        things = self._things(number)
        framings = [self.framing] * self.batch_size
        noised, times = self._noised(number, things, framings)

        def predict(key: Side) -> Tensor:
            prompts = self.prompts([self.config.caption(key, thing) for thing in things])
            return self.model.predict(noised, times, prompts, framings).float()

        prompts = self.prompts([self.config.caption("neutral", thing) for thing in things])
        return _Group(noised, times, prompts, framings, predict("neutral"), predict("plus") - predict("minus"))

    def measured_passes(self) -> int:
        """Runs a few passes of the base model on a device that may still be busy; returns their number."""
        self._last = None
        group = self._group(0)
        group.direction.sum().item()  # waits for a GPU
        done = self._num_done(self.process[0])
        return (1 if self.config.guidance == 1 else 2) * done + 3

    def _num_done(self, number: int) -> int:
        """The steps up to which the latents of a batch of all processes are denoised."""
        return int(
            torch.randint(self.config.denoising_steps, (), generator=generator(self.seed, number, "slider steps"))
        )

    def _things(self, number: int) -> list[str | None]:
        """The thing of each image of a batch of all processes."""
        if not self.config.things:
            return [None] * self.batch_size
        stream = generator(self.seed, number, "slider things")
        rows = torch.randint(len(self.config.things), (self.batch_size,), generator=stream).tolist()
        return [self.config.things[row] for row in rows]

    def _noised(self, number: int, things: Sequence[str | None], framings: Sequence[Framing]) -> tuple[Tensor, Tensor]:
        """The noisy latents of a batch, denoised up to a random step, and their times."""
        noise, steps, shape = self.model.noise, self.config.denoising_steps, self._shape()
        done = self._num_done(number)
        shares = 1 - torch.arange(steps) / steps
        levels = noise.times(shares, shape[2:]).to(self.model.device)
        x = torch.randn(shape, generator=generator(self.seed, number, "slider noise")).to(self.model.device)
        neutral = self.prompts([self.config.caption("neutral", thing) for thing in things])
        for step in range(done):
            t, lower = (levels[each].expand(self.batch_size) for each in (step, step + 1))
            x = denoised_once(noise, x, self._guided(x, t, neutral, framings), t, lower)
        return x, levels[done].expand(self.batch_size)

    def _guided(self, x: Tensor, t: Tensor, neutral: Sequence[Prompt], framings: Sequence[Framing]) -> Tensor:
        """The base model's prediction with classifier-free guidance, float32."""
        predicted, guidance = self.model.predict(x, t, neutral, framings).float(), self.config.guidance
        if guidance == 1:
            return predicted
        if self.model.unconditional == "empty":
            empty = self.prompts([""] * self.batch_size)
        else:
            empty = [{name: 0 * tensor for name, tensor in prompt.items()} for prompt in neutral]
        without = self.model.predict(x, t, empty, framings).float()
        return without + guidance * (predicted - without)

    def _shape(self) -> tuple[int, int, int, int]:
        """(B, C, h, w) of the latents that the denoiser takes."""
        model, (height, width) = self.model, self.framing.target_size
        channels = model.vae_channels * (model.downscale // model.vae_downscale) ** 2
        return self.batch_size, channels, height // model.downscale, width // model.downscale


@dataclass(frozen=True)
class _Group:
    """What micro-batches of all strengths have in common."""

    noised: Tensor
    times: Tensor
    prompts: Sequence[Prompt]
    framings: Sequence[Framing]
    neutral: Tensor  # v0(neutral), (B, C, h, w), float32
    direction: Tensor  # v0(plus) - v0(minus)


class PairSliderBatches:
    """Batches of a slider between two folders of images: pairs have the same noise and time.

    At strength 1 the target is that of the plus image, and at -1 that of the minus image. Losses have the weights, and
    times the distribution, that a training on images has by default.

    Args:
        model: The model.
        config: The config.
        pairs: The images of both folders, from `read_pairs`.
        process: (index, count) if several processes share the work.
    """

    def __init__(
        self,
        model: ImageModel,
        config: TrainSliderConfig,
        pairs: tuple[Sequence[CaptionedImage], Sequence[CaptionedImage]],
        process: tuple[int, int] = (0, 1),
    ):
        self.model, self.seed, self.process, self.strengths = model, config.seed, process, config.strengths
        self.task, self.prompts = DiffusionTask(model, LossConfig()), PromptEncoder(model, trained=False)
        self.data = data_of(config.slider, model)
        self.sides = [
            CaptionedBatches(
                model,
                images,
                self.prompts,
                self.data,
                batch_size=config.train.batch_size,
                seed=config.seed,
                process=process,
            )
            for images in pairs
        ]

    @property
    def captions(self) -> list[str]:
        """All captions, each once."""
        return list(dict.fromkeys(image.caption for image in self.sides[0].images))

    def encode_all(self) -> None:
        """Encodes captions and images ahead, so that text encoders can be released, and the VAE leaves the device."""
        for side in self.sides:
            side.encode_all()
        free_vae(self.model, self.data)

    @torch.no_grad()
    def __call__(self, number: int) -> SliderBatch:
        """This process's micro-batch of this number, on the model's device."""
        group, index = divmod(number, len(self.strengths))
        strength, device = self.strengths[index], self.model.device
        batch = self.sides[0 if strength > 0 else 1](group)
        stream = generator(self.seed, group * self.process[1] + self.process[0], "slider noise")
        e = self.task.sample_noise(batch.latents, stream)
        shares = torch.rand(len(e), generator=stream)
        times = self.task.times_at(shares, e.shape[2:]).to(device)
        noised, target = (
            self.task.noise.noised(batch.latents, e, times),
            self.task.noise.target(batch.latents, e, times),
        )
        weights = self.task.weights(times)
        return SliderBatch(noised, times, batch.prompts, batch.framings, target.float(), weights, strength)


Pairs = tuple[Sequence[CaptionedImage], Sequence[CaptionedImage]]
SliderBatches = CaptionSliderBatches | PairSliderBatches


def data_of(config: SliderConfig, model: ImageModel) -> DataConfig:
    """The `data` section of a training on the images of pairs."""
    assert config.images is not None
    return DataConfig(folder=config.images.plus, resolution=config.resolution or model.resolution)


def read_pairs(config: SliderConfig) -> tuple[list[CaptionedImage], list[CaptionedImage]] | None:
    """The images of both folders in one order, with the captions of the plus images; None: there are no folders.

    Raises:
        ValueError: A folder cannot be read, an image has no other of its name, or both differ in size.
    """
    if config.images is None:
        return None
    plus, minus = (_by_name(folder, f"slider.images.{side}") for side, folder in config.images)
    where = f"slider.images: {config.images.plus} and {config.images.minus}"
    if unpaired := sorted(plus.keys() ^ minus.keys()):
        raise ValueError(f"{where} have no pair for {', '.join(unpaired[:8])}{', ...' if len(unpaired) > 8 else ''}")
    for name, image in plus.items():
        if image.size != minus[name].size:
            sizes = " and ".join(f"{h} x {w}" for h, w in (image.size, minus[name].size))
            raise ValueError(f"{where} have {name} in two sizes ({sizes}, h x w): the images of a pair need one")
    captions = {name: _caption(image, config.neutral) for name, image in plus.items()}
    first, second = (
        [side[name]._replace(caption=captions[name], more=(), references=()) for name in plus] for side in (plus, minus)
    )
    return first, second


def _by_name(folder: str, key: str) -> dict[str, CaptionedImage]:
    """The images of a folder by their names without ending, sorted."""
    images = read_captioned_images(folder, instance_prompt=OWN_CAPTION, prompt_key=OWN_CAPTION, key=key)
    return {image.path.stem: image for image in images}


def _caption(image: CaptionedImage, neutral: str) -> str:
    return neutral if image.caption == OWN_CAPTION else image.caption


def slider_batches(
    config: TrainSliderConfig,
    model: ImageModel,
    pairs: tuple[Sequence[CaptionedImage], Sequence[CaptionedImage]] | None,
    process: tuple[int, int],
) -> SliderBatches:
    """The batches of a training, of a process (index, count)."""
    if pairs is None:
        return CaptionSliderBatches(model, config, process)
    return PairSliderBatches(model, config, pairs, process)
