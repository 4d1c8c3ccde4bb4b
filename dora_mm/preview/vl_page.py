"""The page of a dry run of a training of a vision-language model."""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dora_mm.adapting.compiled import compiled_line
from dora_mm.adapting.files import remarks_on_files
from dora_mm.adapting.networks import TrainedNetworks, adapt
from dora_mm.adapting.parts import MODEL
from dora_mm.adapting.sharding import division
from dora_mm.config.vl import TrainVLConfig
from dora_mm.data.vl.needed import data_needed
from dora_mm.models.hub import UnreachableError
from dora_mm.models.vl.families import load_vl_model_if_local, structure_of
from dora_mm.models.vl.vl_model import Structure, VLModel, check_in_step
from dora_mm.preview.memory import memory_table
from dora_mm.preview.parts import about_untouched, parts_table
from dora_mm.preview.training import (
    left_lines,
    length_line,
    measure_accumulated,
    optimizer_line,
    slow_hardware,
    time_line,
    when,
    why_not_measured,
)
from dora_mm.preview.vl_data import DataPreview, batch_of, present_splits, preview_data
from dora_mm.preview.vl_memory import estimated_cost, network_parts, tower_work
from dora_mm.registries.vl_tasks import TASKS
from dora_mm.tasks.held_out import by_loss
from dora_mm.tasks.preferences import preferences_of
from dora_mm.tasks.vl import VLBatches
from dora_mm.train.day import dated, day_for
from dora_mm.train.optim import with_steps
from dora_mm.train.preflight import OPTIMIZER, QUANTIZATION, ROWS, Problems, finished_steps, first_problem
from dora_mm.train.setup import training_setup


def vl_page(
    config: TrainVLConfig,
    accelerator: Accelerator,
    problems: Problems,
    resume: Path | None = None,
    *,
    decode: bool = False,
) -> Iterator[str]:
    """Sections of text: what would be trained, the data, rows as the model sees them, memory and time.

    Neither the weights nor the data need be there; what depends on them is then left out.

    Args:
        config: The config.
        accelerator: Knows the device, the mixed precision and the processes.
        problems: Those found by `preflight`; what is wrong with the rows is added.
        resume: The run directory to resume; None: a new run would start.
        decode: Whether to decode all images.

    Raises:
        ValueError: The config does not fit the model.
    """
    needed = data_needed(config.data, config.vision, config.model.path)
    try:
        structure = structure_of(config.model, config.vision, tower=bool(config.adapter.vision_parts))
    except UnreachableError as error:
        data = preview_data(config, None, decode=decode)
        problems[ROWS] = data.problems
        yield from [str(error), needed, *data.sections, *slow_hardware(accelerator, None)]
        return
    trained = adapted(structure, config)
    yield trained_section(config, structure, trained)
    yield needed
    unmeasured = first_problem(problems, (OPTIMIZER, QUANTIZATION))
    model, has_weights = (None, False) if QUANTIZATION in problems else open_model(config, accelerator, resume)
    data = preview_data(config, model, colour=sys.stdout.isatty(), decode=decode)
    problems[ROWS] = data.problems
    yield from data.sections
    if config.train.shard and model:
        check_in_step(model, data.sets)
    batches = None
    if model and len(data.sets) == len(config.data.all_tasks):
        accumulated = config.train.gradient_accumulation_steps
        process = (accelerator.process_index, accelerator.num_processes)
        settings: dict[str, Any] = {"on_bad_data": "skip", "accumulated": accumulated, "process": process}
        batches = VLBatches(model, data.sets, seed=config.seed, **settings)
    yield from length_sections(config, batches, resume)
    if config.train.compile:
        yield compiled_line(trained.networks, structure.target_maps)
    yield from reference_section(config)
    yield from validation_sections(config, batches)
    shard, networks, work = config.train.shard, trained.networks.values(), {}
    if model and data.largest:
        batch = batch_of(model, data.sets, data.largest)
        tower = tower_work(structure.networks[MODEL], structure.target_maps[MODEL], batch)
        work = {"num_tokens": data.largest.num_tokens, "tower_work": tower}
    why_not = unmeasured or why_not_measured(accelerator, networks, shard=shard, **work)
    if batches is None:
        why_not = unmeasured or why_no_batches(config, data)
    elif not why_not and not has_weights:
        why_not = f"the weights of {config.model.path} are not on this machine"
    if batches and not why_not:
        try:
            yield measured_cost(config, accelerator, batches, data, finished_steps(resume))
        except torch.OutOfMemoryError:
            why_not = "a step does not fit into the memory of this GPU"
    if why_not:
        reaches_all = config.model.uses_all_parameters
        divided = division(trained, structure.target_maps, reaches_all=reaches_all) if shard else None
        yield estimated_cost(config, accelerator, structure, trained, model, data, divided)
        yield f"time      not measured: {why_not}"
    yield from slow_hardware(accelerator, trained.networks.values())


def why_no_batches(config: TrainVLConfig, data: DataPreview) -> str:
    """Why there are no rows to measure a step with."""
    if data.problems:
        return data.problems[0]
    here = {task.task for task, split, _ in present_splits(config) if split == "train"}
    if missing := [task.task for task in config.data.all_tasks if task.task not in here]:
        return f"the training data of {', '.join(missing)} are not on this machine"
    return f"the files of {config.model.path} are not on this machine"


def adapted(model: VLModel | Structure, config: TrainVLConfig) -> TrainedNetworks:
    """Adapts the networks of a model as the config says."""
    return adapt(model.networks, model.target_maps, config.adapter, seed=config.seed, backend=config.backend)


def open_model(config: TrainVLConfig, accelerator: Accelerator, resume: Path | None) -> tuple[VLModel | None, bool]:
    """The model where it is on this machine and some data is there, too; and whether it has its weights.

    Its rows have the day of the run to resume.

    Raises:
        ValueError: It does not do a task of the config.
    """
    if not any(present_splits(config)):
        return None, False
    settings: dict[str, Any] = {"seed": config.seed, "device": accelerator.device}
    settings["trained_tower"] = bool(config.adapter.vision_parts)
    section = dated(config, day_for(config.model, resume)).model
    model, has_weights = load_vl_model_if_local(section, config.vision, **settings)
    if model:
        model.check(task.task for task in config.data.all_tasks)
    return model, has_weights


def trained_section(config: TrainVLConfig, structure: Structure, trained: TrainedNetworks) -> str:
    """The trained parameters of the model, by part."""
    table = parts_table(trained, structure.networks, structure.target_maps, config.adapter, config.optimizer)
    about = [*about_untouched(trained, structure.networks, structure.target_maps), *remarks_on_files(trained)]
    return "\n".join([trained.share, table, *about])


def length_sections(config: TrainVLConfig, batches: VLBatches | None, resume: Path | None) -> Iterator[str]:
    """Steps and epochs, optimizer and schedule; nothing where the number of rows is not known."""
    if batches:
        per_epoch = batches.steps_per_epoch
        length = with_steps(config.train, config.schedule, per_epoch)
        yield "\n".join([length_line(length, per_epoch), *left_lines(resume, length.steps)])
        yield optimizer_line(config.optimizer, config.schedule, length.steps, config.ema)


def reference_section(config: TrainVLConfig) -> Iterator[str]:
    """The reference model of preference pairs, and when it is computed; empty if no task has pairs."""
    if any(TASKS[task.task].pairs for task in config.data.all_tasks):
        if config.adapter.starts_as_base:
            yield "reference the model without its adapters, in every step: no second model"
        else:
            yield "reference the model as it starts, which is asked about all pairs before the first step"


def validation_sections(config: TrainVLConfig, batches: VLBatches | None) -> Iterator[str]:
    """When the adapter is validated, and by what; nothing where no task has validation data."""
    if valid := [task.task for task in config.data.all_tasks if task.valid]:
        by = ", ".join(f"{'loss' if by_loss(config.evaluate, name) else 'score'} on {name}" for name in valid)
        steps = with_steps(config.train, config.schedule, batches.steps_per_epoch).steps if batches else None
        often = when(config.evaluate, steps or config.train.steps)
        yield f"validated {often}; the best adapter is the one with the best {by}"
        if (every := config.evaluate.per_example_every) is not None:
            again = f", every {every:,} steps" if every else ""
            yield f"each      the loss of each validation row in a pass of its own, at the start{again} and at the end"


def measured_cost(
    config: TrainVLConfig, accelerator: Accelerator, batches: VLBatches, data: DataPreview, done: int
) -> str:
    """Memory and time of a training, by a short step of it; the memory with the longest rows."""
    model = batches.model
    trained = adapted(model, config)
    train = with_steps(config.train, config.schedule, batches.steps_per_epoch)
    preferences = preferences_of(model, config)
    if preferences.kept:  # what a step looks up takes no time
        preferences.reference = lambda batch: torch.zeros(())
    parts = training_setup(accelerator, config, train, trained, preferences.loss)
    largest = partial(batch_of, model, data.sets, data.largest) if data.largest else None
    cost = measure_accumulated(parts, batches, prepared=model.prepares_batches, largest=largest)
    ema = config.ema is not None
    memory = memory_table(network_parts(model.networks), trained.parameters, config.optimizer, cost, ema=ema)
    return f"{memory}\n\n{time_line(cost, train.steps - done, 'validation')}"
