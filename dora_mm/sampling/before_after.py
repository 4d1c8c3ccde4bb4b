"""The same prompts and seeds without and with an adapter, on one sheet."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import nn

from dora_mm.config.sdxl import SampleConfig
from dora_mm.core import fixed_parameters, merge, set_strength, unmerge
from dora_mm.core.adapted import AdaptedLayer
from dora_mm.sampling.grids import sheet
from dora_mm.sampling.sdxl import sample


@contextmanager
def weights_computed_once(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, the adapted weights are built once, and a picture costs what the bare model's does.

    Half-precision weights are merged: kept as they are, a product that holds their whole update is twice as long.
    """
    with ExitStack() as stack:
        for network in networks:
            active = [m for m in network.modules() if isinstance(m, AdaptedLayer) and not m.is_base()]
            if any(layer.weight.element_size() < 4 for layer in active):
                merge(network)
                stack.callback(unmerge, network)
            else:
                stack.enter_context(fixed_parameters(network))
        yield


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
    with weights_computed_once(adapted.values()):
        return sample(pipe, prompts, seeds, **settings)


def before_after_sheet(
    pipe: StableDiffusionXLPipeline,
    adapted: Mapping[str, nn.Module],
    config: SampleConfig,
    *,
    strength: float = 1.0,
    whole: bool = False,
) -> Image.Image:
    """A row of pictures per seed, with `before_after` the bare model's above the adapter's; a column per prompt.

    Args:
        strength: of the adapter.
        whole: the weights themselves were trained: there is no bare model left, and no strength.
    """
    prompts = list(config.prompts)
    jobs, seeds = prompts * len(config.seeds), [seed for seed in config.seeds for _ in prompts]
    settings = config.model_dump(include={"steps", "guidance", "negative_prompt", "batch_size"})
    kinds = {"before": 0.0, "after": strength} if config.before_after else {"after": strength}
    drawn = {}
    if whole:
        drawn["after"] = sample(pipe, jobs, seeds, description="after", **settings)
    else:
        for label, shown in kinds.items():
            drawn[label] = at_strength(pipe, adapted, shown, jobs, seeds, description=label, **settings)
        for network in adapted.values():
            set_strength(network, 1.0)  # what training goes on with
    rows, labels = [], []
    for index, seed in enumerate(config.seeds):
        for label, pictures in drawn.items():
            rows.append(pictures[index * len(prompts) : (index + 1) * len(prompts)])
            labels.append(label if len(config.seeds) == 1 else f"{label}, seed {seed}")
    return sheet(rows, labels, prompts)
