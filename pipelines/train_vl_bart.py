"""Fine-tunes VL-BART on any of its tasks, jointly: DoRA, LoRA or whole weights, and what trains beside them."""

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
from dora_mm.train.optim import build_optimizer, build_schedule, with_steps
from dora_mm.train.run import RunDirectory, start_run, write_summary
from dora_mm.train.validation import Validation, main_values
from dora_mm.utils.digest import module_digest

log = logging.getLogger(__name__)
LONGEST_VALIDATION = timedelta(hours=12)  # for which the other processes wait


def main(config: TrainVLBartConfig, *, resume: Path | None = None, dry_run: bool = False) -> None:
    if dry_run:
        print(describe(config))
        return
    # Everything that can be wrong with the input is found before the run directory exists.
    patience = InitProcessGroupKwargs(timeout=LONGEST_VALIDATION)
    accelerator = Accelerator(mixed_precision=config.train.mixed_precision, kwargs_handlers=[patience])
    vision = VisionEncoder(config.vision, seed=config.seed, trained=bool(config.adapter.vision_parts)).to(
        accelerator.device
    )
    training = open_training(config.data, config.train.batch_size, vision)
    splits = open_validation(config.data, config.evaluate, vision, answered=True)
    model, tokenizer = load_vl_bart(config.model, feature_dim(config, vision), config.seed)
    identity = {"base_digest": module_digest(model), "vision_digest": vision.identity}
    task = VLBartTask(model.to(accelerator.device), tokenizer, vision)
    task.check(training)
    answerers(task, splits, config.evaluate)
    adapted, reports = adapt(config, model, vision)
    extra = extra_trainable_parameters(model, config.adapter.extra_trainable)
    if config.adapter.init_from:
        load_initial_adapters(config, adapted, extra, identity)
    parameters = trained_parameters(adapted, extra)
    for name, found in reports.items():
        log.info("%s: %d modules adapted, %s parameters", name, found.num_modules, f"{found.num_parameters:,}")
    log.info("%s", trainable_of(parameters, adapted))

    process = (accelerator.process_index, accelerator.num_processes)
    batches = VLBatches(task, training, seed=config.seed, process=process)
    train = with_steps(config.train, config.schedule, batches.per_epoch)
    optimizer = build_optimizer(parameters, config.optimizer)
    schedule = build_schedule(optimizer, config.schedule, train.steps)
    inputs = {f"the data of {name}": found.table.identity for name, found in training.items()} | identity
    run = start_run(accelerator, config, inputs, resume)
    optimizer = accelerator.prepare(optimizer)
    if train.gradient_checkpointing:
        model.activation_checkpointing_enable()
    write = partial(save, config, adapted, extra, identity)
    validate = None
    if accelerator.is_main_process:
        evaluate = partial(score_split, task, splits, config)
        validate = Validation(run, evaluate, write, last_step(run.checkpoints))
    for network in adapted.values():
        network.train()

    def observe(step: int) -> None:
        if validate and config.evaluate.every and step % config.evaluate.every == 0 and step < train.steps:
            show(step, main_values(validate(step)))

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
    wanted = config.model.feature_dim
    if wanted not in (None, vision.feature_dim):
        raise ValueError(f"model.feature_dim is {wanted}, and vision gives {vision.feature_dim} channels")
    return vision.feature_dim


def adapt(
    config: TrainVLBartConfig, model: VLBart, vision: VisionEncoder | None
) -> tuple[dict[str, Any], dict[str, InjectReport]]:
    """Puts fresh adapters into the model and, where asked, its vision tower; without one into one of random weights."""
    wanted = config.adapter
    spec = make_spec(wanted)
    how: dict[str, Any] = {"seed": config.seed, "backend": config.backend}
    adapted: dict[str, nn.Module] = {"model": model}
    reports = {"model": dora_mm.inject(model, "bart", spec, parts=wanted.parts, **how)}
    if wanted.vision_parts:
        tower = vision.tower if vision else load_tower(config.vision.model_copy(update={"pretrained": None}))
        assert tower is not None
        adapted[VISION] = tower
        reports[VISION] = dora_mm.inject(tower, tower_map(tower), spec, parts=wanted.vision_parts, **how)
    return adapted, reports


def load_initial_adapters(
    config: TrainVLBartConfig, adapted: dict[str, Any], extra: dict[str, nn.Parameter], identity: dict[str, str]
) -> None:
    """Loads `adapter.init_from`: an adapter of the same base and vision, all of which will train on and be saved."""
    assert config.adapter.init_from is not None
    folder = formats.adapter_folder(resolve_path(config.adapter.init_from, "adapter.init_from"))
    state, metadata = formats.read(folder, {"model": adapted["model"]})
    check_identity(folder, metadata, identity)
    lost = sorted(set(state.parameters.get("model", ())) - extra.keys())
    if lost:
        raise ValueError(
            f"adapter.init_from: {folder} also trained {lost[0]}, which adapter.extra_trainable leaves out"
        )
    if (folder / VISION).is_dir() != (VISION in adapted):
        raise ValueError(f"adapter.init_from: either {folder} adapts the tower too, or adapter.vision_parts does")
    for name, network in adapted.items():
        load_initial_adapter(folder / VISION if name == VISION else folder, {name: network}, make_spec(config.adapter))


def trained_parameters(adapted: dict[str, Any], extra: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    for parameter in extra.values():
        parameter.requires_grad_()
    found = {f"model.{name}": parameter for name, parameter in extra.items()}
    for component, network in adapted.items():
        found |= {f"{component}.{name}": p for name, p in dora_mm.adapter_parameters(network).items()}
    return found


def count_trained(parameters: dict[str, nn.Parameter], adapted: dict[str, Any]) -> tuple[int, int]:
    """How many parameters train, of how many."""
    total = sum(parameter.numel() for network in adapted.values() for parameter in network.parameters())
    return sum(parameter.numel() for parameter in parameters.values()), total


def trainable_of(parameters: dict[str, nn.Parameter], adapted: dict[str, Any]) -> str:
    trained, total = count_trained(parameters, adapted)
    return f"trainable {trained:,} of {total:,} parameters ({100 * trained / total:.3f} %)"


def save(
    config: TrainVLBartConfig,
    adapted: dict[str, Any],
    extra: dict[str, nn.Parameter],
    identity: dict[str, str],
    folder: Path,
) -> None:
    """The model's adapter with what trained beside it, and the tower's in a folder of its own inside."""
    kind = "full" if config.adapter.method == "full" else "peft"
    metadata = {"base_model": config.model.path, "seed": str(config.seed), "config": dump_config(config), **identity}
    for name, network in adapted.items():
        where, more = (folder / VISION, []) if name == VISION else (folder, list(extra))
        dora_mm.save_adapter({name: network}, where, format=kind, metadata=metadata, extra_parameters=more)


# --- scores ----------------------------------------------------------------------------------------------------------


def score_split(task: VLBartTask, splits: dict[str, ValidationSet], config: TrainVLBartConfig) -> dict[str, VLScores]:
    """The scores of the model as it is now, by task."""
    return score_all(answer_all(task, splits, config.evaluate, config.evaluate.limit), meteor=False)


def show(step: int, values: dict[str, float]) -> None:
    log.info("step %d: %s", step, ", ".join(f"{name} {value:.2f}" for name, value in values.items()))


def finish(
    config: TrainVLBartConfig, run: RunDirectory, adapted: dict, parameters: dict, validate: Validation, steps: int
) -> None:
    """The last scores, and a table of the run, also as summary.json."""
    memory = peak_memory_mb()  # of training: before the last answers
    scores = validate(steps)
    validate.close()
    rows = read_metrics(run.path / "metrics.jsonl")
    trained, total = count_trained(parameters, adapted)
    summary = {
        "method": config.adapter.method,
        "rank": config.adapter.rank,
        "parameters": trained,
        "trainable_share": round(100 * trained / total, 3),
        "steps": steps,
        "seconds": round(rows[-1]["seconds"], 1),
        "seconds_per_step": round(seconds_per_step(rows), 4),
        "peak_memory_mb": round(memory),
        "loss": round(rows[-1]["loss"], 4),
        **{name: round(value, 2) for name, value in main_values(scores).items()},
    }
    write_summary(run, summary)
    for found in scores.values():
        print(f"\n{report(found)}")
    print(f"\nadapter  {run.adapter}")


# --- dry run ---------------------------------------------------------------------------------------------------------


def describe(config: TrainVLBartConfig) -> str:
    """What would train, counted without weights, and which data it would read, with what of it is missing."""
    features = found_features(config.vision)
    dim = open_features(features).dim if features else config.model.feature_dim
    with torch.device("meta"):
        if dim is None:
            dim = load_tower(config.vision.model_copy(update={"pretrained": None})).feature_dim
        model = empty_vl_bart(config.model, dim)
        adapted, reports = adapt(config, model, None)
    parameters = trained_parameters(adapted, extra_trainable_parameters(model, config.adapter.extra_trainable))
    tables = [f"{name}\n{found}" for name, found in reports.items()]
    needed = data_needed(config.data, config.vision, config.model.path)
    return "\n\n".join([trainable_of(parameters, adapted), *tables, needed])
