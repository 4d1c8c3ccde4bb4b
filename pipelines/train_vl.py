"""Fine-tunes a vision-language model on one or several tasks: with DoRA, LoRA or all weights, part by part."""

import logging
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from dora_mm import formats
from dora_mm.adapting.files import save_trained
from dora_mm.adapting.initial import load_initial_folder
from dora_mm.adapting.networks import TrainedNetworks, adapt, train_mode
from dora_mm.adapting.parts import MODEL
from dora_mm.config.vl import TrainVLConfig
from dora_mm.data.vl.example import Answer
from dora_mm.data.vl.needed import data_needed
from dora_mm.data.vl.splits import ValidationSet, open_training, open_validation
from dora_mm.eval.vl.metrics import report, score_all
from dora_mm.eval.vl.scores import VLScores
from dora_mm.models.families import Structure, load_family, load_if_here, pinned, structure_of
from dora_mm.models.opening import UnreachableError
from dora_mm.models.vl import VLModel
from dora_mm.preview.lengths import row_lines
from dora_mm.preview.parts import about_derived, parts_table
from dora_mm.preview.questions import DataPreview, batch_of, present_splits, preview_data
from dora_mm.preview.training import (
    TOO_SLOW,
    StepCost,
    is_measured,
    length_line,
    measure_accumulated,
    memory_table,
    slow_hardware,
    time_line,
)
from dora_mm.preview.vl_memory import estimated_activations, network_parts, quantized_bytes
from dora_mm.sampling.answers import answer_all
from dora_mm.tasks.vl import VLBatches, answerers
from dora_mm.train.checkpoint import last_step
from dora_mm.train.cost import peak_memory_mb, seconds_per_step
from dora_mm.train.loop import fit
from dora_mm.train.metrics import read_metrics
from dora_mm.train.optim import build_optimizer, with_steps
from dora_mm.train.prefetch import Prefetcher
from dora_mm.train.processes import join_processes, main_process_first
from dora_mm.train.run import training_run, training_summary, write_summary
from dora_mm.train.schedule import build_schedule
from dora_mm.train.validation import Validation, main_values
from dora_mm.utils.run_directory import RunDirectory

log = logging.getLogger(__name__)


def main(config: TrainVLConfig, *, resume: Path | None = None, dry_run: bool = False) -> None:
    """Trains the adapter, and scores it on the validation splits.

    Writes to the run directory: checkpoints/, metrics.jsonl, the scores in validation/, the best adapters so far in
    best/, the final adapter in adapter/ and summary.json.

    Args:
        config: The config.
        resume: The run directory to resume from its last checkpoint; None starts a new run.
        dry_run: Only print what would be trained, which data would be read or is missing, how the model sees it, and
            what it would cost.

    Raises:
        ValueError: The data, the model, the initial adapter or the output folder cannot be used. A new run directory
            is created only after these checks.
    """
    if dry_run:
        for section in describe(config):
            print(section, end="\n\n", flush=True)
        return
    unused = not config.model.uses_all_parameters
    accelerator = join_processes(config.train.mixed_precision, find_unused_parameters=unused)
    config = config.model_copy(update={"model": pinned(config.model)})  # a resumed run reads what this one has read
    model = load_family(
        config.model,
        config.vision,
        seed=config.seed,
        trained_tower=bool(config.adapter.vision_parts),
        device=accelerator.device,
    )
    model.check(task.task for task in config.data.all_tasks)
    with main_process_first(accelerator):  # it writes the tables that the others open
        training = open_training(config.data, config.train.batch_size, model)
        rows = row_lines(model, training)
        splits = open_validation(config.data, config.evaluate, model, answered=True)
    for remark in slow_hardware(accelerator, model.networks.values()):
        log.warning("%s", remark)
    identity = dict(model.identity)
    answers = answerers(model, splits, config.evaluate)
    trained = adapt_networks(model, config)
    if config.adapter.init_from:
        load_initial_folder(trained, config.adapter, identity)
    for name, injected in trained.reports.items():
        log.info("%s: %d modules adapted, %s parameters", name, injected.num_modules, f"{injected.num_parameters:,}")
    log.info("%s", trained.share)
    if accelerator.is_main_process:
        log.info("%s", rows)

    process = (accelerator.process_index, accelerator.num_processes)
    on_bad_data = config.data.on_bad_data
    batches = VLBatches(model, training, seed=config.seed, on_bad_data=on_bad_data, process=process)
    parts = build(config, model, trained, accelerator, batches.per_epoch)
    train = parts["config"]
    inputs = {f"the data of {name}": found.table.identity for name, found in training.items()} | identity
    write = partial(save_trained, trained, config, identity)
    with training_run(accelerator, config, inputs, resume, train.steps) as run:
        validate = None
        if accelerator.is_main_process:
            evaluate = partial(score_splits, answers, model.networks, splits, config)
            validate = Validation(run, evaluate, write, last_step(run.checkpoints))

        def observe(step: int) -> None:
            if validate and config.evaluate.every and step % config.evaluate.every == 0 and step < train.steps:
                log_scores(step, main_values(validate(step)))

        with Prefetcher(batches, enabled=model.prepares_batches) as batch_at:
            fit(run=run, **parts, batch_at=batch_at, state={"row counts": model.counts}, observe=observe)
        numbers = torch.tensor([model.counts.num_cut, model.counts.num_left_out], device=accelerator.device)
        counts: Any = accelerator.reduce(numbers, "sum")
        if validate:
            write(run.adapter)
            finish(config, run, trained, validate, train.steps, *counts.tolist())


def adapt_networks(model: VLModel | Structure, config: TrainVLConfig) -> TrainedNetworks:
    """Adapts the networks of a model as the config says."""
    return adapt(model.networks, model.target_maps, config.adapter, seed=config.seed, backend=config.backend)


def build(
    config: TrainVLConfig, model: VLModel, trained: TrainedNetworks, accelerator: Accelerator, batches_per_epoch: int
) -> dict[str, Any]:
    """What a training consists of but for its batches: the arguments of `fit`, and of `measure_step`, by name."""
    train = with_steps(config.train, config.schedule, batches_per_epoch)
    optimizer = build_optimizer(trained.parameters, config.optimizer, trained.rates)
    schedule = build_schedule(optimizer, config.schedule, train.steps)
    if train.gradient_checkpointing:
        network: Any = trained.networks["model"]
        network.activation_checkpointing_enable()
        network.disable_input_require_grads()  # they would go through a frozen tower, and BLIP adds to its inputs
    train_mode(trained.networks.values())
    return {
        "accelerator": accelerator,
        "config": train,
        "seed": config.seed,
        "networks": trained.networks,
        "parameters": trained.parameters,
        "optimizer": accelerator.prepare(optimizer),
        "schedule": schedule,
        "loss": model.loss,
    }


def score_splits(
    answers: Mapping[str, Answer],
    networks: Mapping[str, nn.Module],
    splits: Mapping[str, ValidationSet],
    config: TrainVLConfig,
) -> dict[str, VLScores]:
    """The current scores of the model by task."""
    settings = config.evaluate
    found = answer_all(answers, networks.values(), splits, settings.batch_size, settings.limit)
    return score_all(found, meteor=False)


def log_scores(step: int, values: dict[str, float]) -> None:
    log.info("step %d: %s", step, ", ".join(f"{name} {value:.2f}" for name, value in values.items()))


def finish(
    config: TrainVLConfig,
    run: RunDirectory,
    trained: TrainedNetworks,
    validate: Validation,
    steps: int,
    num_cut: int,
    num_left_out: int,
) -> None:
    """Computes the final scores, writes summary.json, and prints both."""
    memory = peak_memory_mb()  # of the training, so it is read before the last validation
    if num_cut:
        log.warning("%d rows of the training's batches were longer than a row may be, and lost text", num_cut)
    if num_left_out:
        log.warning("%d rows of the training's batches could not be encoded, and were left out", num_left_out)
    scores = validate(steps)
    validate.close()
    if MODEL in trained.reports:
        main = {name: (found.main, found.value) for name, found in scores.items() if found.value is not None}
        formats.write_card(run.adapter, scores=main)
    summary = training_summary(
        run,
        config.adapter,
        trained.num_trained,
        steps,
        trainable_share=round(100 * trained.num_trained / trained.num_all, 3),
        seconds_per_step=round(seconds_per_step(read_metrics(run.path / "metrics.jsonl")), 4),
        peak_memory_mb=round(memory),
        rows_cut=num_cut,
        rows_left_out=num_left_out,
        **{name: round(value, 2) for name, value in main_values(scores).items()},
    )
    write_summary(run, summary)
    for name, found in scores.items():
        print(f"\n{report(name, found)}")
    print(f"\nadapter  {run.adapter}")


# --- dry run ---------------------------------------------------------------------------------------------------------


def describe(config: TrainVLConfig) -> Iterator[str]:
    """Sections of text: what would be trained, the data, rows as the model sees them, memory and time.

    Neither the weights nor the data need be there; what depends on them is then left out.

    Raises:
        ValueError: After all sections: a training would stop, because of its data.
    """
    accelerator = Accelerator(mixed_precision=config.train.mixed_precision)
    tower, needed = bool(config.adapter.vision_parts), data_needed(config.data, config.vision, config.model.path)
    try:
        structure = structure_of(config.model, config.vision, tower=tower)
    except UnreachableError as error:
        yield from [str(error), needed, *preview_data(config, None).sections, *slow_hardware(accelerator, None)]
        return
    trained = adapt_networks(structure, config)
    table = parts_table(trained, structure.networks, structure.target_maps, config.adapter, config.optimizer)
    yield "\n".join([trained.share, table, *about_derived(structure.networks, structure.target_maps)])
    yield needed
    settings: dict[str, Any] = {"seed": config.seed, "trained_tower": tower, "device": accelerator.device}
    model, has_weights = None, False
    if any(present_splits(config)):
        model, has_weights = load_if_here(config.model, config.vision, **settings)
    if model:
        model.check(task.task for task in config.data.all_tasks)
    data = preview_data(config, model, colour=sys.stdout.isatty())
    yield from data.sections
    num_tokens = data.largest.num_tokens if data.largest else 1
    why_not = None if is_measured(accelerator, trained.networks.values(), num_tokens) else TOO_SLOW
    if model is None or len(data.sets) < len(config.data.all_tasks):
        why_not = "not all training data can be read"
    else:
        batches = VLBatches(model, data.sets, seed=config.seed).per_epoch
        yield length_line(with_steps(config.train, config.schedule, batches), batches)
    if not why_not and not has_weights:
        why_not = f"the weights of {config.model.path} are not on this machine"
    if model and not why_not:
        try:
            yield measured_cost(config, accelerator, model, data)
        except torch.OutOfMemoryError:
            why_not = "a step does not fit into the memory of this GPU"
    if why_not:
        yield estimated_cost(config, accelerator, structure, trained, data)
        yield f"time      not measured: {why_not}"
    yield from slow_hardware(accelerator, trained.networks.values())
    if data.problems:
        raise ValueError(data.problems[0])


def measured_cost(config: TrainVLConfig, accelerator: Accelerator, model: VLModel, data: DataPreview) -> str:
    """Memory and time of a training, by a short step of it; the memory with the longest rows."""
    trained = adapt_networks(model, config)
    batches = VLBatches(model, data.sets, seed=config.seed, on_bad_data="skip")
    parts = build(config, model, trained, accelerator, batches.per_epoch)
    largest = partial(batch_of, model, data.sets, data.largest) if data.largest else None
    cost = measure_accumulated(parts, batches, prepared=model.prepares_batches, largest=largest)
    memory = memory_table(network_parts(model.networks), trained.parameters, config.optimizer, cost)
    return f"{memory}\n\n{time_line(cost, parts['config'].steps, 'validation')}"


def estimated_cost(
    config: TrainVLConfig, accelerator: Accelerator, structure: Structure, trained: TrainedNetworks, data: DataPreview
) -> str:
    """Memory of a training, from the sizes of its networks, and of its longest rows where those are known."""
    network, targets = structure.networks[MODEL], structure.target_maps[MODEL]
    cost = None
    if data.largest:
        half = config.train.mixed_precision != "no"
        activations = estimated_activations(
            network,
            targets,
            trained.reports.get(MODEL),
            data.largest,
            2 if half else 4,
            config.train.gradient_checkpointing,
        )
        cost = StepCost(None, activations, f"an estimate by the sizes of its layers, for {data.largest}")
    stored = quantized_bytes(network, config.model.quantization)
    place = accelerator.device.type
    return memory_table(
        network_parts(structure.networks), trained.parameters, config.optimizer, cost, stored=stored, place=place
    )
