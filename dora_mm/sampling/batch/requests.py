"""The images of a job, the names of their files, and their batches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dora_mm.config.generation import BatchGenerationConfig, EditingConfig, ImageGenerationConfig
from dora_mm.data.syntax import Wording, weighted
from dora_mm.sampling.batch.prompt_row import ActiveAdapters, PromptRow
from dora_mm.sampling.strengths import as_strength, is_zero, scaled

DEFAULT_SETTINGS = {  # files have these settings only where they are others
    "guidance_rescale": 0.0,
    "prompt_syntax": "plain",
    "images": (),
    "image_digests": (),
    "reference_area": "pipeline",
}


@dataclass(frozen=True)
class ImageRequest:
    """The prompts, seed, settings and adapters that an image is generated with, without the model.

    Attributes:
        row: The number of its row in the job, from 1.
        prompt: The prompt.
        negative_prompt: None is what the model takes without one, "" the encoded empty text.
        seed: The seed of its noise.
        steps: The number of denoising steps.
        guidance: The scale of classifier-free guidance.
        width: In pixels; None is the model's own.
        height: In pixels; None is the model's own.
        scheduler: The name of the scheduler; None is the model's own.
        adapters: The adapters by path, each with its strength.
        strength: The strength of all of them, by which theirs are multiplied; 0 is the base model.
        guidance_rescale: The share of the contrast added by guidance that is removed, 0 to 1.
        prompt_syntax: How its prompts are read: "plain", or "a1111" with weights and BREAK (see `dora_mm.data.syntax`).
        images: The files of its reference images.
        image_digests: SHA-256 of each of these; empty until they were read.
        reference_area: To how many pixels larger references are scaled down.
        file: The name of its file, without seed and ending; None: the number of the row.
        folder: The folder of its file; None: that of all.
    """

    row: int
    prompt: str
    negative_prompt: str | None
    seed: int
    steps: int
    guidance: float
    width: int | None
    height: int | None
    scheduler: str | None
    adapters: ActiveAdapters
    strength: float
    guidance_rescale: float = 0.0
    prompt_syntax: str = "plain"
    images: tuple[str, ...] = ()
    image_digests: tuple[str, ...] = ()
    reference_area: str | int = "pipeline"
    file: str | None = None
    folder: str | None = None

    @property
    def prompts(self) -> tuple[Wording, Wording | None]:
        """The prompt and the negative prompt, as a model encodes them."""
        if self.prompt_syntax == "plain":
            return self.prompt, self.negative_prompt
        return weighted(self.prompt), None if self.negative_prompt is None else weighted(self.negative_prompt)

    @property
    def active_adapters(self) -> ActiveAdapters:
        """The adapters at their final strengths; empty for the base model."""
        final = ((path, scaled(strength, self.strength)) for path, strength in self.adapters)
        return tuple((path, strength) for path, strength in final if not is_zero(strength))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that all images of a batch share, without the weights, as `ImageSampler.generate` takes them."""
        names = ("steps", "guidance", "guidance_rescale", "width", "height", "scheduler")
        return {name: getattr(self, name) for name in names}

    @property
    def file_settings(self) -> dict[str, Any]:
        """The settings as files have them, with the syntax of the prompts."""
        others = ("prompt_syntax", "images", "image_digests", "reference_area")
        found = {**self.settings, **{name: getattr(self, name) for name in others}}
        return {name: value for name, value in found.items() if name not in self.omitted_settings}

    @property
    def omitted_settings(self) -> tuple[str, ...]:
        """The settings that files do not have for this image, as those of earlier versions do not."""
        return tuple(name for name, default in DEFAULT_SETTINGS.items() if getattr(self, name) == default)


def template(config: ImageGenerationConfig, *, prompt: str = "", seed: int = 0) -> ImageRequest:
    """An image with the settings of a config, which rows of a job and axes of a grid replace."""
    adapters: ActiveAdapters = ((config.adapter.path, as_strength(config.adapter.strength)),) if config.adapter else ()
    names = {
        "negative_prompt",
        "steps",
        "guidance",
        "guidance_rescale",
        "width",
        "height",
        "scheduler",
        "prompt_syntax",
    }
    edits = {"images", "reference_area"} if isinstance(config, EditingConfig) else set()
    settings = config.model_dump(include=names | edits)
    return ImageRequest(row=0, prompt=prompt, seed=seed, adapters=adapters, strength=1.0, **settings)


def expand(
    rows: Sequence[PromptRow], template: ImageRequest, seeds: Sequence[int], strengths: Sequence[float]
) -> list[ImageRequest]:
    """Lists the images of a job.

    Args:
        rows: The rows.
        template: Has the settings that the rows leave out.
        seeds: The seeds of each row that has none.
        strengths: The strengths of each row that has none.

    Returns:
        The images by row, seed and strength.
    """
    requests = []
    for number, row in enumerate(rows, 1):
        given = {name: value for name, value in row if value is not None}
        row_seeds = given.pop("seed", seeds)
        row_strengths = (given.pop("strength"),) if "strength" in given else strengths
        given["adapters"] = given.pop("adapter", template.adapters)
        requests += [
            replace(template, row=number, seed=seed, strength=strength, **given)
            for seed in dict.fromkeys(row_seeds)
            for strength in dict.fromkeys(row_strengths)
        ]
    return requests


def check_strengths(rows: Sequence[PromptRow], config: BatchGenerationConfig) -> None:
    """Checks that the strengths which a job writes have an adapter.

    Raises:
        ValueError: A row, or the config for it, has a strength other than 0 and no adapter.
    """
    for number, row in enumerate(rows, 1):
        if row.adapter or (row.adapter is None and config.adapter):
            continue
        of_config = any(config.strengths or ()) and row.strength is None and row.adapter is None
        if row.strength or of_config:
            config_strengths = ", ".join(f"{strength:g}" for strength in config.strengths or ())
            written = f"strength {row.strength:g}" if row.strength else f"strengths [{config_strengths}]"
            raise ValueError(
                f"row {number} has {written} and no adapter: set adapter.path=RUN or name one in its column adapter; "
                "the bare model has strength 0"
            )


def without_adapter(rows: Sequence[PromptRow], requests: Sequence[ImageRequest]) -> list[ImageRequest]:
    """The images of the bare model that no row asks for, by `none` or the strength 0."""
    return [p for p in requests if not p.adapters and p.strength and rows[p.row - 1].adapter is None]


def about_bare(bare: Sequence[ImageRequest], requests: Sequence[ImageRequest]) -> str:
    """The notice about images without an adapter, shown at the start and at the end; empty if there are none."""
    if not bare:
        return ""
    which = "the images have" if len(bare) == len(requests) else f"{len(bare)} of {len(requests)} images have"
    return f"No adapter: {which} none, and are the bare model's. With one: --set adapter.path=RUN, or a column adapter"


def file_names(requests: Sequence[ImageRequest]) -> list[str]:
    """The name of each image's file: `0001-seed7.png`, with its strength where its row has several.

    A name of its own has the seed only where its row has several, and its folder stands in front.

    Raises:
        ValueError: Two images have one name, also if only case tells them apart.
    """
    strengths: dict[int, set[float]] = {}
    seeds: dict[int, set[int]] = {}
    for request in requests:
        strengths.setdefault(request.row, set()).add(request.strength)
        seeds.setdefault(request.row, set()).add(request.seed)
    names, rows = [], dict[str, int]()
    for request in requests:
        strength = f"-strength{request.strength:.12g}" if len(strengths[request.row]) > 1 else ""
        seed = f"-seed{request.seed}" if request.file is None or len(seeds[request.row]) > 1 else ""
        folder = f"{request.folder}/" if request.folder else ""
        names.append(f"{folder}{request.file or f'{request.row:04d}'}{seed}{strength}.png")
        other = rows.setdefault(names[-1].casefold(), request.row)
        if other != request.row:
            raise ValueError(f"rows {other} and {request.row} have the same file {names[-1]}")
    return names


def batches(requests: Sequence[ImageRequest], size: int, length: Callable[[ImageRequest], int]) -> list[list[int]]:
    """Groups images into batches, which depend on nothing but the job.

    Images of a batch share their weights, references, size and settings, and the length of their encoded prompts: one
    that is padded generates another image. Batches with the same weights follow each other.

    Args:
        requests: The images.
        size: The largest number of images in a batch.
        length: The length of the longer one of an image's prompts, as the model sees it.

    Returns:
        The indices of the images of each batch.
    """
    groups: dict[Hashable, dict[Hashable, list[int]]] = {}
    for index, request in enumerate(requests):
        key = *request.file_settings.values(), length(request)
        groups.setdefault(request.active_adapters, {}).setdefault(key, []).append(index)
    return [
        group[start : start + size]
        for same_weights in groups.values()
        for group in same_weights.values()
        for start in range(0, len(group), size)
    ]
