"""The embedded VL-BART from nothing, on captions of scenes, so that adapters have something to adapt.

Half of the rows it captions the picture; of the other half it also reads the caption with words masked, as BART's own
pretraining does, and so learns to read text beside a picture.
"""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from tokenizers.pre_tokenizers import Whitespace
from transformers import BartTokenizer

from dora_mm.config.loader import dump_config
from dora_mm.config.vl import PretrainTinyVLConfig
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
from dora_mm.train.validation import Validation, answer_all, main_values, open_source, open_validation

log = logging.getLogger(__name__)
MAX_POSITIONS = 640  # the longest input of a task has 600 tokens
MASK_SHARE = 0.4  # of the words of a masked caption


def main(config: PretrainTinyVLConfig, *, resume: Path | None = None) -> None:
    accelerator = Accelerator(mixed_precision=config.train.mixed_precision)
    (split,) = config.data.tasks
    assert split.train is not None
    eyes = Eyes(config.vision).to(accelerator.device)
    table = open_source(split.train, config.data, eyes)
    rows = TrainingSet(table, split.train.images, split.batch_size or config.train.batch_size)
    texts = (text for index in range(len(table)) for text in table[index].answers)
    tokenizer = train_tokenizer(texts, config.model.num_merges)
    task = VLBartTask(build_model(config, tokenizer, eyes.feature_dim).to(accelerator.device), tokenizer, eyes)  # type: ignore[arg-type]
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
    """One caption of the picture; now and then the same caption, with words masked, is to be read."""
    caption, _ = draw_answer(example, stream)
    masked = torch.rand((), generator=stream) < config.masked_share
    text = mask_words(caption, stream) if masked else ""
    return replace(example, text=text, answers=(caption,), scores=(1.0,))


def mask_words(caption: str, stream: torch.Generator) -> str:
    words = [word for word, _ in Whitespace().pre_tokenize_str(caption)]
    hidden = torch.rand(len(words), generator=stream) < MASK_SHARE
    return " ".join("<mask>" if hide else word for word, hide in zip(words, hidden.tolist(), strict=True))


def build_validation(config: PretrainTinyVLConfig, task: VLBartTask, run: RunDirectory) -> Validation:
    sets = open_validation(config.data, config.evaluate, task.eyes)
    done = checkpoints(run.checkpoints)
    return Validation(
        run,
        partial(answer_all, task, sets, config.evaluate, config.evaluate.limit),
        partial(save_vl_bart, task.model, task.tokenizer, dtype=torch.float16),
        int(done[-1].name.removeprefix("step-")) if done else 0,
    )
