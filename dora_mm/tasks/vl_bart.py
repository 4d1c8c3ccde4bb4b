"""The losses of VL-BART's tasks, and their batches. Prompts and lengths are in models/vl_bart/text.py."""

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
from dora_mm.models.vl_bart.text import TEXTS, encode_inputs, encode_targets
from dora_mm.tasks.vision import VisionEncoder
from dora_mm.utils.randomness import generator


@dataclass(frozen=True)
class VLBatch:
    """Rows of one task, each with one target answer."""

    task: str
    inputs: VLInputs
    targets: Tensor  # (B, T) ids, padded
    weights: Tensor  # weight of each row's loss (B,): the score of its answer


class VLBartTask:
    """Turns examples into the model's inputs, and batches into a loss.

    Args:
        model: The VL-BART.
        tokenizer: Its tokenizer.
        vision: Encodes the images, or reads their features.
    """

    def __init__(self, model: VLBart, tokenizer: BartTokenizer, vision: VisionEncoder):
        self.model, self.tokenizer, self.vision = model, tokenizer, vision

    def check(self, tasks: Iterable[str]) -> None:
        """Checks that the model was built for these tasks and their visual input.

        Raises:
            ValueError: VL-BART has no prompt for a task, or reads clips and a task has images, or the other way round.
        """
        reads_clips = self.model.config.pooled_side is None
        for task in tasks:
            if task not in TEXTS:
                raise ValueError(f"data: VL-BART cannot do the task {task}: its tasks are {', '.join(TEXTS)}")
            if (task in VIDEO_TASKS) != reads_clips:
                read, needed = ("clips", "images") if reads_clips else ("images", "clips")
                raise ValueError(f"model.path: this VL-BART reads {read}, and the task {task} needs {needed}")

    def inputs(self, task: str, examples: Sequence[Example], images: str | None) -> VLInputs:
        """Builds the model's inputs, on its device.

        Args:
            task: Name of the task.
            examples: B examples.
            images: The folder of the images; not used if precomputed features are read.

        Raises:
            ValueError: An image cannot be read, or features are missing or have different shapes.
        """
        if task in VIDEO_TASKS:
            before, texts = zip(*(split_subtitles(example.text) for example in examples), strict=True)
            if task == "yc2c":  # the text input is the subtitles alone
                texts = [""] * len(examples)
            visual, visual_mask = self.vision.encode_clips([example.images[0] for example in examples])
        else:
            before, texts = None, [example.text for example in examples]
            visual = self.vision.encode([example.images for example in examples], images)
            visual_mask = torch.ones(len(examples), self.num_visual_tokens(visual), dtype=torch.long)
        max_positions = self.model.config.max_position_embeddings
        ids, mask = encode_inputs(self.tokenizer, task, texts, before, max_positions=max_positions)
        device = self.model.device
        return VLInputs(ids.to(device), torch.cat([mask, visual_mask], dim=1).to(device), visual.to(device))

    def num_visual_tokens(self, visual_BNSD: Tensor) -> int:
        """Number of visual tokens per row (N S') after the model's pooling, for features (B, N, S, D)."""
        side = self.model.config.pooled_side
        return visual_BNSD.shape[1] * (visual_BNSD.shape[2] if side is None else side * side)

    def batch(self, task: str, examples: Sequence[Example], images: str | None, stream: torch.Generator) -> VLBatch:
        """Builds a training batch.

        Args:
            task: Name of the task.
            examples: B examples. One answer of each is drawn in proportion to the scores; an example without answers
                gets weight 0.
            images: The folder of the images; not used if precomputed features are read.
            stream: Source of the draws.

        Raises:
            ValueError: As `inputs`.
        """
        drawn = [draw_answer(example, stream) for example in examples]
        answers, weights = zip(*drawn, strict=True)
        device = self.model.device
        max_positions = self.model.config.max_position_embeddings
        targets = encode_targets(self.tokenizer, task, answers, max_positions=max_positions).to(device)
        return VLBatch(task, self.inputs(task, examples, images), targets, torch.tensor(weights, device=device))

    def loss(self, batch: VLBatch, generator: torch.Generator) -> Tensor:
        """The loss of a batch.

        VQA and GQA: the mean over rows of score times the row's mean over tokens. Captions, NLVR2 and video tasks: the
        mean over all tokens. A row without an answer, whose weight is 0, adds nothing to either.

        Args:
            batch: A batch of one task.
            generator: Not used: this loss draws nothing.

        Returns:
            A scalar, float32.
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
    """Draws an answer in proportion to the scores; returns it with its score, or ("", 0.0) if all scores are 0."""
    if not sum(example.scores):
        return "", 0.0
    index = int(torch.multinomial(torch.tensor(example.scores), 1, generator=stream))
    return example.answers[index], float(example.scores[index])


class VLBatches:
    """Maps a batch number to a batch of one task, which depends only on (seed, number, process).

    Args:
        task: Builds the batches.
        sets: The training sets by task name.
        seed: Seed of the order and of drawn answers.
        process: (index, count) if several processes share the work.
    """

    def __init__(
        self, task: VLBartTask, sets: Mapping[str, TrainingSet], *, seed: int, process: tuple[int, int] = (0, 1)
    ):
        self.task, self.sets, self.seed, self.process = task, sets, seed, process
        self.order = TaskBatches(
            {name: len(training_set.table) for name, training_set in sets.items()},
            {name: training_set.batch_size for name, training_set in sets.items()},
            weights={name: training_set.weight for name, training_set in sets.items()},
            seed=seed,
        )

    @property
    def per_epoch(self) -> int:
        """This process's number of batches in one pass over the rows of all tasks."""
        return -(-self.order.batches_per_epoch // self.process[1])

    def __call__(self, number: int) -> VLBatch:
        """This process's batch of this number, on the model's device."""
        index, count = self.process
        number = number * count + index
        name, rows = self.order(number)
        training_set = self.sets[name]
        stream = generator(self.seed, number, "answers")
        return self.task.batch(name, [training_set.table[row] for row in rows], training_set.images, stream)
