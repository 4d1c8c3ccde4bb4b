"""Answers of VL-BART: greedy, by beam search, restricted to a list of candidates, or by ranking the candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

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
    """A model that answers, with its preprocessing; VLBartTask implements it."""

    model: VLBart
    tokenizer: BartTokenizer

    @property
    def vision(self) -> nn.Module:
        """The vision encoder: the module that gives the visual tokens."""
        ...

    def check(self, tasks: Iterable[str]) -> None:
        """Checks that the model can do these tasks.

        Raises:
            ValueError: It cannot do one of them.
        """
        ...

    def inputs(self, task: str, examples: Sequence[Example], images: str | None) -> VLInputs:
        """Builds the model's inputs, on its device.

        Args:
            task: Name of the task.
            examples: B examples.
            images: The folder of their images; None if precomputed features are read.
        """
        ...


class Answerer:
    """Decodes the answers of one task.

    Args:
        model: The VL-BART.
        tokenizer: Its tokenizer.
        task: Name of the task.
        config: The decoding settings.
        candidates: The permitted answers, needed if `config.answers` is `rank` or `trie`.

    Raises:
        ValueError: Candidates are needed, and there are none.
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
            raise ValueError(f"answers: {config.answers} needs candidate answers of {task}: set the task's train")
        self.candidates = sorted(set(candidates)) if restricted else []
        self.candidate_ids = self._target_ids(self.candidates) if self.candidates else None

    def __call__(self, inputs: VLInputs) -> list[str]:
        """One answer per row, for a batch of B rows."""
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
        """Whichever word's first token is likelier after `</s><s>`."""
        config = self.model.config
        logits = self.model.next_logits(inputs, [config.decoder_start_token_id, config.bos_token_id])
        words = self._target_ids(TRUE_FALSE)[:, 1]
        return [TRUE_FALSE[index] for index in logits[:, words].argmax(dim=1).tolist()]


def restricted_to(candidates: Tensor, config: Any) -> Callable[[int, Tensor], list[int]]:
    """Restricts decoding to a list of candidate answers.

    Args:
        candidates: Token ids of C candidates, padded (C, T).
        config: The model's config, for its special tokens.

    Returns:
        A `prefix_allowed_tokens_fn` for transformers' `generate`: maps (row, ids so far) to the permitted next ids.
    """
    pad = config.pad_token_id
    following: dict[tuple[int, ...], set[int]] = {}  # prefix -> next ids
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
    """Answers the rows of a table.

    Args:
        answerer: Decodes the answers. Its model should be in eval mode, and its parameters fixed.
        table: The examples.
        inputs_of: Builds the model's inputs for a batch of examples.
        limit: Answers only this many rows; None means all.

    Returns:
        Each example with its answer, in the order of the table.
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
    """Builds an Answerer for each split.

    Args:
        task: The model with its preprocessing.
        sets: The splits by task name.
        config: The decoding settings.

    Returns:
        The answerers by task name.

    Raises:
        ValueError: The model cannot do a task, or a task needs candidates and its split has none.
    """
    task.check(sets)
    return {name: Answerer(task.model, task.tokenizer, name, config, split.candidates) for name, split in sets.items()}


def answer_all(
    task: AnsweringTask, sets: Mapping[str, ValidationSet], config: DecodeConfig, limit: int | None = None
) -> dict[str, Predictions]:
    """Answers the rows of every split.

    The model and its vision encoder run in eval mode, and adapted weights are computed once for all rows.

    Args:
        task: The model with its preprocessing.
        sets: The splits by task name.
        config: The decoding settings.
        limit: Answers only this many rows of each split; None means all.

    Returns:
        The examples with their answers, by task name.

    Raises:
        ValueError: As `answerers`.
    """
    predictions: dict[str, Predictions] = {}
    by_task = answerers(task, sets, config)
    networks = (task.model, task.vision)
    before = [network.training for network in networks]
    try:
        for network in networks:
            network.eval()
        with fixed_parameters(task.model), fixed_parameters(task.vision):
            for name, split in sets.items():
                inputs_of = partial(task.inputs, name, images=split.images)
                predictions[name] = predict(by_task[name], split.table, inputs_of, limit)
    finally:
        for network, training in zip(networks, before, strict=True):
            network.train(training)
    return predictions
