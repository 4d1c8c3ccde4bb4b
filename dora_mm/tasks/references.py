"""Latents of reference images, for models that edit."""

from collections.abc import Sequence

import torch

from dora_mm.config.images import DataConfig
from dora_mm.data.images.buckets import Size
from dora_mm.data.images.folder import CaptionedImage
from dora_mm.data.images.latents import LatentCache, Latents, reference_key
from dora_mm.data.images.references import ReferenceImage, load_reference
from dora_mm.data.images.resolutions import at_resolutions, bucket_of
from dora_mm.models.images.editing import EditingModel
from dora_mm.models.images.image_model import ImageModel
from dora_mm.registries.image_families import IMAGE_FAMILIES
from dora_mm.tasks.prompt_encoder import Caption, Instruction

MOST_NAMED = 8  # problems in one message


def area_of(image: CaptionedImage, data: DataConfig) -> int | None:
    """The area in pixels to which larger references of an image are scaled down; None: as the pipeline does."""
    if data.reference_area == "target":
        height, width = bucket_of(image, data)
        return height * width
    return None if data.reference_area == "pipeline" else data.reference_area


def layout_of(image: CaptionedImage, model: ImageModel, data: DataConfig) -> tuple[Size, ...]:
    """The bucket of an image, and the sizes of its references as the VAE sees them, in their order."""
    if not image.references:
        return (bucket_of(image, data),)
    assert isinstance(model, EditingModel)
    area = area_of(image, data)
    return bucket_of(image, data), *(model.reference_size(each.size, area) for each in image.references)


def num_tokens(image: CaptionedImage, model: ImageModel, data: DataConfig) -> tuple[int, int]:
    """The tokens of an image in the denoiser, and those of its references."""
    side = model.pixels_per_token if isinstance(model, EditingModel) else model.cell
    own, *others = ((h // side) * (w // side) for h, w in layout_of(image, model, data))
    return own, sum(others)


class ReferenceLatents:
    """Encodes the references of images, each once for every size and mirroring in which it occurs.

    Args:
        model: The model; it edits where images have references.
        data: The `data` section.
        cache: Keeps their latents.
    """

    def __init__(self, model: ImageModel, data: DataConfig, cache: LatentCache):
        self.model, self.data, self.cache = model, data, cache

    def encode(self, image: CaptionedImage, *, flip: bool) -> list[str]:
        """Encodes the references of an image that the cache lacks; returns the keys of the others."""
        area, kept = area_of(image, self.data), []
        for reference in image.references:
            if self.cache.has(key := self._key(reference, area, flip=flip)):
                kept.append(key)
            else:
                self._latents(reference, area, flip=flip)
        return kept

    def of_batch(self, images: Sequence[CaptionedImage], flips: Sequence[bool]) -> list[torch.Tensor]:
        """Normalized latents (B, C, h, w), each of one reference of every image.

        Args:
            images: B images of one layout.
            flips: Which of them are mirrored; their references are then, too.
        """
        rows = [
            [self._latents(reference, area_of(image, self.data), flip=flip) for reference in image.references]
            for image, flip in zip(images, flips, strict=True)
        ]
        stacked = (torch.stack(latents) for latents in zip(*rows, strict=True))
        return [self.model.normalized(latents).to(self.model.device) for latents in stacked]

    @property
    def are_read(self) -> bool:
        """Whether the text encoder sees references beside the caption."""
        return isinstance(self.model, EditingModel) and self.model.prompts_see_references

    def instruction(self, text: str, image: CaptionedImage, *, flip: bool) -> Caption:
        """The caption of an image as the text encoder reads it: with its references where it sees them."""
        if not image.references or not self.are_read:
            return text
        return Instruction(text, image.references, area_of(image, self.data), flip)

    @property
    def _editing(self) -> EditingModel:
        assert isinstance(self.model, EditingModel)
        return self.model

    def _latents(self, reference: ReferenceImage, area: int | None, *, flip: bool) -> torch.Tensor:
        """The latents (C, h, w) of a reference, as the VAE gives them."""

        def compute() -> Latents:
            model = self._editing
            image = load_reference(reference, alpha=model.references_have_alpha)
            pixels = model.reference_pixels(model.prepare_reference(image, area, flip=flip))
            return Latents(model.encode_images(pixels).mean[0], None)

        return self.cache.get(self._key(reference, area, flip=flip), compute, reference.path).mean

    def _key(self, reference: ReferenceImage, area: int | None, *, flip: bool) -> str:
        size = self._editing.reference_size(reference.size, area)
        return reference_key(reference.digest, size, area, self.model.vae_identity, flip=flip)


def check_references(model: ImageModel, images: Sequence[CaptionedImage], data: DataConfig) -> None:
    """Checks the references of images against a model whose weights are not loaded yet.

    Raises:
        ValueError: The model does not edit, images have too many references, or the model does not take some of them;
            or `data` has keys of references without effect, or that would tear pairs apart.
    """
    found = [image for image in images if image.references]
    if not found:
        if isinstance(model, EditingModel) and model.needs_references:
            raise ValueError(
                f"{model.title} needs references: give each image what it is made of, by data.references or in "
                "metadata.jsonl"
            )
        folders = any(folder.references for folder in data.all_folders.values())
        if folders or data.reference_dropout or data.reference_area != "pipeline":
            raise ValueError("data.references: no image has a reference, so the keys of references have no effect")
        return
    if not isinstance(model, EditingModel):
        others = ", ".join(family.title for family in IMAGE_FAMILIES.values() if family.edits)
        raise ValueError(
            f"{len(found)} images have references, such as {found[0].path.name}, and {model.title} does not edit: "
            f"train a model that does ({others}), or remove the references"
        )
    if model.needs_references and len(found) < len(images):
        first = next(image for image in images if not image.references)
        without = len(images) - len(found)
        raise ValueError(f"{model.title} needs references: {without} images have none, such as {first.path.name}")
    if model.needs_references and data.reference_dropout:
        raise ValueError(f"data.reference_dropout: {model.title} needs references: leave it out")
    if model.scales_references_up and data.reference_area != "pipeline":
        raise ValueError(
            f"data.reference_area: the pipeline of {model.title} brings references of every size to one area, so it "
            "could not generate with another one: leave the key out"
        )
    if data.crop == "random":
        raise ValueError("data.crop: random crops of images would no longer fit their references: set center")
    problems = []
    for image in at_resolutions(found, data):
        if (count := len(image.references)) > (most := model.most_references):
            problems.append(f"{image.path.name} has {count} references, and {model.title} takes {most}")
        sizes = ((each, model.prepared_size(each.size, area_of(image, data))) for each in image.references)
        reasons = ((each, model.why_not_reference(size)) for each, size in sizes)
        problems += [f"{each.path.name} {reason}" for each, reason in reasons if reason]
    if problems:
        problems = list(dict.fromkeys(problems))  # those of an image may be the same at each resolution
        more = f"; and {len(problems) - MOST_NAMED} more" if len(problems) > MOST_NAMED else ""
        raise ValueError(f"data.references: {'; '.join(problems[:MOST_NAMED])}{more}")
