"""Generates images in batches; an image depends only on its prompts, its seed and the settings."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from functools import cached_property, partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dora_mm.data.images.buckets import Size
from dora_mm.data.syntax import Wording
from dora_mm.models.images.editing import EditingModel
from dora_mm.models.images.image_model import ImageModel, Prompt
from dora_mm.models.images.schedulers import make_scheduler, title_of
from dora_mm.utils.progress import Progress

log = logging.getLogger(__name__)
MOST_ENCODED = 256  # images whose prompts are kept: some 1 MB each in models of full size

Prompts = tuple[Wording, Wording | None]  # of one image: the prompt, and the negative prompt or None
References = Sequence[Image.Image]  # of one image, prepared by its model


class UnusableImageError(ValueError):
    """An image that has values which are not numbers, or is black."""


class ImageSampler:
    """Draws batches of images, each with its own noise.

    An image does not depend on the others of its batch, up to rounding in the larger products.

    Args:
        model: The model. Without text encoders it generates the prompts that were encoded before those were released.
        prepare: Gets its pipeline ready, once it is needed.
    """

    def __init__(self, model: ImageModel, prepare: Callable[[Any], object] = lambda pipe: None):
        self.model, self._prepare = model, prepare
        self._schedulers: dict[str, Any] = {}
        self._encoded: dict[tuple[Prompts, str], Prompt] = {}

    @cached_property
    def pipe(self) -> Any:
        """The pipeline of the model, which is loaded for it. Its scheduler is replaced while a batch is generated."""
        pipe = self.model.pipeline()
        self._prepare(pipe)
        return pipe

    @cached_property
    def scheduler(self) -> Any:
        """The model's own scheduler."""
        return self.model.sampling_scheduler

    def load(self) -> None:
        """Loads all that the model still lacks."""
        assert self.pipe is not None

    def forget_prompts(self) -> None:
        """Encodes prompts again from now on, since the text encoders were changed; not where they were released."""
        if not any(map(self.model.components.is_released, self.model.text_encoders)):
            self._encoded.clear()

    @torch.no_grad()
    def keep_prompts(self, prompts: Iterable[tuple[Prompts, References]]) -> None:
        """Encodes the prompts of images beside their references, and frees the text encoders ahead of the denoiser."""
        for each, references in prompts:
            self._encode(each, references, most=len(self._encoded) + 1)
        self.model.components.release(self.model.text_encoders)

    def length(self, prompts: Prompts) -> int:
        """The length of the longer one of an image's prompts: images of a batch have the same."""
        return max(self.model.prompt_length(text) for text in prompts if text is not None)

    def scheduler_title(self, name: str | None) -> str:
        """A1111's name of a scheduler; `None` is the model's own."""
        return title_of(self._scheduler(name))

    def why_not(self, scheduler: str | None, steps: int) -> str | None:
        """Why a scheduler (None: the model's own) cannot generate in this number of steps; None if it can."""
        try:
            made = self._scheduler(scheduler)
        except ValueError as error:
            return f"scheduler: {error}"
        try:
            (deepcopy(made) if made is self.scheduler else made).set_timesteps(steps)
        except ValueError as error:
            return f"the scheduler cannot take {steps} steps: {error}"
        return None

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompts],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance: float,
        width: int,
        height: int,
        scheduler: str | None = None,
        guidance_rescale: float = 0.0,
        references: References = (),
        on_step: Callable[[float], object] | None = None,
    ) -> list[Image.Image | UnusableImageError]:
        """Generates a batch of images.

        Args:
            prompts: The prompts of each image; all have the same `length`.
            seeds: The seed of each.
            steps: The number of denoising steps.
            guidance: The scale of classifier-free guidance.
            width: In pixels.
            height: In pixels.
            scheduler: The name of the scheduler; None is the model's own.
            guidance_rescale: How much of the contrast that guidance adds is taken back, 0 to 1 (Lin et al. 2023, arXiv
                2305.08891, section 3.4), by families that have it.
            references: Reference images that all images are made of, prepared by a model that edits.
            on_step: Called after each denoising step with the share of them that is done.

        Returns:
            The images, with an error instead of each that cannot be used.
        """
        self.pipe.scheduler = self._scheduler(scheduler)
        encoded = [self._encode(each, references) for each in prompts]
        inputs = self.model.pipeline_inputs(encoded, steps=steps, guidance=guidance, width=width, height=height)
        if references:
            assert isinstance(self.model, EditingModel)
            inputs |= self.model.reference_inputs(references)
        if guidance_rescale:
            inputs["guidance_rescale"] = guidance_rescale
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        if on_step is not None:
            inputs["callback_on_step_end"] = partial(_after_step, on_step)
        try:
            generated = self.pipe(**inputs, generator=generators, output_type="pt")
        finally:
            self.pipe.scheduler = self.scheduler
        as_images = self.pipe.image_processor.postprocess
        return [problem_of(pixels) or as_images(pixels[None], "pil", [False])[0] for pixels in generated.images]

    def _scheduler(self, name: str | None) -> Any:
        """The scheduler of a name, made once: it warns where it does not suit the model."""
        if name is None:
            return self.scheduler
        if name not in self._schedulers:
            self._schedulers[name] = make_scheduler(name, self.scheduler)
        return self._schedulers[name]

    def _encode(self, prompts: Prompts, references: References = (), most: int = MOST_ENCODED) -> Prompt:
        """Encodes the prompts of one image alone, so that they do not depend on the batch in the last bits."""
        model = self.model
        are_read = bool(references) and isinstance(model, EditingModel) and model.prompts_see_references
        key = prompts, _digest(references) if are_read else ""
        if key not in self._encoded:
            if len(self._encoded) >= most:
                del self._encoded[next(iter(self._encoded))]
            if are_read:
                assert isinstance(model, EditingModel)
                self._encoded[key] = model.encode_edit_for_sampling(*prompts, references)
            else:
                self._encoded[key] = model.encode_for_sampling(*prompts)
        return self._encoded[key]


def _after_step(on_step: Callable[[float], object], pipe: Any, index: int, _time: Any, _tensors: Any) -> dict[str, Any]:
    on_step((index + 1) / pipe.num_timesteps)
    return {}  # changes nothing


def _digest(references: References) -> str:
    """SHA-256 of the pixels of references."""
    digest = hashlib.sha256()
    for image in references:
        digest.update(f"{image.size}{image.mode}".encode() + image.tobytes())
    return digest.hexdigest()


def problem_of(pixels: Tensor) -> UnusableImageError | None:
    """Says why an image (3, H, W), or (4, H, W) with alpha, cannot be used; None where it can."""
    if not pixels.isfinite().all():
        return UnusableImageError(
            "has values that are not numbers (NaN): in half precision some models need another VAE, see model.vae"
        )
    return None if pixels[:3].any() else UnusableImageError("is black")


def sample(
    model: ImageModel | ImageSampler,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 25,
    guidance: float = 5.0,
    guidance_rescale: float = 0.0,
    negative_prompt: str | None = None,
    batch_size: int = 8,
    height: int | None = None,
    width: int | None = None,
    references: Sequence[References] = (),
    metadata: str | None = None,
) -> list[Image.Image]:
    """Samples one image per pair of prompt and seed, all with the same settings.

    Args:
        model: The model, or what generates with it.
        prompts: The prompts.
        seeds: A seed for each prompt.
        steps: The number of denoising steps.
        guidance: The scale of classifier-free guidance.
        guidance_rescale: How much of the contrast that it adds is taken back, 0 to 1.
        negative_prompt: For all images. None is what the model takes without one; "" is the encoded empty text.
        batch_size: Images per batch.
        height: In pixels; None is the model's own, or that of the references.
        width: In pixels; None is the model's own, or that of the references.
        references: Reference images of each prompt, prepared by a model that edits; empty: there are none.
        metadata: What the progress is called; None shows none.

    Returns:
        The images, in the order of the prompts. Those that cannot be used are black, and named in the log.
    """
    sampler = model if isinstance(model, ImageSampler) else ImageSampler(model)
    settings = {"steps": steps, "guidance": guidance, "guidance_rescale": guidance_rescale}
    seen = references or [()] * len(prompts)
    sizes = [_size_of(sampler.model, each, (height, width)) for each in seen]
    items = [((prompt, negative_prompt), seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    groups: dict[tuple[int, int], list[int]] = {}
    for index, (item, _) in enumerate(items):
        groups.setdefault((sampler.length(item), id(seen[index])), []).append(index)
    images: dict[int, Any] = {}
    with Progress(metadata or "", len(items), "images", hidden=metadata is None) as progress:
        for group in groups.values():
            shared = {**settings, **dict(zip(("height", "width"), sizes[group[0]], strict=True))}
            for start in range(0, len(group), batch_size):
                batch = group[start : start + batch_size]
                prompts_of_batch, seeds_of_batch = zip(*(items[index] for index in batch), strict=True)
                with progress.part(len(batch)) as on_step:
                    given = {**shared, "references": seen[group[0]], "on_step": on_step}
                    generated = sampler.generate(prompts_of_batch, seeds_of_batch, **given)
                images |= zip(batch, generated, strict=True)
    for index, image in images.items():
        if isinstance(image, UnusableImageError):
            log.warning("The image of %r with seed %d %s.", prompts[index], seeds[index], image)
            height, width = sizes[index]
            images[index] = Image.new("RGB", (width, height))
    return [images[index] for index in range(len(items))]


def _size_of(model: ImageModel, references: References, given: tuple[int | None, int | None]) -> Size:
    """(h, w) of an image: as given, else that of the pipeline by its references, else the model's own."""
    own = (model.resolution, model.resolution)
    if references:
        assert isinstance(model, EditingModel)
        own = model.edited_size([(image.height, image.width) for image in references])
    return given[0] or own[0], given[1] or own[1]
