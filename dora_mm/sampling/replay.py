"""Generates an image again from what its PNG file says."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from dora_mm.config.generation import ImageGenerationConfig, MemoryConfig, PromptSyntax
from dora_mm.config.models import ModelConfig, validated
from dora_mm.config.schema import ReferenceArea
from dora_mm.models.hub import check_named_by
from dora_mm.registries.renamed import migrated_memory
from dora_mm.sampling.batch.prompt_row import PromptRow
from dora_mm.sampling.batch.requests import ImageRequest
from dora_mm.sampling.generating import BatchGeneration, generate
from dora_mm.sampling.manifest import write_manifest
from dora_mm.sampling.model import LoadedModel, load_model
from dora_mm.sampling.png import GenerationMetadata, read_metadata
from dora_mm.sampling.references import reference_of
from dora_mm.utils.circumstances import differences, sentence

log = logging.getLogger(__name__)
NEEDED = ("steps", "guidance", "width", "height", "scheduler")


def replay_image(file: Path, folder: Path) -> tuple[Path, str | None]:
    """Generates an image again, in the batch that it was generated in, since rounding depends on the batch.

    Args:
        file: A PNG file of a job.
        folder: The folder to write to.

    Returns:
        The new file; and how its pixels differ from the old ones, or None where they are the same. Other circumstances
        are reported in the log.

    Raises:
        ValueError: The file does not say how it was generated, the model or an adapter has changed since, or the image
            cannot be generated.
    """
    metadata = read_metadata(file)
    check_complete(metadata, file)
    check_named_by(str(file), metadata.model.path, metadata.model.revision)
    check_named_by(str(file), metadata.model.vae)
    loaded = load_model(generation_config(metadata), [adapter.path for adapter in metadata.adapters])
    check_unchanged(metadata, loaded)
    generation = batch_of_metadata(metadata, loaded, folder, file.name)
    report_circumstances(file, metadata, generation)
    loaded.load(generation.requests)
    generate(generation, loaded.sampler, loaded.load_adapter)
    write_manifest(generation.folder, [generation.entries()[metadata.position]])
    generation.raise_failures()
    generated = generation.file(metadata.position)
    return generated, difference(file, generated)


def check_complete(metadata: GenerationMetadata, file: Path) -> None:
    """Checks that a file says all that an image is generated with, in the types that a job has.

    Raises:
        ValueError: It does not.
    """
    try:
        settings = dict(metadata.settings)
        if settings.pop("prompt_syntax", "plain") not in get_args(PromptSyntax):
            raise ValueError("its prompt_syntax is unknown")
        TypeAdapter(ReferenceArea).validate_python(settings.pop("reference_area", "pipeline"), strict=True)
        digests = TypeAdapter(tuple[str, ...]).validate_python(settings.pop("image_digests", ()))
        if len(digests) != len(settings.get("images", ())):
            raise ValueError("it has not one of image_digests for each of images")
        row = PromptRow.model_validate({"prompt": "a", **settings})
        if lacking := [name for name in NEEDED if name not in row.model_fields_set]:
            raise ValueError(f"settings lack {lacking[0]}")
        generation_config(metadata)
    except ValidationError as error:
        found = error.errors()[0]
        problem = ": ".join([".".join(map(str, found["loc"])), found["msg"]])
        raise ValueError(f"{file} cannot be generated again ({problem})") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot be generated again ({error})") from None


def generation_config(metadata: GenerationMetadata) -> ImageGenerationConfig:
    """The config of the model that an image was generated with."""
    model = metadata.model
    return ImageGenerationConfig(
        pipeline="sample",
        name="replay",
        backend=metadata.environment["backend"],
        model=validated(
            ModelConfig,
            {"path": model.path, "revision": model.revision, "vae": model.vae, "dtype": model.dtype, **model.settings},
        ),
        memory=MemoryConfig(**migrated_memory(metadata.environment["memory"])),
    )


def check_unchanged(metadata: GenerationMetadata, loaded: LoadedModel) -> None:
    """Compares the model and the adapters that were loaded with those that an image was generated with.

    Raises:
        ValueError: The base model or an adapter is another one now.
    """
    if changes := loaded.base.changes(metadata.model):
        raise ValueError(
            f"the model {loaded.base.path} has changed since the image was generated: {', '.join(changes)}"
        )
    settings = metadata.settings
    for path, digest in zip(settings.get("images", ()), settings.get("image_digests", ()), strict=True):
        if reference_of(path).digest != digest:
            raise ValueError(f"the reference image {path} has changed since the image was generated")
    hashes = loaded.adapter_hashes()
    for adapter in metadata.adapters:
        if hashes[adapter.path][0] != adapter.digest:
            raise ValueError(f"the adapter {adapter.path} has changed since the image was generated")


def batch_of_metadata(metadata: GenerationMetadata, loaded: LoadedModel, folder: Path, name: str) -> BatchGeneration:
    """A job of the batch of an image, of which only this image is missing."""
    adapters = tuple((adapter.path, adapter.strength) for adapter in metadata.adapters)
    settings: dict[str, Any] = dict(metadata.settings)
    settings |= {name: tuple(settings[name]) for name in ("images", "image_digests") if name in settings}
    requests = [
        ImageRequest(
            row=1,
            prompt=prompt,
            negative_prompt=negative_prompt,
            seed=seed,
            adapters=adapters,
            strength=1.0,
            **settings,
        )
        for prompt, negative_prompt, seed in metadata.batch
    ]
    generation = loaded.plan(folder, requests, len(requests))
    generation.names = [name if index == metadata.position else f"{index}-{name}" for index in range(len(requests))]
    generation.done = dict.fromkeys((index for index in range(len(requests)) if index != metadata.position), "")
    return generation


def report_circumstances(file: Path, metadata: GenerationMetadata, generation: BatchGeneration) -> None:
    """Warns of circumstances that differ from those under which an image was generated."""
    now = generation.metadata[metadata.position].circumstances
    if message := sentence(f"{file} was", differences(metadata.circumstances, now)):
        log.warning(message)


def difference(one: Path, other: Path) -> str | None:
    """How the pixels of two images differ, or None."""
    first, second = (np.asarray(Image.open(path).convert("RGB"), dtype=np.int16) for path in (one, other))
    if first.shape != second.shape:
        return "in its size"
    largest = int(np.abs(first - second).max())
    return f"by up to {largest} of 255" if largest else None
