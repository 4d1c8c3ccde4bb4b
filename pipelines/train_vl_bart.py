"""Fine-tunes VL-BART on any of its tasks, jointly: DoRA, LoRA or whole weights, and what trains beside them."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

import dora_mm
from dora_mm.config.loader import dump_config, find_path, resolve_path
from dora_mm.config.vl import TrainVLBartConfig, VLTrainConfig
from dora_mm.core import InjectReport
from dora_mm.eval.vl import report
from dora_mm.io.atomic import write_text
from dora_mm.models.vision import load_tower, tower_map
from dora_mm.models.vl_bart import VLBart, further_parameters
from dora_mm.models.vl_loading import empty_vl_bart, load_vl_bart
from dora_mm.tasks.eyes import Eyes
from dora_mm.tasks.vl_bart import TrainingSet, VLBartTask, VLBatches
from dora_mm.train.adapters import go_on_from
from dora_mm.train.checkpoint import checkpoints
from dora_mm.train.cost import peak_memory_mb, seconds_per_step
from dora_mm.train.loop import fit
from dora_mm.train.metrics import read_metrics
from dora_mm.train.optim import build_optimizer, build_schedule
from dora_mm.train.run import RunDirectory
from dora_mm.train.validation import Validation, answer_all, main_values, open_source, open_validation

log = logging.getLogger(__name__)


def main(config: TrainVLBartConfig, *, resume: Path | None = None, dry_run: bool = False) -> None:
    if dry_run:
        print(describe(config))
        return
    accelerator = Accelerator(mixed_precision=config.train.mixed_precision)
    eyes = Eyes(config.vision, trained=bool(config.adapter.vision_parts)).to(accelerator.device)
    training = open_training(config, eyes)
    model, tokenizer = load_vl_bart(config.model, feature_dim(config, eyes), config.seed)
    task = VLBartTask(model.to(accelerator.device), tokenizer, eyes)
    adapted, reports = adapt(config, model, eyes)
    further = further_parameters(model, config.adapter.trains)
    parameters = trained_parameters(adapted, further)
    for name, found in reports.items():
        log.info("%s: %d modules adapted, %s parameters", name, found.num_modules, f"{found.num_parameters:,}")
    log.info("%s", trainable_of(parameters, adapted))

    process = (accelerator.process_index, accelerator.num_processes)
    batches = VLBatches(task, training, seed=config.seed, process=process)
    train = with_steps(config.train, batches.per_epoch)
    optimizer = build_optimizer(parameters, config.optimizer)
    warmup = config.schedule.warmup_steps or round(config.schedule.warmup_share * train.steps)
    schedule = build_schedule(optimizer, config.schedule.model_copy(update={"warmup_steps": warmup}), train.steps)
    run = start_run(accelerator, config, training, resume)
    optimizer = accelerator.prepare(optimizer)
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    validate = build_validation(config, task, run, adapted, further) if accelerator.is_main_process else None
    for network in adapted.values():
        network.train()

    def after_step(step: int) -> None:
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
        after_step=after_step,
    )
    if validate:
        save(config, adapted, further, run.adapter)
        finish(config, run, adapted, parameters, validate, train.steps)


# --- what is trained -------------------------------------------------------------------------------------------------


def feature_dim(config: TrainVLBartConfig, eyes: Eyes) -> int:
    if config.model.feature_dim not in (None, eyes.feature_dim):
        raise ValueError(
            f"model.feature_dim is {config.model.feature_dim}, and vision gives {eyes.feature_dim} channels"
        )
    return eyes.feature_dim


def adapt(
    config: TrainVLBartConfig, model: VLBart, eyes: Eyes | None
) -> tuple[dict[str, Any], dict[str, InjectReport]]:
    """Puts fresh adapters, or those of `init_from`, into the model and, where asked, its eyes."""
    wanted = config.adapter
    spec = dora_mm.DoRASpec(wanted.rank, wanted.alpha, wanted.dropout, wanted.method, wanted.norm_grad, wanted.cache)
    how: dict[str, Any] = {"seed": config.seed, "backend": config.backend}
    adapted: dict[str, nn.Module] = {"model": model}
    reports = {"model": dora_mm.inject(model, "bart", spec, parts=wanted.parts, **how)}
    if wanted.vision_parts:
        tower = eyes.tower if eyes else load_tower(config.vision.model_copy(update={"pretrained": None}))
        assert tower is not None
        adapted["vision"] = tower
        reports["vision"] = dora_mm.inject(tower, tower_map(tower), spec, parts=wanted.vision_parts, **how)
    if wanted.init_from:
        folder = resolve_path(wanted.init_from, "adapter.init_from")
        for name, network in adapted.items():
            go_on_from(adapter_folder(folder, name), {name: network}, spec)
    return adapted, reports


def adapter_folder(folder: Path, component: str) -> Path:
    """The tower's adapter lies in a folder of its own inside the model's."""
    return folder / component if component == "vision" else folder


def trained_parameters(adapted: dict[str, nn.Module], further: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    for parameter in further.values():
        parameter.requires_grad_()
    found = {f"model.{name}": parameter for name, parameter in further.items()}
    for component, network in adapted.items():
        found |= {f"{component}.{name}": p for name, p in dora_mm.adapter_parameters(network).items()}
    return found


def count_trained(parameters: dict[str, nn.Parameter], adapted: dict[str, nn.Module]) -> tuple[int, int]:
    """How many parameters train, of how many."""
    total = sum(parameter.numel() for network in adapted.values() for parameter in network.parameters())
    return sum(parameter.numel() for parameter in parameters.values()), total


def trainable_of(parameters: dict[str, nn.Parameter], adapted: dict[str, nn.Module]) -> str:
    trained, total = count_trained(parameters, adapted)
    return f"trainable {trained:,} of {total:,} parameters ({100 * trained / total:.3f} %)"


def save(config: TrainVLBartConfig, adapted: dict[str, nn.Module], further: dict[str, Any], folder: Path) -> None:
    kind = "full" if config.adapter.method == "full" else "peft"
    metadata = {"base_model": config.model.path, "seed": str(config.seed), "config": dump_config(config)}
    for name, network in adapted.items():
        also = list(further) if name == "model" else []
        where = adapter_folder(folder, name)
        dora_mm.save_adapter({name: network}, where, format=kind, metadata=metadata, also=also)


# --- data ------------------------------------------------------------------------------------------------------------


def open_training(config: TrainVLBartConfig, eyes: Eyes) -> dict[str, TrainingSet]:
    """The training split of every task. Everything wrong with it is found before the run directory exists."""
    found = {}
    for task in config.data.tasks:
        assert task.train is not None
        table = open_source(task.train, config.data, eyes).answered()
        size = task.batch_size or config.train.batch_size
        found[task.task] = TrainingSet(table, task.train.images, size, task.weight)
        log.info("%s: %s rows to train on", task.task, f"{len(table):,}")
    return found


def with_steps(train: VLTrainConfig, batches_per_epoch: int) -> Any:
    """`epochs` as steps."""
    if train.steps is not None:
        return train
    assert train.epochs is not None
    return train.model_copy(update={"steps": -(-train.epochs * batches_per_epoch // train.accumulation)})


def start_run(
    accelerator: Accelerator, config: TrainVLBartConfig, training: dict[str, TrainingSet], resume: Path | None
) -> RunDirectory:
    """One folder for all processes, made by the first."""
    inputs = {f"the data of {name}": found.table.path.name for name, found in training.items()}
    if resume:
        return RunDirectory.resume(resume, inputs)
    made: list[Any] = [None]
    if accelerator.is_main_process:
        made = [RunDirectory.create(config.name, dump_config(config), config.output, inputs=inputs)]
    return broadcast_object_list(made)[0]


# --- scores ----------------------------------------------------------------------------------------------------------


def build_validation(
    config: TrainVLBartConfig, task: VLBartTask, run: RunDirectory, adapted: dict[str, nn.Module], further: dict
) -> Validation:
    done, limit = checkpoints(run.checkpoints), config.evaluate.limit
    return Validation(
        run,
        partial(answer_all, task, open_validation(config.data, config.evaluate, task.eyes), config.evaluate, limit),
        partial(save, config, adapted, further),
        int(done[-1].name.removeprefix("step-")) if done else 0,
    )


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
    write_text(run.path / "summary.json", json.dumps(summary, indent=2) + "\n")
    width = max(map(len, summary))
    for name, value in summary.items():
        print(f"{name:<{width}}  {value:,}" if isinstance(value, int) else f"{name:<{width}}  {value}")
    for found in scores.values():
        print(f"\n{report(found)}")
    print(f"\nadapter  {run.adapter}")


# --- dry run ---------------------------------------------------------------------------------------------------------


def describe(config: TrainVLBartConfig) -> str:
    """What would train, counted without weights, and which data it would read, with what of it is missing."""
    with torch.device("meta"):
        dim = config.model.feature_dim or load_tower(config.vision.model_copy(update={"pretrained": None})).feature_dim
        model = empty_vl_bart(config.model, dim)
        adapted, reports = adapt(config, model, None)
    parameters = trained_parameters(adapted, further_parameters(model, config.adapter.trains))
    tables = [f"{name}\n{found}" for name, found in reports.items()]
    return "\n\n".join([trainable_of(parameters, adapted), *tables, data_needed(config)])


PUBLISHED = {  # by data format
    "vqa_v2": "visualqa.org",
    "vqa_karpathy": "the data of VL-T5 (github.com/j-min/VL-T5)",
    "easy_vqa": "the package easy-vqa",
    "gqa": "GQA's download page (cs.stanford.edu/people/dorarad/gqa)",
    "gqa_vlt5": "the data of VL-T5 (github.com/j-min/VL-T5)",
    "nlvr2": "github.com/lil-lab/nlvr",
    "nlvr2_vlt5": "the data of VL-T5 (github.com/j-min/VL-T5)",
    "coco_captions": "cocodataset.org",
    "coco_karpathy": "Karpathy's splits (cs.stanford.edu/people/karpathy/deepimagesent)",
    "video_qa": "the VALUE benchmark (github.com/VALUE-Leaderboard/DataRelease)",
    "video_captions": "the VALUE benchmark (github.com/VALUE-Leaderboard/DataRelease)",
}


def data_needed(config: TrainVLBartConfig) -> str:
    """Every file and folder that the config names, whether it is there, and where the data set is published."""
    rows = [
        (
            f"{task.task} {split} {key}",
            path,
            "is there" if find_path(path) else f"put there: {PUBLISHED[source.format]}",
        )
        for task in config.data.tasks
        for split, source in (("train", task.train), ("valid", task.valid))
        if source is not None
        for key in ("file", "annotations", "subtitles", "images")
        if (path := getattr(source, key)) is not None
    ]
    rows += [
        ("features", path, "is there" if find_path(path) else "put there: dora-mm features, or .h5 and .npz of others")
        for path in config.vision.features
    ]
    rows.append(("model", config.model.path, "a folder, or fetched from the hub"))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(["data", *(f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)])
