"""The embedded VL-BART from nothing, on captions of scenes, so that adapters have something to adapt.

Of some rows it captions the picture; of the others it reads a caption with a few words masked and writes these, and so
learns to read text beside a picture and to answer in a word. It trains on the task `caption` alone; of other tasks that
the config names, the tokenizer learns the words.
"""

import hashlib
import json
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

from dora_mm.config.vl import VLTaskConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.mixing import TaskBatches
from dora_mm.data.vl.splits import TrainingSet, open_texts, open_training, open_validation
from dora_mm.eval.vl.metrics import report, score_all
from dora_mm.eval.vl.scores import VLScores
from dora_mm.models.vl_bart.loading import save_vl_bart
from dora_mm.models.vl_bart.model import VLBart, VLBartConfig
from dora_mm.sampling.answers import answer_all
from dora_mm.tasks.vision import VisionEncoder
from dora_mm.tasks.vl_bart import VLBartTask, VLBatch, draw_answer
from dora_mm.train.checkpoint import last_step
from dora_mm.train.loop import fit
from dora_mm.train.optim import build_optimizer, build_schedule, with_steps
from dora_mm.train.run import start_run
from dora_mm.train.validation import Validation, main_values
from dora_mm.utils.randomness import generator
from samples.build.pretraining.tokenizer import train_tokenizer
from samples.build.schema import PretrainTinyVLConfig

log = logging.getLogger(__name__)
MAX_POSITIONS = 640  # the longest input of a task has 600 tokens
INIT_STD = 0.05  # BART's 0.02 is for a width of 768: at 192 pictures went unnoticed for 700 steps
MAX_MASKED = 3  # words


def main(config: PretrainTinyVLConfig, *, resume: Path | None = None) -> None:
    accelerator = Accelerator(mixed_precision=config.train.mixed_precision)
    if accelerator.num_processes > 1:
        raise ValueError("pretrain_tiny_vl runs in one process: the model is small")
    vision: Any = VisionEncoder(config.vision, seed=config.seed).to(accelerator.device)
    captions = config.data.model_copy(update={"tasks": (captions_of(config),)})
    rows = open_training(captions, config.train.batch_size, vision)["caption"]
    splits = open_validation(captions, config.evaluate, vision, answered=True)
    tokenizer = train_tokenizer(all_texts(config), config.model.num_merges)
    model: Any = build_model(config, tokenizer, vision.feature_dim)
    task = VLBartTask(model.to(accelerator.device).train(), tokenizer, vision)
    parameters = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    log.info("%s parameters, %d tokens", f"{sum(p.numel() for p in parameters.values()):,}", len(tokenizer))

    order = TaskBatches({"caption": len(rows.table)}, {"caption": rows.batch_size}, seed=config.seed)
    train = with_steps(config.train, config.schedule, order.batches_per_epoch)
    optimizer = build_optimizer(parameters, config.optimizer)
    schedule = build_schedule(optimizer, config.schedule, train.steps)
    words = hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()
    inputs = {"the captions": rows.table.identity, "the vocabulary": words, "the vision tower": vision.identity}
    run = start_run(accelerator, config, inputs, resume)
    if train.gradient_checkpointing:
        model.activation_checkpointing_enable()
    write = partial(save_vl_bart, model, tokenizer, dtype=torch.float16)

    def evaluate() -> dict[str, VLScores]:
        return score_all(answer_all(task, splits, config.evaluate, config.evaluate.limit), meteor=False)

    validate = Validation(run, evaluate, write, last_step(run.checkpoints))

    def observe(step: int) -> None:
        if config.evaluate.every and step % config.evaluate.every == 0 and step < train.steps:
            log.info("step %d: %s", step, main_values(validate(step)) or "captions cannot be scored without Java")

    fit(
        accelerator=accelerator,
        run=run,
        config=train,
        seed=config.seed,
        networks={"model": model},
        parameters=parameters,
        optimizer=accelerator.prepare(optimizer),
        schedule=schedule,
        batch_at=partial(caption_batch, config, task, rows, order),
        loss=task.loss,
        observe=observe,
    )
    print(report(validate(train.steps)["caption"]))
    validate.close()
    write(run.path / "model")
    print(f"\nmodel    {run.path / 'model'}")


def captions_of(config: PretrainTinyVLConfig) -> VLTaskConfig:
    return next(task for task in config.data.tasks if task.task == "caption")


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
                init_std=INIT_STD,
                feature_dim=feature_dim,
            )
        )


def caption_batch(
    config: PretrainTinyVLConfig, task: VLBartTask, rows: TrainingSet, order: TaskBatches, number: int
) -> VLBatch:
    """A function of (seed, number) alone."""
    stream = generator(config.seed, number, "captions")
    _, indices = order(number)
    return task.batch("caption", [shown(rows.table[i], config, stream) for i in indices], rows.images, stream)


def shown(example: Example, config: PretrainTinyVLConfig, stream: torch.Generator) -> Example:
    """One caption of the picture to write, or what is masked in it."""
    caption, _ = draw_answer(example, stream)
    text, target = mask_words(caption, stream) if draw(stream) < config.fill_share else ("", caption)
    return replace(example, text=text, answers=(target,), scores=(1.0,))


def mask_words(caption: str, stream: torch.Generator) -> tuple[str, str]:
    """The caption with a run of one to three words masked, and the run. Full stops and commas stay."""
    words = [(match.start(), match.end()) for match in re.finditer(r"[^\s.,:]+", caption)] or [(0, len(caption))]
    length = 1 + int(draw(stream) ** 2 * min(MAX_MASKED, len(words)))  # one word more often than three
    first = int(draw(stream) * (len(words) - length + 1))
    start, end = words[first][0], words[first + length - 1][1]
    return f"{caption[:start]}<mask>{caption[end:]}", caption[start:end]


def draw(stream: torch.Generator) -> float:
    return float(torch.rand((), generator=stream))
