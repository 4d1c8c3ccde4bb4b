"""What a training shows of its adapter: a sheet without and with it, pictures in its card, the line that draws."""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from PIL import Image
from torch import nn

from dora_mm import formats
from dora_mm.config.images import TrainDiffusionConfig
from dora_mm.config.pictures import DrawConfig, JobConfig, SampleConfig
from dora_mm.core import set_strength
from dora_mm.core.inject import merged_adapters
from dora_mm.models.images.image_model import ImageModel
from dora_mm.sampling.grids import sheet
from dora_mm.sampling.pictures import PictureSampler, sample
from dora_mm.sampling.sheets import save_atomically
from dora_mm.utils.run_directory import RunDirectory

MOST_SHOWN = 6  # pictures in a model card: of 1024 pixels, each has 1.5 MB


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
            guidance_rescale=settings.guidance_rescale,
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
        strength: The strength of every adapter; 0 is the base model, which reads new tokens as plain words.
        prompts: The prompts.
        seeds: A seed for each prompt.
        **settings: Further arguments of `sample`.

    Returns:
        One picture per prompt.
    """
    for network in adapted.values():
        set_strength(network, strength)
    own = model.model if isinstance(model, PictureSampler) else model
    with merged_adapters(adapted.values()), own.new_tokens.off() if strength == 0 else nullcontext():
        return sample(model, prompts, seeds, **settings)


def before_after_sheet(
    model: ImageModel | PictureSampler,
    adapted: Mapping[str, nn.Module],
    config: SampleConfig,
    *,
    strength: float = 1.0,
    full: bool = False,
    average: Callable[[], AbstractContextManager[None]] | None = None,
) -> tuple[Image.Image, dict[str, list[Image.Image]]]:
    """Draws a sheet with one column per prompt and for each seed a row of the adapter's pictures.

    Above it is a row of the base model's, if `config.before_after` is set, and below it one of the average's, where
    there is one: all with the same seed. Afterwards the strength of all adapters is 1.

    Args:
        model: The model, or what draws with it, if its text encoders are not adapted.
        adapted: The adapted networks of the model, by name.
        config: The `sample` section: prompts, seeds and settings.
        strength: The strength of the adapter.
        full: The weights themselves were trained (method `full`): there is no base model to compare with, and no
            strength.
        average: Opens a context in which the adapters are those of an average; None: there is none.

    Returns:
        The sheet, and by the label of a row (before, after, average) its picture of each prompt with the first seed.
    """
    prompts = list(config.prompts)
    jobs, seeds = prompts * len(config.seeds), [seed for seed in config.seeds for _ in prompts]
    settings = config.model_dump(include={"steps", "guidance", "guidance_rescale", "negative_prompt", "batch_size"})
    kinds = {"before": 0.0} if config.before_after and not full else {}
    kinds |= {"after": strength} | ({"average": strength} if average else {})
    drawn = {}
    for label, shown in kinds.items():
        with average() if average and label == "average" else nullcontext():
            if full:
                drawn[label] = sample(model, jobs, seeds, description=label, **settings)
            else:
                drawn[label] = at_strength(model, adapted, shown, jobs, seeds, description=label, **settings)
    for network in () if full else adapted.values():
        set_strength(network, 1.0)  # training resumes at this strength
    rows, labels = [], []
    for index, seed in enumerate(config.seeds):
        for label, pictures in drawn.items():
            rows.append(pictures[index * len(prompts) : (index + 1) * len(prompts)])
            labels.append(label if len(config.seeds) == 1 else f"{label}, seed {seed}")
    return sheet(rows, labels, prompts), {label: pictures[: len(prompts)] for label, pictures in drawn.items()}


def add_pictures(config: TrainDiffusionConfig, folder: Path, pictures: list[Image.Image]) -> None:
    """Saves the first pictures beside the adapter, and shows them in its model card."""
    shown = []
    for number, (prompt, picture) in enumerate(zip(config.sample.prompts[:MOST_SHOWN], pictures, strict=False), 1):
        shown.append((prompt, f"pictures/{number}.png"))
        save_atomically(folder / shown[-1][1], picture)
    formats.write_card(folder, pictures=shown)


def drawing_command(config: TrainDiffusionConfig, run: RunDirectory) -> str:
    """Draws with the adapter: the prompts that `dora-mm new` has written beside the config, or the first of its own.

    The seeds are those of the sheet, as are the settings that the adapter's file says: see `as_in_sheets`.
    """
    words, prompts = ["dora-mm", "sample"], Path(f"{config.name}_prompts.txt")
    if prompts.is_file():
        words.append(str(prompts))
    words += ["--set", f"adapter.path={run.path}"]
    if not prompts.is_file():
        prompt = next(iter(config.sample.prompts), config.data.instance_prompt or "a lighthouse")
        words.append(f"prompts=[{json.dumps(prompt, ensure_ascii=False)}]")
    if config.sample.seeds != JobConfig.model_fields["seeds"].default:
        words.append(f"seeds={list(config.sample.seeds)}")
    if "full" not in config.adapter.methods:  # the base is replaced
        words.append("strengths=[0, 1]")
    return shlex.join(words)
