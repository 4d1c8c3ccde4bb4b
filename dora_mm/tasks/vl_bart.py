"""The losses of VL-BART's tasks, and their batches. Figures and prompts are in models/vl_text.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import BartTokenizer
from transformers.models.bart.modeling_bart import shift_tokens_right

from dora_mm.config.vl import VIDEO_TASKS
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.mixing import TaskBatches
from dora_mm.data.vl.readers.video import split_subtitles
from dora_mm.data.vl.splits import TrainingSet
from dora_mm.models.vl_bart.model import VLBart, VLInputs, token_log_likelihood
from dora_mm.models.vl_bart.text import encode_inputs, encode_targets
from dora_mm.tasks.vision import VisionEncoder
from dora_mm.utils.randomness import generator


@dataclass(frozen=True)
class VLBatch:
    """Rows of one task, each with one answer that it may learn."""

    task: str
    inputs: VLInputs
    targets: Tensor  # (B, T) ids, padded
    weights: Tensor  # (B,) of each row's loss: the answer's score


class VLBartTask:
    """Turns examples into what the model reads, and batches into a loss."""

    def __init__(self, model: VLBart, tokenizer: BartTokenizer, vision: VisionEncoder):
        self.model, self.tokenizer, self.vision = model, tokenizer, vision

    def check(self, tasks: Iterable[str]) -> None:
        """Raises ValueError where the model was made for clips and a task shows pictures, or the other way round."""
        reads_clips = self.model.config.pooled_side is None
        for task in tasks:
            if (task in VIDEO_TASKS) != reads_clips:
                kinds = ("clips", "pictures") if reads_clips else ("pictures", "clips")
                raise ValueError(f"model.path: this VL-BART reads {kinds[0]}, and {task} is a task of {kinds[1]}")

    def inputs(self, task: str, examples: Sequence[Example], images: str | None) -> VLInputs:
        """images: the folder of the pictures, where they are looked at."""
        if task in VIDEO_TASKS:
            before, texts = zip(*(split_subtitles(example.text) for example in examples), strict=True)
            if task == "yc2c":  # told by its subtitles alone
                texts = [""] * len(examples)
            visual, seen = self.vision.encode_clips([example.images[0] for example in examples])
        else:
            before, texts = None, [example.text for example in examples]
            visual = self.vision.encode([example.images for example in examples], images)
            seen = torch.ones(len(examples), self.num_visual_tokens(visual), dtype=torch.long)
        max_positions = self.model.config.max_position_embeddings
        ids, mask = encode_inputs(self.tokenizer, task, texts, before, max_positions=max_positions)
        device = self.model.device
        return VLInputs(ids.to(device), torch.cat([mask, seen], dim=1).to(device), visual.to(device))

    def num_visual_tokens(self, visual_BNSD: Tensor) -> int:
        """Of a row, after pooling."""
        side = self.model.config.pooled_side
        return visual_BNSD.shape[1] * (visual_BNSD.shape[2] if side is None else side * side)

    def batch(self, task: str, examples: Sequence[Example], images: str | None, stream: torch.Generator) -> VLBatch:
        """One answer a row, drawn in proportion to the scores; a row without any answer weighs nothing."""
        drawn = [draw_answer(example, stream) for example in examples]
        answers, weights = zip(*drawn, strict=True)
        device = self.model.device
        max_positions = self.model.config.max_position_embeddings
        targets = encode_targets(self.tokenizer, task, answers, max_positions=max_positions).to(device)
        return VLBatch(task, self.inputs(task, examples, images), targets, torch.tensor(weights, device=device))

    def loss(self, batch: VLBatch, generator: torch.Generator) -> Tensor:
        """VQA and GQA: the mean over rows of score times the mean over tokens. Captions, NLVR2, videos: over tokens.

        A row without an answer, whose weight is 0, adds nothing to either.
        """
        config = self.model.config
        pad = config.pad_token_id
        shifted = shift_tokens_right(batch.targets, pad, config.decoder_start_token_id)
        logits = self.model(*batch.inputs, decoder_input_ids=shifted, use_cache=False).logits
        losses = -token_log_likelihood(logits, batch.targets, pad)
        counts = (batch.targets != pad).sum(-1)
        if batch.task in ("vqa", "gqa"):
            return (losses.sum(-1) / counts * batch.weights).mean()
        kept = (batch.weights > 0).to(losses.dtype)
        return (losses.sum(-1) * kept).sum() / (counts * kept).sum().clamp(min=1)


def draw_answer(example: Example, stream: torch.Generator) -> tuple[str, float]:
    """An answer with its score; captions, whose references weigh the same, are drawn evenly."""
    if not sum(example.scores):
        return "", 0.0
    index = int(torch.multinomial(torch.tensor(example.scores), 1, generator=stream))
    return example.answers[index], float(example.scores[index])


class VLBatches:
    """Batch number -> batch: one task to a batch. What it holds depends on (seed, number, process) alone."""

    def __init__(
        self, task: VLBartTask, sets: Mapping[str, TrainingSet], *, seed: int, process: tuple[int, int] = (0, 1)
    ):
        """process: (index, count) where several machines share the work."""
        self.task, self.sets, self.seed, self.process = task, sets, seed, process
        self.order = TaskBatches(
            {name: len(found.table) for name, found in sets.items()},
            {name: found.batch_size for name, found in sets.items()},
            weights={name: found.weight for name, found in sets.items()},
            seed=seed,
        )

    @property
    def per_epoch(self) -> int:
        """Batches of this process in a pass over all tasks' rows."""
        return -(-self.order.batches_per_epoch // self.process[1])

    def __call__(self, number: int) -> VLBatch:
        index, count = self.process
        number = number * count + index
        name, rows = self.order(number)
        found = self.sets[name]
        stream = generator(self.seed, number, "answers")
        return self.task.batch(name, [found.table[row] for row in rows], found.images, stream)
