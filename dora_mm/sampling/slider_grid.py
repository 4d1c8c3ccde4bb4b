"""The grid of a slider: the same prompts and noise at several strengths of an adapter."""

from collections.abc import Mapping

from PIL import Image
from torch import nn

from dora_mm.config.slider import TrainSliderConfig
from dora_mm.core import set_strength
from dora_mm.sampling.before_after import at_strength
from dora_mm.sampling.contact_sheets import column_label
from dora_mm.sampling.grids import image_grid
from dora_mm.sampling.image_sampler import ImageSampler

MOST_THINGS = 3  # of which there are rows where a config names no prompts


def prompts_of_grid(config: TrainSliderConfig) -> list[str]:
    """The prompts of a slider's grid: those of the config, else the neutral caption of the first things."""
    things = config.slider.things[:MOST_THINGS] or (None,)
    return list(config.sample.prompts) or [config.slider.caption("neutral", thing) for thing in things]


def slider_grid(sampler: ImageSampler, adapted: Mapping[str, nn.Module], config: TrainSliderConfig) -> Image.Image:
    """Generates a grid with a row for each prompt and seed, and a column for each strength.

    Afterwards the strength of all adapters is 1.

    Args:
        sampler: Generates with the model.
        adapted: The adapted networks of the model, by name.
        config: The config, whose strengths multiply `adapter.strength`.
    """
    sheets, prompts = config.sample, prompts_of_grid(config)
    pairs = [(prompt, seed) for prompt in prompts for seed in sheets.seeds]
    settings = sheets.model_dump(include={"steps", "guidance", "guidance_rescale", "negative_prompt", "batch_size"})
    columns = []
    for strength in sheets.strengths:
        texts, seeds = [prompt for prompt, _ in pairs], [seed for _, seed in pairs]
        shown, label = strength * config.adapter.strength, f"strength {strength:g}"
        columns.append(at_strength(sampler, adapted, shown, texts, seeds, metadata=label, **settings))
    for network in adapted.values():
        set_strength(network, 1.0)  # training resumes at this strength
    labels = [f"{prompt or '(no prompt)'}, seed {seed}" if len(sheets.seeds) > 1 else prompt for prompt, seed in pairs]
    heads = [column_label(None, strength, ["strength"]) for strength in sheets.strengths]
    return image_grid([list(row) for row in zip(*columns, strict=True)], labels, heads)
