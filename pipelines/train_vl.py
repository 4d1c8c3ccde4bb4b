"""Fine-tunes a vision-language model on one or several tasks: with DoRA, LoRA or all weights, part by part."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dora_mm import formats
from dora_mm.adapting.compiled import compile_blocks
from dora_mm.adapting.files import digest_of_adapter, remarks_on_files, save_trained
from dora_mm.adapting.initial import initial_identity, load_initial_folder
from dora_mm.adapting.networks import TrainedNetworks, adapt
from dora_mm.adapting.parts import MODEL
from dora_mm.adapting.sharding import division
from dora_mm.config.vl import TrainVLConfig
from dora_mm.core import base_model
from dora_mm.core.wrappers.streaming import stream
from dora_mm.data.vl.answers import Answer, predictions_of
from dora_mm.data.vl.example import Predictions
from dora_mm.data.vl.splits import TrainingSet, ValidationSet, check_data, open_training, open_validation
from dora_mm.eval.gradients import measuring
from dora_mm.eval.vl.base_scores import FILE as BASE
from dora_mm.eval.vl.base_scores import read_base, with_gain, write_base
from dora_mm.eval.vl.confidence_intervals import AnswerScores
from dora_mm.eval.vl.metrics import report, score_all
from dora_mm.eval.vl.scores import VLScores
from dora_mm.models.streaming import blocks_to_stream
from dora_mm.models.vl.families import is_local, load_vl_model, pinned
from dora_mm.models.vl.vl_model import VLModel, check_in_step
from dora_mm.preview.lengths import row_lines
from dora_mm.preview.training import print_page, slow_hardware
from dora_mm.preview.vl_page import vl_page
from dora_mm.preview.vl_streams import stream_amount
from dora_mm.registries.vl_tasks import TASKS
from dora_mm.sampling.answers import answer_all, num_answered, save_answers
from dora_mm.sampling.gallery.losses import rows_apart
from dora_mm.sampling.next_steps import asking_command
from dora_mm.tasks.held_out import RowLosses, by_loss
from dora_mm.tasks.preferences import KeptReference, preferences_of
from dora_mm.tasks.vl import VLBatches, answerers
from dora_mm.train.checkpoint import is_due, last_step
from dora_mm.train.cost import peak_memory_mb, seconds_per_step
from dora_mm.train.day import RunDay, dated, day_for, started_on
from dora_mm.train.loop import fit
from dora_mm.train.metrics import read_metrics
from dora_mm.train.optim import with_steps
from dora_mm.train.prefetch import Prefetcher
from dora_mm.train.preflight import preflight, stop_at
from dora_mm.train.processes import (
    answering,
    from_main_process,
    join_processes,
    main_process_first,
    of_all_processes,
    share_seen,
    takes_part,
)
from dora_mm.train.run import check_resumed, finished_run, training_run, training_summary, write_summary
from dora_mm.train.setup import training_setup
from dora_mm.train.sharing import shared_among
from dora_mm.train.validation import LOSS, SplitScores, Validation, log_scores, main_values, task_qualities
from dora_mm.train.weights import EMA, WeightAverage, result_of
from dora_mm.utils.evaluating import map_shared
from dora_mm.utils.example_losses import ExampleLosses
from dora_mm.utils.losses import LossSum
from dora_mm.utils.run_directory import SAMPLE_NOW, RunDirectory

log = logging.getLogger(__name__)
COUNTS = "row counts"  # in checkpoints


def main(config: TrainVLConfig, *, resume: Path | None = None, dry_run: bool = False, decode: bool = False) -> None:
    """Trains the adapter, and scores it on the validation splits.

    Writes to the run directory: checkpoints/, metrics.jsonl, base_scores.json, the scores in validation/, the best
    adapters so far in best/, the final adapter in adapter/ and summary.json. `touch RUN/sample-now` asks for answers to
    a few validation rows after the next step, in samples/.

    Args:
        config: The config.
        resume: The run directory to resume from its last checkpoint; None starts a new run.
        dry_run: Only print what would be trained, which data would be read or is missing, how the model sees it, and
            what it would cost, and report why it would be refused.
        decode: Of a dry run, whether it decodes all images.

    Raises:
        ValueError: The data, the model, the initial adapter or the output folder cannot be used. A new run directory
            is created only after these checks.
    """
    unused = not config.model.uses_all_parameters
    accelerator = join_processes(config.train, find_unused_parameters=unused)
    shared = shared_among(config, accelerator.num_processes, resume)
    if dry_run:
        problems = preflight(accelerator, config, resume)
        page = vl_page(shared, accelerator, problems, resume, decode=decode)
        print_page(page, problems, shown=accelerator.is_main_process)
        return
    if finished := finished_run(accelerator, resume, config):
        print(f"adapter  {finished.adapter}")
        return
    stop_at(preflight(accelerator, config, resume, partial(check_rows, config, accelerator)))
    config = config.model_copy(update={"model": pinned(config.model)})  # a resumed run reads what this one has read
    day: RunDay = from_main_process(day_for(config.model, resume))
    model = load(dated(config, day), accelerator)
    model.day.source = day.source
    with main_process_first(accelerator):  # it writes the tables that the others open
        training = open_training(config.data, config.train.batch_size, model)
        rows = row_lines(model, training)
        splits = open_validation(config.data, config.evaluate, model, answered=True)
    if resume is not None and is_local(config.model, config.vision):  # before the weights are loaded
        check_resumed(accelerator, resume, inputs_of(config, model, training, splits))
    if config.train.shard:
        check_in_step(model, training, splits)
    for remark in slow_hardware(accelerator, model.networks.values()):
        log.warning("%s", remark)
    preferences = preferences_of(model, config)
    answers = answerers(model, splits, config.evaluate, preferences)
    trained = prepare(config, model, accelerator)
    if accelerator.is_main_process:
        log.info("%s", rows)
    process = (accelerator.process_index, accelerator.num_processes)
    batches = VLBatches(
        model,
        training,
        seed=config.seed,
        on_bad_data=config.data.on_bad_data,
        accumulated=shared.train.gradient_accumulation_steps,
        process=process,
    )
    settings = with_steps(shared.train, config.schedule, batches.steps_per_epoch)
    parts = training_setup(accelerator, config, settings, trained, preferences.loss)
    if config.train.compile:
        compile_blocks(trained.networks, model.target_maps)
    inputs = inputs_of(config, model, training, splits)
    losses, result = preferences.loss, result_of(parts["optimizer"])
    scoring = scoring_of(config, model, accelerator, training, splits, answers, losses, result)
    inputs |= started_on(model.day)
    with training_run(accelerator, config, inputs, resume, parts["config"], {COUNTS: model.counts}) as run:
        if not last_step(run.checkpoints):
            if preferences.kept:
                keep_reference(preferences.kept, config, model, accelerator, training, splits)
            if config.evaluate.base:
                score_base(run, config, model, accelerator, splits, answers)
        train(config, run, model, trained, accelerator, batches, parts, splits, scoring, preferences.kept)


def check_rows(config: TrainVLConfig, accelerator: Accelerator) -> None:
    """Checks all rows as far as that needs no model."""
    with main_process_first(accelerator):
        check_data(config.data, config.evaluate, config.train.batch_size)


def load(config: TrainVLConfig, accelerator: Accelerator) -> VLModel:
    """Loads the model.

    Raises:
        ValueError: It cannot be loaded, sharded as the config wants it, or do a task.
    """
    # What is divided does not fit on one device. Quantised weights cannot move.
    waits = config.train.shard or (config.memory.stream and config.model.own_tower)
    device = "cpu" if waits and not config.model.quantization else accelerator.device
    tower = bool(config.adapter.vision_parts)
    model = load_vl_model(config.model, config.vision, seed=config.seed, trained_tower=tower, device=device)
    model.check(task.task for task in config.data.all_tasks)
    if config.train.shard:
        check_in_step(model)
    return model


def prepare(config: TrainVLConfig, model: VLModel, accelerator: Accelerator) -> TrainedNetworks:
    """Adapts the model, loads `init_from`, and divides the model among the processes where the config wants that."""
    trained = adapt(model.networks, model.target_maps, config.adapter, seed=config.seed, backend=config.backend)
    if config.adapter.init_from:
        load_initial_folder(trained, config.adapter, model.identity.weights)
    if config.train.shard:
        reaches_all = config.model.uses_all_parameters
        division(trained, model.target_maps, reaches_all=reaches_all).apply(accelerator.device)
    elif config.memory.stream:
        if amount := stream_amount(config, model, trained, accelerator):
            network = model.networks[MODEL]
            stream(blocks_to_stream(network, model.target_maps[MODEL], amount, accelerator.device), accelerator.device)
        for network in model.networks.values():
            network.to(accelerator.device)
    for name, injected in trained.reports.items():
        log.info("%s: %d modules adapted, %s parameters", name, injected.num_modules, f"{injected.num_parameters:,}")
    for remark in remarks_on_files(trained):
        log.warning("%s", remark)
    log.info("%s", trained.share)
    return trained


def inputs_of(
    config: TrainVLConfig, model: VLModel, training: Mapping[str, TrainingSet], splits: Mapping[str, ValidationSet]
) -> dict[str, Any]:
    """Digests of all that the config refers to, by a description of each."""
    inputs = {f"the data of {name}": found.table.identity for name, found in training.items()} | model.identity.inputs
    for name, split in splits.items():  # by which the best adapter is chosen, and when to stop
        inputs[f"the validation data of {name}"] = split.identity
    return inputs | initial_identity(config.adapter, digest_of_adapter)


def scoring_of(
    config: TrainVLConfig,
    model: VLModel,
    accelerator: Accelerator,
    training: Mapping[str, TrainingSet],
    splits: Mapping[str, ValidationSet],
    answers: Mapping[str, Answer],
    loss: Callable[[Any, torch.Generator], LossSum],
    result: Callable[[Any], Any],
) -> SplitScores:
    """The validation scorer of a training: answers, metrics and losses on the validation splits."""
    losses = row_losses(config, model, accelerator, training, splits, loss)
    answer = answering_all(config, model, accelerator, splits, answers)
    requested = (answers, model.networks.values(), splits, config.evaluate.batch_size)
    save = result(lambda file: save_answers(file, *requested))
    return SplitScores(accelerator, result(answer), score_all, result(losses), save)


def row_losses(
    config: TrainVLConfig,
    model: VLModel,
    accelerator: Accelerator,
    training: Mapping[str, TrainingSet],
    splits: Mapping[str, ValidationSet],
    loss: Callable[[Any, torch.Generator], LossSum],
) -> RowLosses:
    """The losses of the validation splits."""
    process = (accelerator.process_index, accelerator.num_processes)
    settings: dict[str, Any] = {"on_bad_data": config.data.on_bad_data, "precision": accelerator.autocast}
    return RowLosses(model, splits, training, loss, **settings, limit=config.evaluate.limit, process=process)


def answering_all(
    config: TrainVLConfig,
    model: VLModel,
    accelerator: Accelerator,
    splits: Mapping[str, ValidationSet],
    answers: Mapping[str, Answer],
) -> Callable[[], dict[str, Predictions]]:
    """What answers the rows of splits, in all processes together."""
    # Where the model is sharded, all give all answers: how many passes one takes depends on its length.
    process = (accelerator.process_index, accelerator.num_processes)
    mapped = map if config.train.shard else partial(map_shared, process=process)
    requested = (answers, model.networks.values(), splits, config.evaluate.batch_size)

    def texts() -> dict[str, Predictions]:
        found = answer_all(*requested, limit=config.evaluate.limit, mapped=mapped)
        return {name: predictions_of(rows) for name, rows in found.items()}

    return texts


def score_base(
    run: RunDirectory,
    config: TrainVLConfig,
    model: VLModel,
    accelerator: Accelerator,
    splits: Mapping[str, ValidationSet],
    answers: Mapping[str, Answer],
) -> None:
    """Scores the model without its adapter on all splits but those of pairs, which are compared with it anyway.

    Weights that are trained themselves are as `init_from` left them.
    """
    splits = {name: split for name, split in splits.items() if not TASKS[name].pairs}
    if splits:
        with base_model(model.networks.values()):
            answered = answering_all(config, model, accelerator, splits, answers)()
        if accelerator.is_main_process:
            write_base(run.path / BASE, answered)


def keep_reference(
    kept: KeptReference,
    config: TrainVLConfig,
    model: VLModel,
    accelerator: Accelerator,
    training: Mapping[str, TrainingSet],
    splits: Mapping[str, ValidationSet],
) -> None:
    """Computes what the model says of all pairs before its first step, which they are compared with from then on."""
    settings: dict[str, Any] = {"on_bad_data": config.data.on_bad_data, "precision": accelerator.autocast}
    process = (accelerator.process_index, accelerator.num_processes)
    settings["mapped"] = partial(map_shared, process=process, in_step=True)
    kept.compute(model, training, config.train.batch_size, **settings)
    kept.compute(model, splits, config.train.batch_size, limit=config.evaluate.limit, **settings)


def train(
    config: TrainVLConfig,
    run: RunDirectory,
    model: VLModel,
    trained: TrainedNetworks,
    accelerator: Accelerator,
    batches: VLBatches,
    parts: Mapping[str, Any],
    splits: Mapping[str, ValidationSet],
    scoring: SplitScores,
    reference: KeptReference | None,
) -> None:
    """Trains, validates and saves, in a run directory that is open."""
    state = {COUNTS: model.counts, "files": model.files} | ({"reference": reference} if reference else {})
    write = result_of(parts["optimizer"])(partial(save_trained, trained, config, model))
    average = WeightAverage(parts["parameters"], config.ema.decay) if config.ema else None
    measure = average.measured(scoring) if average else scoring
    qualities = partial(task_qualities, {name: by_loss(config.evaluate, name) for name in splits})
    main_process, joins = accelerator.is_main_process, takes_part(accelerator, config.train)
    resumed, every = last_step(run.checkpoints), config.evaluate.per_example_every
    by_row = row_losses(config, model, accelerator, batches.sets, splits, parts["loss"]).by_row
    measure_each = None
    if every is not None:
        measure_each = ExampleLosses(run.path, every, result_of(parts["optimizer"])(by_row), writes=main_process)
        if not resumed:
            measure_each(0)
    validate = Validation(
        run, config.evaluate, measure, qualities, write if joins else None, resumed, writes=main_process
    )

    def on_step_end(step: int) -> None:
        if measure_each and measure_each.is_due(step, parts["config"].steps):
            measure_each(step)
        if joins:
            with answering(accelerator, config.train, run, SAMPLE_NOW) as requested:
                if requested:
                    scoring.save_answers(run.samples / f"step-{step:06d}.jsonl" if main_process else None)
        if validate.is_due(step, parts["config"].steps):
            log_scores(step, validate(step), {name: len(rows) for name, rows in scoring.answered.items()})
            share_counts(model, accelerator)

    def after_step(step: int) -> None:
        if average:
            average.update(step)
        share_counts(model, accelerator)
        if is_due(parts["config"], step):
            share_seen(accelerator, model.files)

    with Prefetcher(batches, enabled=model.prepares_batches) as batch_at:
        done = fit(
            run=run,
            **parts,
            batch_at=batch_at,
            state=state | ({EMA: average} if average else {}),
            wrap_gradients=measuring(trained.networks, config.train.gradients_at if main_process else (), run.path),
            after_step=after_step,
            on_step_end=on_step_end,
            should_stop=validate.should_stop,
        )
    details = {"peak_memory_mb": round(peak_memory_mb())}  # of the training, without the last validation
    details |= {"rows_cut": model.counts.num_cut, "rows_left_out": model.counts.num_left_out}  # not learned as they are
    if joins:
        write(run.adapter)
        if average:
            average.applied()(write)(run.adapter_ema)
    validate(done)
    if measure_each:
        measure_each(done)
    details["validation_rows_left_out"] = num_answered(splits, config.evaluate.limit) - scoring.num_rows
    if main_process:
        finish(config, run, model, trained, validate, scoring, details)


def share_counts(model: VLModel, accelerator: Accelerator) -> None:
    """Shares how many rows were cut or left out, the length of the longest one, and whether a row had the day."""
    model.counts.merge(of_all_processes(model.counts.numbers(), accelerator))


def finish(
    config: TrainVLConfig,
    run: RunDirectory,
    model: VLModel,
    trained: TrainedNetworks,
    validate: Validation,
    scoring: SplitScores,
    details: Mapping[str, Any],
) -> None:
    """Writes summary.json, and prints it and the final scores beside those of the base model."""
    validate.close()
    base: dict[str, AnswerScores] = read_base(run.path / BASE)
    scores: dict[str, VLScores] = scoring.scores
    for key, fate in (
        ("rows_cut", "were too long, and lost text or whole exchanges"),
        ("rows_left_out", "could not be encoded or lost their whole answers, and were left out"),
    ):
        if details[key]:
            log.warning("%d rows of the training's batches %s", details[key], fate)
    if MODEL in trained.reports:
        main = {name: (found.main, found.value) for name, found in scores.items() if found.value is not None}
        formats.write_model_card(run.adapter, scores=main)
    values = validate.rows[-1]
    losses = {f"{name}_{LOSS}": round(values[f"{name}/{LOSS}"], 4) for name in scores}
    losses |= {name.replace("/", "_"): round(value, 4) for name, value in values.items() if name.startswith(f"{EMA}/")}
    summary = training_summary(
        run,
        config.adapter,
        trained.num_trained,
        values["step"],
        trainable_share=round(100 * trained.num_trained / trained.num_all, 3),
        seconds_per_step=round(seconds_per_step(read_metrics(run.path / "metrics.jsonl")), 4),
        **details,
        **{name: round(value, 2) for name, value in main_values(scores).items()},
        **losses,
        **{f"{name}_base": round(100 * float(found.values_QS.mean()), 2) for name, found in base.items()},
        **({"best_step": validate.best_step} if validate.best_step is not None else {}),
        **({"day": model.day.recorded} if model.day.recorded else {}),
    )
    write_summary(run, summary)
    for name, found in scores.items():
        print(f"\n{report(name, with_gain(name, found, scoring.answered[name], base.get(name)))}")
    for line in rows_apart(run.path, values["step"]):
        print(line)
    print(f"\nadapter  {run.adapter}")
    requested = "IMAGE QUESTION" if model.reads_images else "QUESTION"
    print(f"to ask   {asking_command(config, run, requested)}")
