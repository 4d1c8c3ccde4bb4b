"""Answers of VL-BART to batches of examples: greedy, by beams, held to a list of candidates, or ranked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import BartTokenizer

from dora_mm.config.vl import DecodeConfig
from dora_mm.core import fixed_parameters
from dora_mm.data.vl.example import Example, Predictions
from dora_mm.data.vl.splits import ValidationSet
from dora_mm.data.vl.tables import ExampleTable
from dora_mm.models.vl_bart.model import VLBart, VLInputs
from dora_mm.models.vl_bart.text import TEXTS, decode, encode_targets

TRUE_FALSE = ("true", "false")


class AnsweringTask(Protocol):
    """A model with what turns examples into its inputs, such as a VLBartTask."""

    model: VLBart
    tokenizer: BartTokenizer

    @property
    def vision(self) -> nn.Module:
        """What encodes the images."""
        ...

    def check(self, tasks: Iterable[str]) -> None:
        """Raises ValueError where the model cannot do one of these tasks."""
        ...

    def inputs(self, task: str, examples: Sequence[Example], images: str | None) -> VLInputs:
        """What the model reads of these examples, whose images lie in the folder `images`."""
        ...


class Answerer:
    """Decodes the answers of one task.

    Args:
        candidates: the answers to choose from, where `config.answers` is `rank` or `trie`.
    """

    def __init__(
        self,
        model: VLBart,
        tokenizer: BartTokenizer,
        task: str,
        config: DecodeConfig,
        candidates: Sequence[str] = (),
    ):
        self.model, self.tokenizer, self.task, self.config = model, tokenizer, task, config
        self.form = TEXTS[task]
        restricted = config.takes_candidates(task)
        if restricted and not candidates:
            raise ValueError(f"answers {config.answers} needs the answers of {task} to choose from: give its train")
        self.candidates = sorted(set(candidates)) if restricted else []
        self.candidate_ids = self._target_ids(self.candidates) if self.candidates else None

    def __call__(self, inputs: VLInputs) -> list[str]:
        """One answer to each row."""
        if self.task == "nlvr2":
            return self._true_or_false(inputs)
        if self.candidate_ids is not None and self.config.answers == "rank":
            scores = self.model.rank_candidates(inputs, self.candidate_ids.to(inputs.input_ids.device))
            return [self.candidates[index] for index in scores.argmax(dim=1).tolist()]
        allowed = None if self.candidate_ids is None else restricted_to(self.candidate_ids, self.model.config)
        beams = self.config.beams if self.form.beams else 1
        ids = self.model.answer_ids(inputs, beams=beams, max_length=self.form.max_answer, allowed=allowed)
        return decode(self.tokenizer, ids)

    def _target_ids(self, answers: Sequence[str]) -> Tensor:
        max_positions = self.model.config.max_position_embeddings
        return encode_targets(self.tokenizer, self.task, answers, max_positions=max_positions)

    def _true_or_false(self, inputs: VLInputs) -> list[str]:
        """The likelier of the two words' first tokens, after `</s><s>`."""
        config = self.model.config
        logits = self.model.next_logits(inputs, [config.decoder_start_token_id, config.bos_token_id])
        words = self._target_ids(TRUE_FALSE)[:, 1]
        return [TRUE_FALSE[index] for index in logits[:, words].argmax(dim=1).tolist()]


def restricted_to(candidates: Tensor, config) -> Callable[[int, Tensor], list[int]]:
    """A `prefix_allowed_tokens_fn` that leads to one of the candidates (C, T), padded, and to nothing else."""
    pad = config.pad_token_id
    following: dict[tuple[int, ...], set[int]] = {}
    for row in candidates.tolist():
        ids = [config.decoder_start_token_id, *(token for token in row if token != pad)]
        for length in range(1, len(ids)):
            following.setdefault(tuple(ids[:length]), set()).add(ids[length])
    return lambda _row, ids: sorted(following.get(tuple(ids.tolist()), {pad}))


@torch.no_grad()
def predict(
    answerer: Answerer,
    table: ExampleTable,
    inputs_of: Callable[[list[Example]], VLInputs],
    limit: int | None = None,
) -> list[tuple[Example, str]]:
    """Every row of the table (or the first `limit`) with the model's answer, in the table's order.

    The model should be in eval mode, and its parameters fixed.
    """
    count = len(table) if limit is None else min(limit, len(table))
    size = answerer.config.batch_size
    rows: list[tuple[Example, str]] = []
    with tqdm(total=count, desc=answerer.task, unit="row", delay=2, disable=None) as bar:
        for start in range(0, count, size):
            examples = [table[index] for index in range(start, min(start + size, count))]
            rows += zip(examples, answerer(inputs_of(examples)), strict=True)
            bar.update(len(examples))
    return rows


def answerers(task: AnsweringTask, sets: Mapping[str, ValidationSet], config: DecodeConfig) -> dict[str, Answerer]:
    """One for each split, by task name.

    Raises:
        ValueError: The model cannot do a task, or a task's answers are to be chosen and no candidates are known.
    """
    task.check(sets)
    return {name: Answerer(task.model, task.tokenizer, name, config, split.candidates) for name, split in sets.items()}


def answer_all(
    task: AnsweringTask, sets: Mapping[str, ValidationSet], config: DecodeConfig, limit: int | None = None
) -> dict[str, Predictions]:
    """The model's answers to the rows of every split, or to the first `limit` of each, by task name.

    The model runs in eval mode, and all that depends on its parameters alone is computed once. Raises as `answerers`.
    """
    found: dict[str, Predictions] = {}
    made = answerers(task, sets, config)
    networks = (task.model, task.vision)
    before = [network.training for network in networks]
    try:
        for network in networks:
            network.eval()
        with fixed_parameters(task.model), fixed_parameters(task.vision):
            for name, split in sets.items():
                inputs_of = partial(task.inputs, name, images=split.images)
                found[name] = predict(made[name], split.table, inputs_of, limit)
    finally:
        for network, training in zip(networks, before, strict=True):
            network.train(training)
    return found
