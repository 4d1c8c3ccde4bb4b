"""Fine-tunes VL-BART jointly on any of its tasks: with DoRA, LoRA or all weights, and extra trainable parameters."""

import logging
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import nn

import dora_mm
from dora_mm import formats
from dora_mm.config.loader import dump_config, resolve_path
from dora_mm.config.vl import TrainVLBartConfig
from dora_mm.core import InjectReport
from dora_mm.data.features.sources import open_features
from dora_mm.data.vl.needed import data_needed, found_features
from dora_mm.data.vl.splits import ValidationSet, open_training, open_validation
from dora_mm.eval.vl.metrics import report, score_all
from dora_mm.eval.vl.scores import VLScores
from dora_mm.models.towers.tower import load_tower, tower_map
from dora_mm.models.vl_bart.adapters import VISION, check_identity
from dora_mm.models.vl_bart.loading import empty_vl_bart, load_vl_bart
from dora_mm.models.vl_bart.model import VLBart, extra_trainable_parameters
from dora_mm.sampling.answers import answer_all, answerers
from dora_mm.tasks.vision import VisionEncoder
from dora_mm.tasks.vl_bart import VLBartTask, VLBatches
from dora_mm.train.adapters import load_initial_adapter, make_spec
from dora_mm.train.checkpoint import last_step
from dora_mm.train.cost import peak_memory_mb, seconds_per_step
from dora_mm.train.loop import fit
from dora_mm.train.metrics import read_metrics
from dora_mm.train.optim import build_optimizer, with_steps
from dora_mm.train.preview import slow_hardware
from dora_mm.train.run import RunDirectory, training_run, training_summary, write_summary
from dora_mm.train.schedule import build_schedule
from dora_mm.train.validation import Validation, main_values
from dora_mm.utils.digest import module_digest

log = logging.getLogger(__name__)
LONGEST_VALIDATION = timedelta(hours=12)  # the other processes wait for the main process this long


def main(config: TrainVLBartConfig, *, resume: Path | None = None, dry_run: bool = False) -> None:
    """Trains the adapter, and scores it on the validation splits.

    Writes to the run directory: checkpoints/, metrics.jsonl, the scores in validation/, the best adapters so far in
    best/, the final adapter in adapter/ and summary.json.

    Args:
        config: The config.
        resume: The run directory to resume from its last checkpoint; None starts a new run.
        dry_run: Only print what would be trained, and which data would be read or is missing.

    Raises:
        ValueError: The data, the model, the vision tower, the initial adapter or the output folder cannot be used. A
            new run directory is created only after these checks.
    """
    if dry_run:
        print(describe(config))
        return
    timeout = InitProcessGroupKwargs(timeout=LONGEST_VALIDATION)
    accelerator = Accelerator(mixed_precision=config.train.mixed_precision, kwargs_handlers=[timeout])
    vision = VisionEncoder(config.vision, seed=config.seed, trained=bool(config.adapter.vision_parts)).to(
        accelerator.device
    )
    training = open_training(config.data, config.train.batch_size, vision)
    splits = open_validation(config.data, config.evaluate, vision, answered=True)
    model, tokenizer = load_vl_bart(config.model, feature_dim(config, vision), config.seed)
    for remark in slow_hardware(accelerator, [model, vision]):
        log.warning("%s", remark)
    identity = {"base_digest": module_digest(model), "vision_digest": vision.identity}
    task = VLBartTask(model.to(accelerator.device), tokenizer, vision)
    task.check(training)
    answerers(task, splits, config.evaluate)
    adapted, reports = adapt(config, model, vision)
    extra = extra_trainable_parameters(model, config.adapter.extra_trainable)
    if config.adapter.init_from:
        load_initial_adapters(config, adapted, extra, identity)
    parameters = trained_parameters(adapted, extra)
    for name, injected in reports.items():
        log.info("%s: %d modules adapted, %s parameters", name, injected.num_modules, f"{injected.num_parameters:,}")
    log.info("%s", trainable_share(parameters, adapted))

    process = (accelerator.process_index, accelerator.num_processes)
    batches = VLBatches(task, training, seed=config.seed, process=process)
    train = with_steps(config.train, config.schedule, batches.per_epoch)
    optimizer = build_optimizer(parameters, config.optimizer)
    schedule = build_schedule(optimizer, config.schedule, train.steps)
    inputs = {f"the data of {name}": found.table.identity for name, found in training.items()} | identity
    optimizer = accelerator.prepare(optimizer)
    if train.gradient_checkpointing:
        model.activation_checkpointing_enable()
    write = partial(save, config, adapted, extra, identity)
    for network in adapted.values():
        network.train()
    with training_run(accelerator, config, inputs, resume, train.steps) as run:
        validate = None
        if accelerator.is_main_process:
            evaluate = partial(score_split, task, splits, config)
            validate = Validation(run, evaluate, write, last_step(run.checkpoints))

        def observe(step: int) -> None:
            if validate and config.evaluate.every and step % config.evaluate.every == 0 and step < train.steps:
                log_scores(step, main_values(validate(step)))

        fit(
            accelerator=accelerator,
            run=run,
            config=train,
            seed=config.seed,
            networks=adapted,
            parameters=parameters,
            optimizer=optimizer,
            schedule=schedule,
            batch_at=batches,
            loss=task.loss,
            observe=observe,
        )
        if validate:
            write(run.adapter)
            finish(config, run, adapted, parameters, validate, train.steps)


# --- what is trained -------------------------------------------------------------------------------------------------


def feature_dim(config: TrainVLBartConfig, vision: VisionEncoder) -> int:
    expected = config.model.feature_dim
    if expected not in (None, vision.feature_dim):
        raise ValueError(f"model.feature_dim is {expected}, but vision gives {vision.feature_dim} channels")
    return vision.feature_dim


def adapt(
    config: TrainVLBartConfig, model: VLBart, vision: VisionEncoder | None
) -> tuple[dict[str, Any], dict[str, InjectReport]]:
    """Injects adapters into the model and, with `adapter.vision_parts`, into its vision tower.

    Args:
        config: The config.
        model: The language model.
        vision: The vision encoder; None adapts a vision tower with random weights, which is enough to count parameters.

    Returns:
        The adapted networks and the reports of the injection, both by component.
    """
    spec = make_spec(config.adapter)
    settings: dict[str, Any] = {"seed": config.seed, "backend": config.backend}
    adapted: dict[str, nn.Module] = {"model": model}
    reports = {"model": dora_mm.inject(model, "bart", spec, parts=config.adapter.parts, **settings)}
    if config.adapter.vision_parts:
        tower = vision.tower if vision else load_tower(config.vision.model_copy(update={"pretrained": None}))
        assert tower is not None
        adapted[VISION] = tower
        reports[VISION] = dora_mm.inject(tower, tower_map(tower), spec, parts=config.adapter.vision_parts, **settings)
    return adapted, reports


def load_initial_adapters(
    config: TrainVLBartConfig, adapted: dict[str, Any], extra: dict[str, nn.Parameter], identity: dict[str, str]
) -> None:
    """Loads `adapter.init_from`.

    Raises:
        ValueError: The adapter was trained with another base model or vision tower, or holds parameters that this run
            would neither train nor save.
    """
    assert config.adapter.init_from is not None
    folder = formats.adapter_folder(resolve_path(config.adapter.init_from, "adapter.init_from"))
    state, metadata = formats.read(folder, {"model": adapted["model"]})
    check_identity(folder, metadata, identity)
    untrained = sorted(set(state.parameters.get("model", ())) - extra.keys())
    if untrained:
        raise ValueError(
            f"adapter.init_from: {folder} also trained {untrained[0]}, which adapter.extra_trainable does not include"
        )
    if (folder / VISION).is_dir() != (VISION in adapted):
        raise ValueError(
            f"adapter.init_from: only one of {folder} and adapter.vision_parts adapts the vision tower: either both or "
            "neither must do so"
        )
    for name, network in adapted.items():
        load_initial_adapter(folder / VISION if name == VISION else folder, {name: network}, make_spec(config.adapter))


def trained_parameters(adapted: dict[str, Any], extra: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Makes the extra parameters trainable; returns them and those of the adapters by component and name."""
    for parameter in extra.values():
        parameter.requires_grad_()
    parameters = {f"model.{name}": parameter for name, parameter in extra.items()}
    for component, network in adapted.items():
        parameters |= {f"{component}.{name}": p for name, p in dora_mm.adapter_parameters(network).items()}
    return parameters


def count_trained(parameters: dict[str, nn.Parameter], adapted: dict[str, Any]) -> tuple[int, int]:
    """The number of trained parameters, and of all parameters."""
    total = sum(parameter.numel() for network in adapted.values() for parameter in network.parameters())
    return sum(parameter.numel() for parameter in parameters.values()), total


def trainable_share(parameters: dict[str, nn.Parameter], adapted: dict[str, Any]) -> str:
    trained, total = count_trained(parameters, adapted)
    return f"trainable {trained:,} of {total:,} parameters ({100 * trained / total:.3f} %)"


def save(
    config: TrainVLBartConfig,
    adapted: dict[str, Any],
    extra: dict[str, nn.Parameter],
    identity: dict[str, str],
    folder: Path,
) -> None:
    """Saves the model's adapter with the extra parameters, and the vision tower's in the subfolder VISION."""
    metadata = {"base_model": config.model.path, "seed": str(config.seed), "config": dump_config(config), **identity}
    for name, network in adapted.items():
        path, names = (folder / VISION, []) if name == VISION else (folder, list(extra))
        format = formats.format_for({name: network}, preferred="peft")
        file = dora_mm.save_adapter({name: network}, path, format=format, metadata=metadata, extra_parameters=names)
        formats.remove_other_formats(file)  # a resumed run may have saved the tower as peft before


# --- scores ----------------------------------------------------------------------------------------------------------


def score_split(task: VLBartTask, splits: dict[str, ValidationSet], config: TrainVLBartConfig) -> dict[str, VLScores]:
    """The current scores of the model by task."""
    return score_all(answer_all(task, splits, config.evaluate, config.evaluate.limit), meteor=False)


def log_scores(step: int, values: dict[str, float]) -> None:
    log.info("step %d: %s", step, ", ".join(f"{name} {value:.2f}" for name, value in values.items()))


def finish(
    config: TrainVLBartConfig, run: RunDirectory, adapted: dict, parameters: dict, validate: Validation, steps: int
) -> None:
    """Computes the final scores, writes summary.json, and prints both."""
    memory = peak_memory_mb()  # of the training, so it is read before the last validation
    scores = validate(steps)
    validate.close()
    trained, total = count_trained(parameters, adapted)
    summary = training_summary(
        run,
        config.adapter,
        trained,
        steps,
        trainable_share=round(100 * trained / total, 3),
        seconds_per_step=round(seconds_per_step(read_metrics(run.path / "metrics.jsonl")), 4),
        peak_memory_mb=round(memory),
        **{name: round(value, 2) for name, value in main_values(scores).items()},
    )
    write_summary(run, summary)
    for found in scores.values():
        print(f"\n{report(found)}")
    print(f"\nadapter  {run.adapter}")


# --- dry run ---------------------------------------------------------------------------------------------------------


def describe(config: TrainVLBartConfig) -> str:
    """The parameters that would be trained, counted without loading weights, and the data, present and missing."""
    features = found_features(config.vision)
    dim = open_features(features).dim if features else config.model.feature_dim
    with torch.device("meta"):
        if dim is None:
            dim = load_tower(config.vision.model_copy(update={"pretrained": None})).feature_dim
        model = empty_vl_bart(config.model, dim)
        adapted, reports = adapt(config, model, None)
    parameters = trained_parameters(adapted, extra_trainable_parameters(model, config.adapter.extra_trainable))
    tables = [f"{name}\n{injected}" for name, injected in reports.items()]
    needed = data_needed(config.data, config.vision, config.model.path)
    remarks = slow_hardware(Accelerator(mixed_precision=config.train.mixed_precision), adapted.values())
    return "\n\n".join([trainable_share(parameters, adapted), *tables, needed, *remarks])
