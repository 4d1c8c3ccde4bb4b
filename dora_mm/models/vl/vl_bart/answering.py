"""Answers of VL-BART: greedy, by beam search, restricted to a list of candidates, or by ranking the candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import BartTokenizer

from dora_mm.config.vl import DecodeConfig
from dora_mm.models.vl.vl_bart.model import VLBart, VLInputs
from dora_mm.models.vl.vl_bart.text import decode, encode_targets
from dora_mm.registries.vl_tasks import TASKS

MAX_ANSWER = 20  # tokens of a decoded answer, <s> and </s> included


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
        self.max_answer = config.max_new_tokens + 2 if config.max_new_tokens else MAX_ANSWER  # <s> and </s>
        if config.temperature or config.stop or config.keep_thoughts:
            keys = "decode.temperature, decode.stop and decode.keep_thoughts"
            raise ValueError(f"{keys} are not for model.family vl_bart: leave them out")
        self.beams = config.beams if TASKS[task].kind == "captions" else 1
        restricted = config.takes_candidates(task)
        if restricted and not candidates:
            raise ValueError(f"answers: {config.answers} needs candidate answers of {task}: set the task's train")
        self.candidates = sorted(set(candidates)) if restricted else []
        self.candidate_ids = self._target_ids(self.candidates) if self.candidates else None

    def __call__(self, inputs: VLInputs) -> list[str]:
        """One answer per row, for a batch of B rows."""
        if words := TASKS[self.task].chosen_from:
            config = self.model.config
            logits = self.model.next_logits(inputs, [config.decoder_start_token_id, config.bos_token_id])
            tokens = self._target_ids(words)[:, 1]  # the first one of each, behind </s><s>
            return [words[index] for index in logits[:, tokens].argmax(dim=1).tolist()]
        if self.candidate_ids is not None and self.config.answers == "rank":
            scores = self.model.rank_candidates(inputs, self.candidate_ids.to(inputs.input_ids.device))
            return [self.candidates[index] for index in scores.argmax(dim=1).tolist()]
        allowed = None if self.candidate_ids is None else restricted_to(self.candidate_ids, self.model.config)
        ids = self.model.answer_ids(inputs, beams=self.beams, max_length=self.max_answer, allowed=allowed)
        return decode(self.tokenizer, ids)

    def _target_ids(self, answers: Sequence[str]) -> Tensor:
        max_positions = self.model.config.max_position_embeddings
        return encode_targets(self.tokenizer, self.task, answers, max_positions=max_positions)


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
