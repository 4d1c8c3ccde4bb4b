"""Batches of captioned images: latents, encoded captions, and how each image was brought to its size."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from dora_mm.config.images import DataConfig, TrainDiffusionConfig
from dora_mm.core import base_model
from dora_mm.data.images.buckets import Framing, frame
from dora_mm.data.images.folder import CaptionedImage
from dora_mm.data.images.latents import LatentCache, Latents, latent_key
from dora_mm.data.images.masks import ALPHA, load_mask, render_mask
from dora_mm.data.images.order import ImageOrder
from dora_mm.data.images.pixels import load_rgb, render
from dora_mm.data.images.resolutions import at_resolutions
from dora_mm.data.images.wording import rendered, unchanged
from dora_mm.data.seen import read_as
from dora_mm.models.images.image_model import ImageModel, Prompt
from dora_mm.tasks.diffusion import ConditionedLatents
from dora_mm.tasks.prompt_encoder import Caption, PromptEncoder, with_text
from dora_mm.tasks.references import ReferenceLatents, layout_of
from dora_mm.utils.progress import tracked
from dora_mm.utils.randomness import generator


class CaptionedBatches:
    """Maps a batch number to a batch, which depends only on (seed, number, process).

    All images of a batch have one layout; every epoch contains every image `data.repeats` times, times the `repeats` of
    its folder and, with `data.subfolders`, the number in the name of its subfolder (see `ImageOrder`), at each of its
    resolutions. Latents are sampled from the VAE's posterior again each time; that of an image with a fixed crop is
    computed once.

    Args:
        model: The model whose VAE encodes the images.
        images: The images with their captions.
        prompts: Encodes the captions.
        config: The `data` section.
        batch_size: Images per batch.
        seed: Seed of order, crops, dropped captions and latents.
        process: (index, count) if several processes share the work.
        unguided: The prompt that a guided target leads away from; None: there is no such target.
        cache: Keeps the latents; None: one of its own.
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
        unguided: str | None = None,
        cache: LatentCache | None = None,
    ):
        self.model, self.prompts, self.config = model, prompts, config
        self.unguided = unguided
        self.images = at_resolutions(images, config)
        self.batch_size, self.seed, self.process = batch_size, seed, process
        self.cache = cache or LatentCache(config.latent_cache)
        self.vae_identity = model.vae_identity
        self.references = ReferenceLatents(model, config, self.cache)
        self.layouts = [layout_of(image, model, config) for image in self.images]
        repeats = [config.repeats * image.repeats for image in self.images]
        self.order = ImageOrder(self.layouts, repeats, batch_size, seed)
        weights = [config.folders[image.folder].weight if config.folders else 1.0 for image in self.images]
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
            captions = self.captions(num_batches)
            unguided = [] if self.unguided is None else [with_text(caption, self.unguided) for caption in captions]
            self.prompts.keep([*captions, *self._empty(captions), *unguided], 1 if varies else 16)
        if self.config.crop == "center":
            kept = []
            for index in tracked(range(len(self.images)), "encoding images", "images"):
                for flip in (False, True) if self.config.flip else (False,):
                    framing = self._frame(index, flip, None)
                    if self.cache.has(key := self._key(index, framing)):
                        kept.append(key)
                    else:
                        self._latents(index, framing)
                    kept += self.references.encode(self.images[index], flip=flip)
            self.cache.report(kept)

    def captions(self, num_batches: int | None = None) -> list[Caption]:
        """All captions of a training of so many batches, each once; None: those of `fixed` batches."""
        settings = self.config.captions
        varies = settings is not None or any(image.more for image in self.images)
        if num_batches is None or not varies:
            found = ((image, unchanged(image, settings)) for image in self.images)
        else:
            epochs = range(self.order.epoch(num_batches * self.process[1] - 1) + 1)
            found = ((i, rendered(i, settings, self.seed, epoch)) for epoch in epochs for i in self.images)
        read = (each for image, text in found for each in self._as_read(image, text, trained=num_batches is not None))
        return list(dict.fromkeys(read))

    def _as_read(self, image: CaptionedImage, text: str, *, trained: bool) -> Iterator[Caption]:
        """A caption as text encoders read it: with and without references, these mirrored and not."""
        for flip in (False, True) if self.config.flip and trained else (False,):
            yield self.references.instruction(text, image, flip=flip)
        if self.config.reference_dropout and trained:
            yield text

    def _empty(self, captions: Sequence[Caption]) -> list[Caption]:
        """What captions become where they are dropped; without references that is encoded in any case."""
        dropped = (each for each in captions if self.config.caption_dropout or isinstance(each, str))
        return list(dict.fromkeys(with_text(each, "") for each in dropped))

    def __call__(self, number: int) -> ConditionedLatents:
        """This process's batch of this number, on the model's device."""
        index, count = self.process
        number = number * count + index
        rows, framings = self.order(number), self._framings(number)
        latents = [self._latents(row, framing) for row, framing in zip(rows, framings, strict=True)]
        captions, dropped = self._captions(number), self._dropped(number)
        sampled = together(latents).sample(generator(self.seed, number, "latents"))
        return ConditionedLatents(
            self.model.normalized(sampled).to(self.model.device),
            self.encode(captions, dropped),
            framings,
            self.weights[rows],
            self._references(number),
            self._masks_of(rows, framings),
            self.encode_by_base(captions, dropped) if self.config.mask and self.config.mask.outside == "base" else None,
            self._encode_unguided(captions),
        )

    def captions_of(self, number: int) -> list[Caption]:
        """The captions of this process's batch of this number, none of them dropped."""
        return self._captions(number * self.process[1] + self.process[0])

    def counts(self, number: int) -> tuple[float, int]:
        """The sum of the weights of all processes' batches of this number, and the number of their images."""
        first, count = number * self.process[1], self.process[1]
        rows = [row for each in range(first, first + count) for row in self.order(each)]
        return float(self.weights[rows].sum()), len(rows)

    def fixed(self, rows: Sequence[int]) -> ConditionedLatents:
        """Images of one layout, by their numbers, with their captions; nothing in it is sampled again.

        `data.crop` must be `center`, since the latents of other crops are not kept.
        """
        framings, latents = [self._frame(row, False, None) for row in rows], []
        for row, framing in zip(rows, framings, strict=True):
            stream = generator(0, 0, f"fixed latents of {self.images[row].digest}")
            latents.append(self._latents(row, framing).sample(stream))
        texts = ((self.images[row], unchanged(self.images[row], self.config.captions)) for row in rows)
        captions = [self.references.instruction(text, image, flip=False) for image, text in texts]
        normalized = self.model.normalized(torch.stack(latents)).to(self.model.device)
        references = self.references.of_batch([self.images[row] for row in rows], [False] * len(rows))
        masks = self._masks_of(rows, framings)
        unguided = self._encode_unguided(captions)
        return ConditionedLatents(
            normalized, self.prompts(captions), framings, references=references, masks=masks, unguided_prompts=unguided
        )

    def _framings(self, number: int) -> list[Framing]:
        """The framings of batch `number` of all processes together."""
        stream = generator(self.seed, number, "framing")
        return [self._frame(row, self._flipped(stream), stream) for row in self.order(number)]

    def _references(self, number: int) -> list[torch.Tensor]:
        """The references of batch `number` of all processes together."""
        if self._drops_references(number):
            return []
        images = [self.images[row] for row in self.order(number)]
        return self.references.of_batch(images, [framing.flip for framing in self._framings(number)])

    def _drops_references(self, number: int) -> bool:
        stream = generator(self.seed, number, "references")
        return float(torch.rand((), generator=stream)) < self.config.reference_dropout

    def _frame(self, index: int, flip: bool, stream: torch.Generator | None) -> Framing:
        return frame(self.images[index].size, self.layouts[index][0], self.config.crop, stream, flip)

    def _flipped(self, stream: torch.Generator) -> bool:
        return self.config.flip and bool(torch.rand((), generator=stream) < 0.5)

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

    def _captions(self, number: int) -> list[Caption]:
        """The captions of batch `number` of all processes together."""
        epoch, settings = self.order.epoch(number), self.config.captions
        images = [self.images[row] for row in self.order(number)]
        texts = [rendered(image, settings, self.seed, epoch) for image in images]
        if self._drops_references(number) or not self.references.are_read:
            return list(texts)
        read = zip(texts, images, self._framings(number), strict=True)
        return [self.references.instruction(text, image, flip=framing.flip) for text, image, framing in read]

    def _dropped(self, number: int) -> list[bool]:
        """Which captions of a batch are dropped."""
        stream = generator(self.seed, number, "captions")
        return (torch.rand(len(self.order(number)), generator=stream) < self.config.caption_dropout).tolist()

    def encode(self, captions: Sequence[Caption], dropped: Sequence[bool]) -> list[Prompt]:
        """Encodes captions; those that are dropped become the unconditional embedding."""
        if self.model.unconditional == "empty":
            pairs = zip(captions, dropped, strict=True)
            return self.prompts([with_text(caption, "") if drop else caption for caption, drop in pairs])
        encoded = zip(self.prompts(captions), dropped, strict=True)
        return [{name: 0 * t for name, t in prompt.items()} if drop else prompt for prompt, drop in encoded]

    @torch.no_grad()
    def _encode_unguided(self, captions: Sequence[Caption]) -> list[Prompt] | None:
        """What a guided target leads away from, of each caption; it has the same references."""
        if self.unguided is None:
            return None
        return self.encode([with_text(each, self.unguided) for each in captions], [not self.unguided] * len(captions))

    @torch.no_grad()
    def encode_by_base(self, captions: Sequence[Caption], dropped: Sequence[bool]) -> list[Prompt]:
        """As `encode`, by the text encoders without their adapters and new tokens."""
        with base_model(self.model.encoders.values()), self.model.new_tokens.off():
            return self.encode(captions, dropped)


def captioned_batches(
    config: TrainDiffusionConfig, model: ImageModel, images: Sequence[CaptionedImage], process: tuple[int, int]
) -> CaptionedBatches:
    """The batches of a training, of a process (index, count)."""
    prompts = PromptEncoder(model, trained=config.adapter.trains_text_encoders, folder=config.data.text_cache)
    settings: dict[str, Any] = {"batch_size": config.train.batch_size, "seed": config.seed, "process": process}
    settings["unguided"] = config.loss.guided_target and config.loss.guided_target.prompt
    return CaptionedBatches(model, images, prompts, config.data, **settings)


def free_vae(model: ImageModel, data: DataConfig) -> None:
    """Moves the VAE, 0.2 GB in half precision, off the device where all latents are encoded ahead."""
    if data.crop == "center":
        model.vae.to("cpu")


def together(latents: Sequence[Latents]) -> Latents:
    """The latents of single images as those of a batch."""
    means, logvars = zip(*latents, strict=True)
    return Latents(torch.stack(means), None if logvars[0] is None else torch.stack(logvars))
