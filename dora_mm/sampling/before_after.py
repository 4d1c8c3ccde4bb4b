"""Samples with and without an adapter: the same prompts and seeds, on one sheet."""

from collections.abc import Mapping, Sequence

from PIL import Image
from torch import nn

from dora_mm.config.pictures import DrawConfig, SampleConfig
from dora_mm.core import set_strength
from dora_mm.core.inject import merged_adapters
from dora_mm.models.diffusion import ImageModel
from dora_mm.sampling.grids import sheet
from dora_mm.sampling.pictures import PictureSampler, sample


def sample_merged(
    model: ImageModel, prompts: Sequence[str], seeds: Sequence[int], settings: DrawConfig, description: str
) -> list[Image.Image]:
    """Samples one picture per pair of prompt and seed, with the adapters that the model has, merged.

    Args:
        model: The model, adapted or not.
        prompts: The prompts.
        seeds: A seed for each.
        settings: Steps, guidance, negative prompt and batch size.
        description: Label of the progress bar.
    """
    with merged_adapters(model.networks.values()):
        return sample(
            model,
            prompts,
            seeds,
            steps=settings.steps,
            guidance=settings.guidance,
            negative_prompt=settings.negative_prompt,
            batch_size=settings.batch_size,
            description=description,
        )


def at_strength(
    model: ImageModel | PictureSampler,
    adapted: Mapping[str, nn.Module],
    strength: float,
    prompts: list[str],
    seeds: list[int],
    **settings,
) -> list[Image.Image]:
    """Samples with all adapters at one strength; the strength stays set afterwards.

    Args:
        model: The model, or what draws with it, if its text encoders are not adapted.
        adapted: The adapted networks of the model, by name.
        strength: The strength of every adapter; 0 is the base model.
        prompts: The prompts.
        seeds: A seed for each prompt.
        **settings: Further arguments of `sample`.

    Returns:
        One picture per prompt.
    """
    for network in adapted.values():
        set_strength(network, strength)
    with merged_adapters(adapted.values()):
        return sample(model, prompts, seeds, **settings)


def before_after_sheet(
    model: ImageModel | PictureSampler,
    adapted: Mapping[str, nn.Module],
    config: SampleConfig,
    *,
    strength: float = 1.0,
    full: bool = False,
) -> tuple[Image.Image, list[Image.Image]]:
    """Draws a sheet with one row per seed and one column per prompt.

    If `config.before_after` is set, each seed has two rows: the base model's above the adapter's. Afterwards the
    strength of all adapters is 1.

    Args:
        model: The model, or what draws with it, if its text encoders are not adapted.
        adapted: The adapted networks of the model, by name.
        config: The `sample` section: prompts, seeds and settings.
        strength: The strength of the adapter.
        full: The weights themselves were trained (method `full`): there is no base model to compare with, and no
            strength.

    Returns:
        The sheet, and the adapter's picture of each prompt with the first seed.
    """
    prompts = list(config.prompts)
    jobs, seeds = prompts * len(config.seeds), [seed for seed in config.seeds for _ in prompts]
    settings = config.model_dump(include={"steps", "guidance", "negative_prompt", "batch_size"})
    kinds = {"before": 0.0, "after": strength} if config.before_after else {"after": strength}
    drawn = {}
    if full:
        drawn["after"] = sample(model, jobs, seeds, description="after", **settings)
    else:
        for label, shown in kinds.items():
            drawn[label] = at_strength(model, adapted, shown, jobs, seeds, description=label, **settings)
        for network in adapted.values():
            set_strength(network, 1.0)  # training resumes at this strength
    rows, labels = [], []
    for index, seed in enumerate(config.seeds):
        for label, pictures in drawn.items():
            rows.append(pictures[index * len(prompts) : (index + 1) * len(prompts)])
            labels.append(label if len(config.seeds) == 1 else f"{label}, seed {seed}")
    return sheet(rows, labels, prompts), drawn["after"][: len(prompts)]
