"""Fine-tunes a vision-language model on one or several tasks: with DoRA, LoRA or all weights, part by part."""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from dora_mm.config.vl import TrainVLConfig
from dora_mm.data.vl.example import Answer
from dora_mm.data.vl.needed import data_needed
from dora_mm.data.vl.splits import ValidationSet, open_training, open_validation
from dora_mm.eval.vl.metrics import report, score_all
from dora_mm.eval.vl.scores import VLScores
from dora_mm.sampling.answers import answer_all
from dora_mm.tasks import vl_adapters
from dora_mm.tasks.families import load_family, structure_of
from dora_mm.tasks.vl import VLBatches, answerers
from dora_mm.tasks.vl_adapters import Trained
from dora_mm.train.checkpoint import last_step
from dora_mm.train.cost import peak_memory_mb, seconds_per_step
from dora_mm.train.loop import fit
from dora_mm.train.metrics import read_metrics
from dora_mm.train.optim import build_optimizer, with_steps
from dora_mm.train.prefetch import Prefetched
from dora_mm.train.preview import slow_hardware
from dora_mm.train.processes import join_processes, main_process_first
from dora_mm.train.run import RunDirectory, training_run, training_summary, write_summary
from dora_mm.train.schedule import build_schedule
from dora_mm.train.validation import Validation, main_values

log = logging.getLogger(__name__)


def main(config: TrainVLConfig, *, resume: Path | None = None, dry_run: bool = False) -> None:
    """Trains the adapter, and scores it on the validation splits.

    Writes to the run directory: checkpoints/, metrics.jsonl, the scores in validation/, the best adapters so far in
    best/, the final adapter in adapter/ and summary.json.

    Args:
        config: The config.
        resume: The run directory to resume from its last checkpoint; None starts a new run.
        dry_run: Only print what would be trained, and which data would be read or is missing.

    Raises:
        ValueError: The data, the model, the initial adapter or the output folder cannot be used. A new run directory
            is created only after these checks.
    """
    if dry_run:
        print(describe(config))
        return
    # A batch without images leaves the vision parts without gradients, and some classes never use a tower's last layer.
    unused = config.model.family == "vlm"
    accelerator = join_processes(config.train.mixed_precision, find_unused_parameters=unused)
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
        splits = open_validation(config.data, config.evaluate, model, answered=True)
    for remark in slow_hardware(accelerator, model.networks.values()):
        log.warning("%s", remark)
    identity = dict(model.identity)
    answers = answerers(model, splits, config.evaluate)
    trained = vl_adapters.adapt(model, config.adapter, seed=config.seed, backend=config.backend)
    if config.adapter.init_from:
        vl_adapters.load_initial(trained, config, identity)
    for name, injected in trained.reports.items():
        log.info("%s: %d modules adapted, %s parameters", name, injected.num_modules, f"{injected.num_parameters:,}")
    log.info("%s", trained.share)

    process = (accelerator.process_index, accelerator.num_processes)
    batches = VLBatches(model, training, seed=config.seed, process=process)
    train = with_steps(config.train, config.schedule, batches.per_epoch)
    optimizer = build_optimizer(trained.parameters, config.optimizer, trained.rates)
    schedule = build_schedule(optimizer, config.schedule, train.steps)
    inputs = {f"the data of {name}": found.table.identity for name, found in training.items()} | identity
    optimizer = accelerator.prepare(optimizer)
    if train.gradient_checkpointing:
        network: Any = trained.networks["model"]
        network.activation_checkpointing_enable()
        network.disable_input_require_grads()  # they would go through a frozen tower, and BLIP adds to its inputs
    write = partial(vl_adapters.save, trained, config, identity)
    vl_adapters.train_mode(trained.networks.values())
    with training_run(accelerator, config, inputs, resume, train.steps) as run:
        validate = None
        if accelerator.is_main_process:
            evaluate = partial(score_splits, answers, model.networks, splits, config)
            validate = Validation(run, evaluate, write, last_step(run.checkpoints))

        def observe(step: int) -> None:
            if validate and config.evaluate.every and step % config.evaluate.every == 0 and step < train.steps:
                log_scores(step, main_values(validate(step)))

        with Prefetched(batches, enabled=model.prepares_batches) as batch_at:
            fit(
                accelerator=accelerator,
                run=run,
                config=train,
                seed=config.seed,
                networks=trained.networks,
                parameters=trained.parameters,
                optimizer=optimizer,
                schedule=schedule,
                batch_at=batch_at,
                loss=model.loss,
                observe=observe,
            )
        if validate:
            write(run.adapter)
            finish(config, run, trained, validate, train.steps)


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


def finish(config: TrainVLConfig, run: RunDirectory, trained: Trained, validate: Validation, steps: int) -> None:
    """Computes the final scores, writes summary.json, and prints both."""
    memory = peak_memory_mb()  # of the training, so it is read before the last validation
    scores = validate(steps)
    validate.close()
    summary = training_summary(
        run,
        config.adapter,
        trained.num_trained,
        steps,
        trainable_share=round(100 * trained.num_trained / trained.num_all, 3),
        seconds_per_step=round(seconds_per_step(read_metrics(run.path / "metrics.jsonl")), 4),
        peak_memory_mb=round(memory),
        **{name: round(value, 2) for name, value in main_values(scores).items()},
    )
    write_summary(run, summary)
    for found in scores.values():
        print(f"\n{report(found)}")
    print(f"\nadapter  {run.adapter}")


# --- dry run ---------------------------------------------------------------------------------------------------------


def describe(config: TrainVLConfig) -> str:
    """The parameters that would be trained, counted without loading weights, and the data, present and missing."""
    structure = structure_of(config.model, config.vision, tower=bool(config.adapter.vision_parts))
    trained = vl_adapters.adapt(structure, config.adapter, seed=config.seed, backend=config.backend)
    tables = [f"{name}\n{injected}" for name, injected in trained.reports.items()]
    needed = data_needed(config.data, config.vision, config.model.path)
    remarks = slow_hardware(Accelerator(mixed_precision=config.train.mixed_precision), trained.networks.values())
    return "\n\n".join([trained.share, *tables, needed, *remarks])
