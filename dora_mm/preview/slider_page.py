"""The page of a dry run of a training of a slider."""

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator

from dora_mm import formats
from dora_mm.adapting import networks
from dora_mm.adapting.parts import check_names
from dora_mm.config.slider import Side, TrainSliderConfig
from dora_mm.models.hub import UnreachableError
from dora_mm.models.images.families import about_prediction, load_image_model, load_image_model_if_local
from dora_mm.models.images.image_model import ImageModel
from dora_mm.preview.memory import memory_table
from dora_mm.preview.parts import parts_table
from dora_mm.preview.training import (
    left_lines,
    measure_accumulated,
    optimizer_line,
    slow_hardware,
    time_line,
    why_not_measured,
)
from dora_mm.tasks.slider import CaptionSliderBatches, Pairs, SliderTask, read_pairs, slider_batches
from dora_mm.train.preflight import OPTIMIZER, QUANTIZATION, Problems, finished_steps, first_problem
from dora_mm.train.setup import training_setup

MOST_NAMES = 8  # things that are named


def slider_page(
    config: TrainSliderConfig, accelerator: Accelerator, problems: Problems, resume: Path | None = None
) -> Iterator[str]:
    """Sections of text: the captions or pairs, the modules, and the memory and time of a measured step.

    Of a hub model that is not on this machine, only the captions or pairs. Nothing is written.

    Args:
        config: The config.
        accelerator: Knows the device, the mixed precision and the processes.
        problems: Those found by `preflight`.
        resume: The run directory to resume; None: a new run would start.

    Raises:
        ValueError: The pairs cannot be read, or the config does not fit the model.
    """
    pairs = read_pairs(config.slider)
    yield "\n".join([describe_slider(config, pairs), *left_lines(resume, config.train.steps)])
    try:
        model = load_image_model(config.model, empty=True)
    except UnreachableError:
        yield f"{config.model.path} is not on this machine: modules, memory and time are left out"
        return
    model.check_rescale(config.sample.guidance_rescale, "sample.guidance_rescale")
    check_names(config.adapter, model.target_maps)
    empty = list(model.networks.values())
    why_not = first_problem(problems, (OPTIMIZER, QUANTIZATION)) or why_not_measured(accelerator, empty, shard=False)
    if not why_not:
        if (found := load_image_model_if_local(config.model)) is None:
            why_not = f"the weights of {config.model.path} are not on this machine"
        else:
            model = found.to(accelerator.device)
    if why_not:
        yield trained_sections(config, model, adapted(config, model))
        yield f"memory and time are not measured: {why_not}"
    else:
        yield from measured_sections(config, model, pairs, accelerator, config.train.steps - finished_steps(resume))
    yield from slow_hardware(accelerator, empty)


def describe_slider(config: TrainSliderConfig, pairs: Pairs | None) -> str:
    """Lines about the two sides of a slider, and the passes of a step."""
    slider, strengths = config.slider, ", ".join(f"{each:+g}" for each in config.strengths)
    passes = f"{len(config.strengths)} backward passes, at strengths {strengths}"
    if slider.images is not None and pairs is not None:
        folders = f"{slider.images.plus} (+) and {slider.images.minus} (-)"
        return f"slider    {len(pairs[0])} pairs in {folders}\na step    {passes}"
    thing = next(iter(slider.things), None)
    keys: dict[str, Side] = {"+": "plus", "-": "minus", "0": "neutral"}
    sides = {sign: slider.caption(key, thing) for sign, key in keys.items()}
    lines = [f"{sign}         {caption or '(no caption)'}" for sign, caption in sides.items()]
    if slider.things:
        named = ", ".join(slider.things[:MOST_NAMES]) + (", ..." if len(slider.things) > MOST_NAMES else "")
        lines.append(f"things    {len(slider.things)}, of which each image has one: {named}")
    mean = f"{slider.mean_base_passes:g}"
    lines.append(f"a step    {mean} passes of the base model on average, and {passes}")
    return "\n".join(lines)


def adapted(config: TrainSliderConfig, model: ImageModel) -> networks.TrainedNetworks:
    """The adapters of the config, in the model."""
    settings = {"seed": config.seed, "backend": config.backend}
    return networks.adapt(model.adaptable, model.target_maps, config.adapter, **settings)


def trained_sections(config: TrainSliderConfig, model: ImageModel, trained: networks.TrainedNetworks) -> str:
    """The model's prediction type, its trained parameters by part, and the optimizer."""
    table = parts_table(trained, model.adaptable, model.target_maps, config.adapter, config.optimizer)
    remarks = [remark] if (remark := formats.about_format(trained.adapted, "diffusers")) else []
    how = optimizer_line(config.optimizer, config.schedule, config.train.steps, None)
    return "\n".join([about_prediction(config.model), trained.share, table, *remarks, "", how])


def measured_sections(
    config: TrainSliderConfig, model: ImageModel, pairs: Pairs | None, accelerator: Accelerator, steps: int
) -> Iterator[str]:
    """The modules, and the memory and time of a step that is taken, its noisy latents included."""
    batches = slider_batches(config, model, pairs, (accelerator.process_index, accelerator.num_processes))
    with torch.no_grad():
        batches.prompts.keep(batches.captions, 1)
    model.components.release(model.text_encoders)
    trained = adapted(config, model)
    yield trained_sections(config, model, trained)
    training = training_setup(accelerator, config, config.train_by_strength, trained, SliderTask(model).loss)
    cost = measure_accumulated(training, batches, prepared=False)
    if isinstance(batches, CaptionSliderBatches) and cost.seconds is not None:
        cost = cost._replace(seconds=cost.seconds + seconds_of_base(config, accelerator, batches))
    yield memory_table(model.networks, trained.parameters, config.optimizer, cost, ema=False)
    yield time_line(cost, steps, "generating images")


def seconds_of_base(config: TrainSliderConfig, accelerator: Accelerator, batches: CaptionSliderBatches) -> float:
    """The time that the base model takes in a step, by its passes for one group of micro-batches."""
    started = time.monotonic()
    with accelerator.autocast():
        num_passes = batches.measured_passes()
    groups = config.train.gradient_accumulation_steps
    return groups * config.slider.mean_base_passes * (time.monotonic() - started) / num_passes
