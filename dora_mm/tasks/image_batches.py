"""Batches of captioned images: latents, encoded captions, and how each image was brought to its size."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property, partial

import torch

from dora_mm.config.images import DataConfig, TrainDiffusionConfig
from dora_mm.core import base_model
from dora_mm.data.images.buckets import Framing, frame
from dora_mm.data.images.folder import CaptionedImage, bucket_of
from dora_mm.data.images.latents import LatentCache, Latents, latent_key
from dora_mm.data.images.masks import ALPHA, load_mask, render_mask
from dora_mm.data.images.order import ImageOrder
from dora_mm.data.images.pixels import load_rgb, render
from dora_mm.data.images.tensor_cache import TensorCache
from dora_mm.data.images.wording import rendered, unchanged
from dora_mm.data.seen import read_as
from dora_mm.models.images.image_model import ImageModel, Prompt
from dora_mm.tasks.diffusion import ConditionedLatents
from dora_mm.utils.progress import Progress, tracked
from dora_mm.utils.randomness import generator


class PromptEncoder:
    """Encodes captions: once each if the text encoders are frozen, every time if they are trained.

    What is encoded once is kept in main memory: it may be the captions of many epochs, which vary.
    Those with new tokens are encoded every time in any case.

    Args:
        model: The model whose text encoders are used.
        trained: The text encoders are trained.
        folder: Where encoded captions are kept, by content; None: in memory. Each is then encoded alone, so that it
            depends on no other one in its last bits.
    """

    def __init__(self, model: ImageModel, *, trained: bool, folder: str | None = None):
        self.model, self.trained = model, trained
        self._cache: dict[str, Prompt] = {}
        self._files = TensorCache(folder) if folder is not None else None

    @property
    def needs_encoders(self) -> bool:
        """Whether a training needs the text encoders after all captions were encoded ahead that can be."""
        return self.trained or bool(self.model.new_tokens.counts)

    def changes(self, caption: str) -> bool:
        """Whether a caption is encoded to something else after a step."""
        return self.trained or self.model.new_tokens.occur_in(caption)

    def keep(self, captions: Sequence[str], batch_size: int = 16) -> None:
        """Encodes captions ahead of training, so that the text encoders can be released; none that changes."""
        captions = [caption for caption in captions if not self.changes(caption)]
        if self._files is not None:
            keys = {caption: self._key(caption) for caption in dict.fromkeys(captions)}
            missing = {caption for caption, key in keys.items() if not self._files.has(key)}
            self._files.report((key for caption, key in keys.items() if caption not in missing), "encoded captions")
            for caption in tracked([each for each in keys if each in missing], "encoding captions", "captions"):
                self._write(caption)
            return
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._cache]
        if not new:
            return
        with Progress("encoding captions", len(new), "captions") as progress, torch.no_grad():
            for part in self._of_one_length(new, batch_size):
                for caption, prompt in zip(part, self.model.encode_prompts(part), strict=True):
                    self._cache[caption] = {name: tensor.cpu() for name, tensor in prompt.items()}
                progress.advance(len(part))

    def __call__(self, captions: Sequence[str]) -> list[Prompt]:
        """Encodes captions of any length; each conditions the denoiser as it does alone."""
        rows = [index for index, caption in enumerate(captions) if self.changes(caption)]
        changing = self.model.encode_prompts([captions[index] for index in rows]) if rows else []
        anew = dict(zip(rows, changing, strict=True))
        if self._files is None:
            self.keep(captions)
        return [anew[index] if index in anew else self._kept(caption) for index, caption in enumerate(captions)]

    def _kept(self, caption: str) -> Prompt:
        """A caption that was encoded ahead, on the model's device."""
        found = self._cache[caption] if self._files is None else self._files.read(self._key(caption), ("text",))
        found = self._write(caption) if found is None else found
        return {name: tensor.to(self.model.device) for name, tensor in found.items()}

    @property
    def bytes_per_caption(self) -> float | None:
        """The main memory that an encoded caption takes, on average over those that there are; None: there is none."""
        sizes = [sum(tensor.nbytes for tensor in prompt.values()) for prompt in self._cache.values()]
        return sum(sizes) / len(sizes) if sizes else None

    @cached_property
    def _identity(self) -> str:
        return self.model.text_identity

    def _key(self, caption: str) -> str:
        return hashlib.sha256(f"{self._identity} {caption}".encode()).hexdigest()

    @torch.no_grad()
    def _write(self, caption: str) -> Prompt:
        assert self._files is not None
        if all(self.model.components.is_released(name) for name in self.model.text_encoders):
            raise ValueError(f"data.text_cache: {self._files.path(self._key(caption))} is lost: resume the run")
        (prompt,) = self.model.encode_prompts([caption])
        self._files.write(self._key(caption), prompt)
        return prompt

    def _of_one_length(self, captions: Sequence[str], batch_size: int) -> Iterator[list[str]]:
        """Batches of captions of one length, so that none is padded."""
        groups = defaultdict(list)
        for caption in captions:
            groups[self.model.prompt_length(caption)].append(caption)
        for group in groups.values():
            yield from (group[start : start + batch_size] for start in range(0, len(group), batch_size))


class CaptionedBatches:
    """Maps a batch number to a batch, which depends only on (seed, number, process).

    All images of a batch have one shape; every epoch contains every image `data.repeats` times, times the `repeats` of
    its folder and, with `data.subfolders`, the number in the name of its subfolder (see `ImageOrder`). Latents are
    sampled from the VAE's posterior again each time; that of an image with a fixed crop is computed once.

    Args:
        model: The model whose VAE encodes the images.
        images: The images with their captions.
        prompts: Encodes the captions.
        config: The `data` section.
        batch_size: Images per batch.
        seed: Seed of order, crops, dropped captions and latents.
        process: (index, count) if several processes share the work.
    """

    def __init__(
        self,
        model: ImageModel,
        images: Sequence[CaptionedImage],
        prompts: PromptEncoder,
        config: DataConfig,
        *,
        batch_size: int,
        seed: int,
        process: tuple[int, int] = (0, 1),
    ):
        self.model, self.images, self.prompts, self.config = model, images, prompts, config
        self.batch_size, self.seed, self.process = batch_size, seed, process
        self.cache = LatentCache(config.latent_cache)
        self.vae_identity = model.vae_identity
        self.buckets = [bucket_of(image, config) for image in images]
        repeats = [config.repeats * image.repeats for image in images]
        self.order = ImageOrder(self.buckets, repeats, batch_size, seed)
        weights = [config.folders[image.folder].weight if config.folders else 1.0 for image in images]
        self.weights = torch.tensor(weights)  # of the images' losses
        self._masks: dict[tuple[object, ...], torch.Tensor] = {}

    def encode_all(self, num_batches: int | None = None) -> None:
        """Encodes ahead what stays the same: captions of all epochs, and images if crops are fixed.

        Args:
            num_batches: Those of the training, of each process; None: only `fixed` batches are requested.
        """
        if not self.prompts.trained:
            # The captions of a longer training are more: encoded together, they would differ in their last bits
            varies = self.config.captions is not None or any(image.more for image in self.images)
            self.prompts.keep([*self.captions(num_batches), ""], 1 if varies else 16)
        if self.config.crop == "center":
            kept = []
            for index in tracked(range(len(self.images)), "encoding images", "images"):
                for flip in (False, True) if self.config.flip else (False,):
                    framing = self._frame(index, flip, None)
                    if self.cache.has(key := self._key(index, framing)):
                        kept.append(key)
                    else:
                        self._latents(index, framing)
            self.cache.report(kept)

    def captions(self, num_batches: int | None = None) -> list[str]:
        """All captions of a training of so many batches, each once; None: those of `fixed` batches."""
        settings = self.config.captions
        if num_batches is None:
            return list(dict.fromkeys(unchanged(image, settings) for image in self.images))
        if settings is None and not any(image.more for image in self.images):
            return list(dict.fromkeys(image.caption for image in self.images))
        epochs = range(self.order.epoch(num_batches * self.process[1] - 1) + 1)
        found = (rendered(image, settings, self.seed, epoch) for epoch in epochs for image in self.images)
        return list(dict.fromkeys(found))

    def __call__(self, number: int) -> ConditionedLatents:
        """This process's batch of this number, on the model's device."""
        index, count = self.process
        number = number * count + index
        rows = self.order(number)
        stream = generator(self.seed, number, "framing")
        framings = [
            self._frame(row, self.config.flip and bool(torch.rand((), generator=stream) < 0.5), stream) for row in rows
        ]
        latents = [self._latents(row, framing) for row, framing in zip(rows, framings, strict=True)]
        captions = self._captions(number)
        dropping = torch.rand(len(rows), generator=generator(self.seed, number, "captions"))
        dropped = (dropping < self.config.caption_dropout).tolist()
        sampled = together(latents).sample(generator(self.seed, number, "latents"))
        return ConditionedLatents(
            self.model.normalized(sampled).to(self.model.device),
            self.encode(captions, dropped),
            framings,
            self.weights[rows],
            self._masks_of(rows, framings),
            self.encode_by_base(captions, dropped) if self.config.mask and self.config.mask.outside == "base" else None,
        )

    def captions_of(self, number: int) -> list[str]:
        """The captions of this process's batch of this number, none of them dropped."""
        return self._captions(number * self.process[1] + self.process[0])

    def counts(self, number: int) -> tuple[float, int]:
        """The sum of the weights of all processes' batches of this number, and the number of their images."""
        first, count = number * self.process[1], self.process[1]
        rows = [row for each in range(first, first + count) for row in self.order(each)]
        return float(self.weights[rows].sum()), len(rows)

    def fixed(self, rows: Sequence[int]) -> ConditionedLatents:
        """Images of one shape, by their numbers, with their captions; nothing in it is sampled again.

        `data.crop` must be `center`, since the latents of other crops are not kept.
        """
        framings, latents = [self._frame(row, False, None) for row in rows], []
        for row, framing in zip(rows, framings, strict=True):
            stream = generator(0, 0, f"fixed latents of {self.images[row].digest}")
            latents.append(self._latents(row, framing).sample(stream))
        prompts = self.prompts([unchanged(self.images[row], self.config.captions) for row in rows])
        normalized = self.model.normalized(torch.stack(latents)).to(self.model.device)
        return ConditionedLatents(normalized, prompts, framings, masks=self._masks_of(rows, framings))

    def _frame(self, index: int, flip: bool, stream: torch.Generator | None) -> Framing:
        return frame(self.images[index].size, self.buckets[index], self.config.crop, stream, flip)

    def _latents(self, index: int, framing: Framing) -> Latents:
        image = self.images[index]

        def compute() -> Latents:
            content = partial(read_as, digest=image.digest)
            pixels = render(load_rgb(image.path, self.config.background, content), framing)
            mean, logvar = self.model.encode_images(pixels[None])
            return Latents(mean[0], None if logvar is None else logvar[0])

        if self.config.crop == "random":  # a new crop every time: a cache would never be hit
            return LatentCache().get("", compute, image.path)
        return self.cache.get(self._key(index, framing), compute, image.path)

    def _key(self, index: int, framing: Framing) -> str:
        return latent_key(self.images[index].digest, framing, self.config.background, self.vae_identity)

    def _masks_of(self, rows: Sequence[int], framings: Sequence[Framing]) -> torch.Tensor | None:
        """The loss weight of each latent pixel (B, h, w), or None without masks."""
        if self.config.mask is None:
            return None
        masks = [self._mask(self.images[row], framing) for row, framing in zip(rows, framings, strict=True)]
        return torch.stack(masks).clamp(min=self.config.mask.floor)

    def _mask(self, image: CaptionedImage, framing: Framing) -> torch.Tensor:
        height, width = (side // self.model.downscale for side in framing.target_size)
        key = (image.digest, image.mask, image.mask_file and image.mask_file.red, framing)
        found = self._masks.get(key) if image.mask else torch.ones(height, width)
        if found is None:
            digest = image.digest if image.mask == ALPHA else image.mask
            file = None if image.mask == ALPHA else image.mask_file
            mask = load_mask(image.path, file, partial(read_as, digest=digest))
            assert mask is not None
            found = render_mask(mask, framing, (height, width))
            if self.config.crop == "center":  # else there is a new one every time
                self._masks[key] = found
        return found

    def _captions(self, number: int) -> list[str]:
        """The captions of batch `number` of all processes together."""
        epoch, settings = self.order.epoch(number), self.config.captions
        return [rendered(self.images[row], settings, self.seed, epoch) for row in self.order(number)]

    def encode(self, captions: Sequence[str], dropped: Sequence[bool]) -> list[Prompt]:
        """Encodes captions; those that are dropped become the unconditional embedding."""
        if self.model.unconditional == "empty":
            return self.prompts(["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)])
        encoded = zip(self.prompts(captions), dropped, strict=True)
        return [{name: 0 * t for name, t in prompt.items()} if drop else prompt for prompt, drop in encoded]

    @torch.no_grad()
    def encode_by_base(self, captions: Sequence[str], dropped: Sequence[bool]) -> list[Prompt]:
        """As `encode`, by the text encoders without their adapters and new tokens."""
        with base_model(self.model.encoders.values()), self.model.new_tokens.off():
            return self.encode(captions, dropped)


def captioned_batches(
    config: TrainDiffusionConfig, model: ImageModel, images: Sequence[CaptionedImage], process: tuple[int, int]
) -> CaptionedBatches:
    """The batches of a training, of a process (index, count)."""
    prompts = PromptEncoder(model, trained=config.adapter.trains_text_encoders, folder=config.data.text_cache)
    size, seed = config.train.batch_size, config.seed
    return CaptionedBatches(model, images, prompts, config.data, batch_size=size, seed=seed, process=process)


def free_vae(model: ImageModel, data: DataConfig) -> None:
    """Moves the VAE, 0.2 GB in half precision, off the device where all latents are encoded ahead."""
    if data.crop == "center":
        model.vae.to("cpu")


def together(latents: Sequence[Latents]) -> Latents:
    """The latents of single images as those of a batch."""
    means, logvars = zip(*latents, strict=True)
    return Latents(torch.stack(means), None if logvars[0] is None else torch.stack(logvars))
