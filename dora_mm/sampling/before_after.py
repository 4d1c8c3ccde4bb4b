"""The same prompts and seeds without and with an adapter, on one sheet."""

from collections.abc import Mapping
from contextlib import ExitStack

from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import nn

from dora_mm.config.schema import SampleConfig
from dora_mm.core import fixed_parameters, set_strength
from dora_mm.sampling.grids import sheet
from dora_mm.sampling.sdxl import sample


def at_strength(
    pipe: StableDiffusionXLPipeline,
    adapted: Mapping[str, nn.Module],
    strength: float,
    prompts: list[str],
    seeds: list[int],
    **settings,
) -> list[Image.Image]:
    """`sample` with every adapter at one strength; 0 is the bare model."""
    for network in adapted.values():
        set_strength(network, strength)
    with ExitStack() as stack:
        for network in adapted.values():
            stack.enter_context(fixed_parameters(network))
        return sample(pipe, prompts, seeds, **settings)


def before_after_sheet(
    pipe: StableDiffusionXLPipeline, adapted: Mapping[str, nn.Module], config: SampleConfig, *, compare: bool = True
) -> Image.Image:
    """A row of pictures per seed, the bare model's above the adapter's; a column per prompt.

    Args:
        compare: False leaves the bare model's rows out (weights that were trained whole keep no bare model).
    """
    prompts = list(config.prompts)
    jobs, seeds = prompts * len(config.seeds), [seed for seed in config.seeds for _ in prompts]
    settings = {"steps": config.steps, "guidance": config.guidance, "negative_prompt": config.negative_prompt}
    rows, labels = [], []
    kinds = [("before", 0.0), ("after", config.strength)] if compare else [("after", None)]
    drawn = {}
    for label, strength in kinds:
        if strength is None:
            pictures = sample(pipe, jobs, seeds, description=label, **settings)
        else:
            pictures = at_strength(pipe, adapted, strength, jobs, seeds, description=label, **settings)
        drawn[label] = [pictures[start : start + len(prompts)] for start in range(0, len(pictures), len(prompts))]
    if compare:
        for network in adapted.values():
            set_strength(network, 1.0)  # what training goes on with
    for index, seed in enumerate(config.seeds):
        for label in drawn:
            rows.append(drawn[label][index])
            labels.append(label if len(config.seeds) == 1 else f"{label}, seed {seed}")
    return sheet(rows, labels, prompts)
