"""The samples of a training: a contact sheet without and with the adapter, its images, and those of the model card."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from dora_mm import formats
from dora_mm.config.generation import ImageSamplingConfig, SampleConfig
from dora_mm.config.images import TrainDiffusionConfig
from dora_mm.core import set_strength
from dora_mm.core.inject import merged_adapters
from dora_mm.models.images.image_model import ImageModel
from dora_mm.sampling.contact_sheets import save_atomically
from dora_mm.sampling.grids import PAPER, image_grid
from dora_mm.sampling.image_sampler import ImageSampler, References, sample
from dora_mm.sampling.manifest import ManifestEntry, readable_entries, write_manifest
from dora_mm.sampling.references import prepared, problem_of_references, reference_of
from dora_mm.utils.digest import file_digest
from dora_mm.utils.run_directory import RunDirectory

MOST_SHOWN = 6  # images in a model card: of 1024 pixels, each has 1.5 MB


def sample_merged(
    model: ImageModel, prompts: Sequence[str], seeds: Sequence[int], settings: ImageSamplingConfig, metadata: str
) -> list[Image.Image]:
    """Samples one image per pair of prompt and seed, with the adapters that the model has, merged.

    Args:
        model: The model, adapted or not.
        prompts: The prompts.
        seeds: A seed for each.
        settings: Steps, guidance, negative prompt and batch size.
        metadata: Label of the progress bar.
    """
    with merged_adapters(model.networks.values()):
        return sample(model, prompts, seeds, metadata=metadata, **settings.model_dump())


def at_strength(
    model: ImageModel | ImageSampler,
    adapted: Mapping[str, nn.Module],
    strength: float,
    prompts: list[str],
    seeds: list[int],
    **settings,
) -> list[Image.Image]:
    """Samples with all adapters at one strength; the strength stays set afterwards.

    Args:
        model: The model, or what generates with it, if its text encoders are not adapted.
        adapted: The adapted networks of the model, by name.
        strength: The strength of every adapter; 0 is the base model, which reads new tokens as plain words.
        prompts: The prompts.
        seeds: A seed for each prompt.
        **settings: Further arguments of `sample`.

    Returns:
        One image per prompt.
    """
    for network in adapted.values():
        set_strength(network, strength)
    own = model.model if isinstance(model, ImageSampler) else model
    with merged_adapters(adapted.values()), own.new_tokens.off() if strength == 0 else nullcontext():
        return sample(model, prompts, seeds, **settings)


def before_after_contact_sheet(
    model: ImageModel | ImageSampler,
    adapted: Mapping[str, nn.Module],
    config: SampleConfig,
    *,
    references: Sequence[References] = (),
    strength: float = 1.0,
    full: bool = False,
    average: Callable[[], AbstractContextManager[None]] | None = None,
) -> tuple[Image.Image, dict[str, list[Image.Image]]]:
    """Generates a contact sheet with one column per prompt and for each seed a row of the adapter's images.

    Above it is a row of the base model's, if `config.before_after` is set, and below it one of the average's, where
    there is one: all with the same seed. Reference images are above all. Afterwards the strength of all adapters is 1.

    Args:
        model: The model, or what generates with it, if its text encoders are not adapted.
        adapted: The adapted networks of the model, by name.
        config: The `sample` section: prompts, seeds and settings.
        references: The references of each prompt, prepared by the model; empty: there are none.
        strength: The strength of the adapter.
        full: The weights themselves were trained (method `full`): there is no base model to compare with, and no
            strength.
        average: Opens a context in which the adapters are those of an average; None: there is none.

    Returns:
        The contact sheet, and by the label of a row (before, after, average) its images: of each prompt with the first
        seed, then with the next one.
    """
    prompts = list(config.prompts)
    repeated_prompts, seeds = prompts * len(config.seeds), [seed for seed in config.seeds for _ in prompts]
    settings = config.model_dump(include={"steps", "guidance", "guidance_rescale", "negative_prompt", "batch_size"})
    settings["references"] = list(references) * len(config.seeds)
    kinds = {"before": 0.0} if config.before_after and not full else {}
    kinds |= {"after": strength} | ({"average": strength} if average else {})
    generated = {}
    for label, shown in kinds.items():
        with average() if average and label == "average" else nullcontext():
            if full:
                generated[label] = sample(model, repeated_prompts, seeds, metadata=label, **settings)
            else:
                generated[label] = at_strength(
                    model, adapted, shown, repeated_prompts, seeds, metadata=label, **settings
                )
    for network in () if full else adapted.values():
        set_strength(network, 1.0)  # training resumes at this strength
    rows, labels = [], []
    for number in range(max(map(len, references), default=0)):
        rows.append([each[number] if number < len(each) else Image.new("RGB", (1, 1), PAPER) for each in references])
        labels.append(f"reference {number + 1}" if number else "reference")
    for index, seed in enumerate(config.seeds):
        for label, images in generated.items():
            rows.append(images[index * len(prompts) : (index + 1) * len(prompts)])
            labels.append(label if len(config.seeds) == 1 else f"{label}, seed {seed}")
    return image_grid(rows, labels, prompts), generated


def sample_references(config: TrainDiffusionConfig, model: ImageModel) -> list[References]:
    """The references of each prompt of a training's contact sheets, prepared by its model: none, one or several.

    They are scaled down as those that are trained on.

    Raises:
        ValueError: The model does not take some of them.
    """
    given, pixels = config.sample.images or ((),) * len(config.sample.prompts), area_of(config)
    for number, images in enumerate(given):
        if problem := problem_of_references(model, images, pixels):
            raise ValueError(f"sample.images[{number}]: {problem}")
    return [prepared(model, images, pixels) for images in given]


def area_of(config: TrainDiffusionConfig) -> int | None:
    """The area in pixels to which larger references of contact sheets are scaled down; None: as the pipeline does."""
    area = config.data.reference_area
    return config.data.resolution**2 if area == "target" else None if area == "pipeline" else area


def keep_images(
    run: RunDirectory, config: TrainDiffusionConfig, step: int, generated: Mapping[str, Sequence[Image.Image]]
) -> None:
    """Saves the images of a contact sheet one by one, with a manifest of all steps, of which a gallery is made.

    Images of the base model are saved once, and of a fresh adapter, which generates the same, none are. Those of later
    steps are left out of the manifest from now on: the training was stopped, and will generate them again.

    Args:
        run: The run directory of the training.
        config: The config of the training.
        step: The number of finished steps.
        generated: As `before_after_contact_sheet` returns it.
    """
    entries = [entry for entry in readable_entries(run.path) if (entry.settings.get("step") or 0) <= step]
    found = {entry.file: entry for entry in entries}
    there = [entry.settings for entry in entries if entry.settings["adapter"] is None]
    fresh = step == 0 and "before" in generated and not config.adapter.init_from and not config.tokens
    for label in ["before"] if fresh else generated:
        for index, image in enumerate(generated[label]):
            settings = settings_of(run, config, step, label, index, image.size)
            if settings in there:
                continue
            row, ending = index % len(config.sample.prompts) + 1, "" if label == "after" else f"-{label}"
            file = run.samples / f"step-{step:06d}" / f"{row:04d}-seed{settings['seed']}{ending}.png"
            save_atomically(file, image)
            name = file.relative_to(run.path).as_posix()
            found[name] = ManifestEntry(row, name, "done", 1, settings, file_digest(file))
    write_manifest(run.path, found.values())


def settings_of(
    run: RunDirectory, config: TrainDiffusionConfig, step: int, label: str, index: int, size: tuple[int, int]
) -> dict[str, Any]:
    """The settings that an image of a contact sheet was generated with; the step of a base model image is None."""
    sheets, (width, height) = config.sample, size
    number = index % len(sheets.prompts)
    made_of: dict[str, Any] = {}
    if sheets.images and (images := sheets.images[number]):
        made_of = {"images": list(images), "image_digests": [reference_of(path).digest for path in images]}
        made_of["reference_area"] = area_of(config) or "pipeline"
    adapter = {"before": None, "after": run.path, "average": run.adapter_ema}[label]
    # That of the file, into which adapter.strength is written: what `sample` calls strength 1
    strength = None if adapter is None or "full" in config.adapter.methods else 1.0
    return {
        "prompt": sheets.prompts[number],
        "negative_prompt": sheets.negative_prompt,
        "seed": sheets.seeds[index // len(sheets.prompts)],
        **{"steps": sheets.steps, "guidance": sheets.guidance, "width": width, "height": height},
        **made_of,
        "model": config.model.path,
        "adapter": adapter and str(adapter),
        "strength": strength,
        "step": None if adapter is None else step,
    }


def add_images(config: TrainDiffusionConfig, folder: Path, images: list[Image.Image]) -> None:
    """Saves the first images next to the adapter, and shows them in its model card."""
    shown = []
    for number, (prompt, image) in enumerate(zip(config.sample.prompts[:MOST_SHOWN], images, strict=False), 1):
        shown.append((prompt, f"pictures/{number}.png"))
        save_atomically(folder / shown[-1][1], image)
    formats.write_model_card(folder, images=shown)
