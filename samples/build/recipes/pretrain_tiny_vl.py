"""Pretrains the embedded VL-BART from scratch, on captions of scenes.

In some examples it captions the image; in the others it reads the image and a caption with a few masked words and
writes these words, and so learns to read text along with an image and to give short answers. It is trained on the task
`caption` only; the tokenizer is trained on the texts of all tasks in the config.
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

from dora_mm.config.vl_data import VLTaskConfig
from dora_mm.data.vl.answers import predictions_of
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.mixing import TaskBatches
from dora_mm.data.vl.splits import TrainingSet, open_texts, open_training, open_validation
from dora_mm.eval.vl.metrics import report, score_all
from dora_mm.eval.vl.scores import VLScores
from dora_mm.models.vl.vl_bart.family import VLBartModel, VLBatch
from dora_mm.models.vl.vl_bart.loading import save_vl_bart
from dora_mm.models.vl.vl_bart.model import VLBart, VLBartConfig
from dora_mm.models.vl.vl_bart.visual_inputs import VisionEncoder
from dora_mm.models.vl.vl_model import Target
from dora_mm.sampling.answers import answer_all
from dora_mm.tasks.vl import answerers, sample_answer
from dora_mm.train.checkpoint import last_step
from dora_mm.train.loop import fit
from dora_mm.train.optim import build_optimizer, with_steps
from dora_mm.train.run import start_run
from dora_mm.train.schedule import Schedule
from dora_mm.train.validation import Validation, main_values, other_values, task_qualities
from dora_mm.utils.randomness import generator
from samples.build.pretraining.tokenizer import train_tokenizer
from samples.build.schema import PretrainTinyVLConfig

log = logging.getLogger(__name__)
MAX_POSITIONS = 640  # the longest input of a task has 600 tokens
INIT_STD = 0.05  # BART's 0.02 is for a width of 768: at 192 the model ignored the images for the first 700 steps
MAX_MASKED = 3  # consecutive words


def main(config: PretrainTinyVLConfig, *, resume: Path | None = None) -> None:
    """Trains tokenizer and model, and prints the caption scores.

    Writes to the run directory: checkpoints/, the metrics, and the trained model in model/.

    Args:
        config: The config.
        resume: The run directory to resume; None: a new run.

    Raises:
        ValueError: It was started with several processes, or the data cannot be read.
    """
    accelerator = Accelerator(mixed_precision=config.train.mixed_precision)
    if accelerator.num_processes > 1:
        raise ValueError("pretrain_tiny_vl runs in one process only: start it without accelerate launch")
    vision: Any = VisionEncoder(config.vision, seed=config.seed).to(accelerator.device)
    captions = config.data.model_copy(update={"tasks": (captions_of(config),)})
    rows = open_training(captions, config.train.batch_size, vision)["caption"]
    splits = open_validation(captions, config.evaluate, vision, answered=True)
    tokenizer = train_tokenizer(all_texts(config), config.model.num_merges)
    model: Any = build_model(config, tokenizer, vision.feature_dim)
    task = VLBartModel(model.to(accelerator.device).train(), tokenizer, vision)
    parameters = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    log.info("%s parameters, %d tokens", f"{sum(p.numel() for p in parameters.values()):,}", len(tokenizer))

    order = TaskBatches({"caption": len(rows.table)}, {"caption": rows.batch_size}, seed=config.seed)
    train = with_steps(config.train, config.schedule, order.batches_per_epoch)
    optimizer = build_optimizer(parameters, config.optimizer)
    schedule = Schedule(optimizer, config.schedule, train.steps)
    vocabulary = hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()
    inputs = {"the captions": rows.table.identity, "the vocabulary": vocabulary, "the vision tower": vision.identity}
    run = start_run(accelerator, config, inputs, resume)
    if train.gradient_checkpointing:
        model.activation_checkpointing_enable()
    write = partial(save_vl_bart, model, tokenizer, dtype=torch.float16)

    answers = answerers(task, splits, config.evaluate)

    scores: dict[str, VLScores] = {}

    def measure() -> dict[str, float]:
        found = answer_all(answers, task.networks.values(), splits, config.evaluate.batch_size, config.evaluate.limit)
        scores.update(score_all({task: predictions_of(rows) for task, rows in found.items()}))
        return main_values(scores) | other_values(scores)

    by_metric = partial(task_qualities, {"caption": False})
    validate = Validation(run, config.evaluate, measure, by_metric, write, last_step(run.checkpoints))

    def on_step_end(step: int) -> None:
        if validate.is_due(step, train.steps):
            log.info("step %d: %s", step, validate(step) or "no scores of captions without Java")

    done = fit(
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
        on_step_end=on_step_end,
        should_stop=validate.should_stop,
    )
    validate(done)
    print(report("caption", scores["caption"]))
    validate.close()
    write(run.path / "model")
    print(f"\nmodel    {run.path / 'model'}")


def captions_of(config: PretrainTinyVLConfig) -> VLTaskConfig:
    """The task `caption` of the config."""
    return next(task for task in config.data.all_tasks if task.task == "caption")


def all_texts(config: PretrainTinyVLConfig) -> Iterator[str]:
    """The training data of the tokenizer: texts and answers of every task's training split."""
    for task in config.data.all_tasks:
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
    config: PretrainTinyVLConfig, task: VLBartModel, rows: TrainingSet, order: TaskBatches, number: int
) -> VLBatch:
    """The batch of a number; it depends only on (seed, number), so that a resumed run gets the same batches."""
    stream = generator(config.seed, number, "captions")
    _, indices = order(number)
    examples, targets = zip(*(draw_example(rows.table[i], config, stream) for i in indices), strict=True)
    return task.batch("caption", examples, rows.images, targets)


def draw_example(example: Example, config: PretrainTinyVLConfig, stream: torch.Generator) -> tuple[Example, Target]:
    """An example with what to learn of it: one caption of the image, or the words that are masked in that caption."""
    caption, _ = sample_answer(example, draw(stream))
    text, target = mask_words(caption, stream) if draw(stream) < config.fill_share else ("", caption)
    return replace(example, text=text), (target, 1.0)


def mask_words(caption: str, stream: torch.Generator) -> tuple[str, str]:
    """Masks one to three consecutive words of a caption; punctuation around them is not masked.

    Returns:
        The caption with the mask token in place of the words, and the words.
    """
    words = [(match.start(), match.end()) for match in re.finditer(r"[^\s.,:]+", caption)] or [(0, len(caption))]
    length = 1 + int(draw(stream) ** 2 * min(MAX_MASKED, len(words)))  # one word more often than three
    first = int(draw(stream) * (len(words) - length + 1))
    start, end = words[first][0], words[first + length - 1][1]
    return f"{caption[:start]}<mask>{caption[end:]}", caption[start:end]


def draw(stream: torch.Generator) -> float:
    """A uniform random number in [0, 1)."""
    return float(torch.rand((), generator=stream))
