"""The embedded VL-BART from nothing, on captions of scenes, so that adapters have something to adapt.

Of some rows it captions the picture; of the others it reads a caption with a few words masked and writes these, and so
learns to read text beside a picture and to answer in a word. It trains on the task `caption` alone; of other tasks that
the config names, the tokenizer learns the words.
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import BartTokenizer

from dora_mm.config.loader import dump_config
from dora_mm.config.vl import PretrainTinyVLConfig, VLTaskConfig
from dora_mm.data.randomness import batch_indices, generator
from dora_mm.data.vl import Example
from dora_mm.eval.vl import report
from dora_mm.models.vl_bart import VLBart, VLBartConfig
from dora_mm.models.vl_loading import save_vl_bart
from dora_mm.models.vl_text import train_tokenizer
from dora_mm.tasks.eyes import Eyes
from dora_mm.tasks.vl_bart import TrainingSet, VLBartTask, VLBatch, draw_answer
from dora_mm.train.checkpoint import checkpoints
from dora_mm.train.loop import fit
from dora_mm.train.optim import build_optimizer, build_schedule
from dora_mm.train.run import RunDirectory
from dora_mm.train.validation import Validation, answer_all, main_values, open_source, open_texts, open_validation

log = logging.getLogger(__name__)
MAX_POSITIONS = 640  # the longest input of a task has 600 tokens
MAX_MASKED = 3  # words


def main(config: PretrainTinyVLConfig, *, resume: Path | None = None) -> None:
    accelerator = Accelerator(mixed_precision=config.train.mixed_precision)
    captions = captions_of(config)
    assert captions.train is not None
    eyes = Eyes(config.vision).to(accelerator.device)
    table = open_source(captions.train, config.data, eyes)
    rows = TrainingSet(table, captions.train.images, captions.batch_size or config.train.batch_size)
    tokenizer = train_tokenizer(all_texts(config), config.model.num_merges)
    model: Any = build_model(config, tokenizer, eyes.feature_dim)
    task = VLBartTask(model.to(accelerator.device), tokenizer, eyes)
    parameters = {f"model.{name}": parameter for name, parameter in task.model.named_parameters()}
    log.info("%s parameters, %d tokens", f"{sum(p.numel() for p in parameters.values()):,}", len(tokenizer))

    steps = config.train.steps or -(-(config.train.epochs or 1) * len(table) // rows.batch_size)
    train = config.train.model_copy(update={"steps": steps})
    optimizer = build_optimizer(parameters, config.optimizer)
    warmup = config.schedule.warmup_steps or round(config.schedule.warmup_share * steps)
    schedule = build_schedule(optimizer, config.schedule.model_copy(update={"warmup_steps": warmup}), steps)
    inputs = {"the captions": table.path.name}
    run = RunDirectory.resume(resume, inputs) if resume else RunDirectory.create(
        config.name, dump_config(config), config.output, inputs=inputs
    )  # fmt: skip
    validate = build_validation(config, task, run)

    def after_step(step: int) -> None:
        if config.evaluate.every and step % config.evaluate.every == 0 and step < steps:
            log.info("step %d: CIDEr %.1f", step, main_values(validate(step))["caption"])

    fit(
        accelerator=accelerator,
        run=run,
        config=train,
        seed=config.seed,
        networks={"model": task.model.train()},
        parameters=parameters,
        optimizer=accelerator.prepare(optimizer),
        schedule=schedule,
        batch_at=partial(caption_batch, config, task, rows),
        loss=task.loss,
        after_step=after_step,
    )
    print(report(validate(steps)["caption"]))
    validate.close()
    save_vl_bart(task.model, tokenizer, run.path / "model", torch.float16)
    print(f"\nmodel    {run.path / 'model'}")


def captions_of(config: PretrainTinyVLConfig) -> VLTaskConfig:
    found = [task for task in config.data.tasks if task.task == "caption" and task.train and task.valid]
    if not found:
        raise ValueError("data.tasks: caption is missing, with train and valid: it is what the model learns")
    return found[0]


def all_texts(config: PretrainTinyVLConfig) -> Iterator[str]:
    """What the tokenizer learns from: texts and answers of every task's training split."""
    for task in config.data.tasks:
        if task.train is not None:
            for example in open_texts(task.train, config.data):
                yield from (example.text, *example.answers)


def build_model(config: PretrainTinyVLConfig, tokenizer: BartTokenizer, feature_dim: int) -> VLBart:
    size = config.model
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed)
        return VLBart(
            VLBartConfig(
                vocab_size=len(tokenizer),
                d_model=size.width,
                encoder_layers=size.layers,
                decoder_layers=size.layers,
                encoder_attention_heads=size.heads,
                decoder_attention_heads=size.heads,
                encoder_ffn_dim=4 * size.width,
                decoder_ffn_dim=4 * size.width,
                max_position_embeddings=MAX_POSITIONS,
                feature_dim=feature_dim,
            )
        )


def caption_batch(config: PretrainTinyVLConfig, task: VLBartTask, rows: TrainingSet, number: int) -> VLBatch:
    """A function of (seed, number) alone."""
    stream = generator(config.seed, number, "captions")
    indices = batch_indices(len(rows.table), rows.batch_size, number, config.seed)
    return task.batch("caption", [shown(rows.table[i], config, stream) for i in indices], rows.images, stream)


def shown(example: Example, config: PretrainTinyVLConfig, stream: torch.Generator) -> Example:
    """One caption of the picture to write, or what is masked in it."""
    caption, _ = draw_answer(example, stream)
    text, target = mask_words(caption, stream) if draw(stream) < config.fill_share else ("", caption)
    return replace(example, text=text, answers=(target,), scores=(1.0,))


def mask_words(caption: str, stream: torch.Generator) -> tuple[str, str]:
    """The caption with a run of one to three words masked, and the run. Full stops and commas stay."""
    words = [(match.start(), match.end()) for match in re.finditer(r"[^\s.,:]+", caption)]
    length = 1 + int(draw(stream) ** 2 * min(MAX_MASKED, len(words)))  # one word more often than three
    first = int(draw(stream) * (len(words) - length + 1))
    start, end = words[first][0], words[first + length - 1][1]
    return f"{caption[:start]}<mask>{caption[end:]}", caption[start:end]


def draw(stream: torch.Generator) -> float:
    return float(torch.rand((), generator=stream))


def build_validation(config: PretrainTinyVLConfig, task: VLBartTask, run: RunDirectory) -> Validation:
    data = config.data.model_copy(update={"tasks": (captions_of(config),)})
    sets = open_validation(data, config.evaluate, task.eyes)
    done = checkpoints(run.checkpoints)
    return Validation(
        run,
        partial(answer_all, task, sets, config.evaluate, config.evaluate.limit),
        partial(save_vl_bart, task.model, task.tokenizer, dtype=torch.float16),
        int(done[-1].name.removeprefix("step-")) if done else 0,
    )
