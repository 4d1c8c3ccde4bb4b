"""The answers of transformers' vision-language models: generated, or the likeliest of several."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import cached_property, partial
from string import ascii_uppercase
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from dora_mm.config.vl import DecodeConfig
from dora_mm.data.vl.answers import LENGTH, STOP, TAGS, Answer, ModelAnswer, Tags, patterns
from dora_mm.data.vl.example import Example, Turn
from dora_mm.data.vl.rows import RowTooLongError
from dora_mm.models.chat_templates import rendering_on
from dora_mm.models.vl.vlm.chat import render
from dora_mm.models.vl.vlm.example_encoder import ExampleEncoder
from dora_mm.models.vl.vlm.network import VLMNetwork, naming
from dora_mm.models.vl.vlm.sampled import SampledTokens
from dora_mm.registries.vl_tasks import TASKS
from dora_mm.utils.day import Day

log = logging.getLogger(__name__)
PLACEHOLDER = re.compile(r"<(loc_?|patch_index_)\d+>")  # tokens of boxes, which some tokenizers count as special
SHORTEST = (Turn("user", "?", False), Turn("assistant", "!", True))


class VLMAnswers:
    """Answers the examples of tasks.

    Args:
        encoder: Makes their rows.
        network: Computes the answers.
    """

    def __init__(self, encoder: ExampleEncoder, network: VLMNetwork):
        self.encoder, self.network = encoder, network

    def answerer(self, task: str, config: DecodeConfig, candidates: Sequence[str]) -> Answer:
        """See `VLModel.answerer`."""
        record = TASKS[task]
        optional = record.names is not None or record.lettered
        if config.answers == "trie" and (config.takes_candidates(task) or optional):
            raise ValueError("answers: trie needs model.family vl_bart: use generate or rank")
        if config.answers == "rank" and optional:
            return partial(self.rank, task, (), config.batch_size)
        if record.chosen_from is not None:
            return partial(self.rank, task, record.chosen_from, config.batch_size)
        if config.takes_candidates(task):
            if not candidates:
                raise ValueError(f"answers: {config.answers} needs candidate answers of {task}: set the task's train")
            return partial(self.rank, task, sorted(set(candidates)), config.batch_size)
        beams = config.beams if record.takes_beams and not config.temperature else 1
        settings = self.settings(config.max_new_tokens or record.max_answer + self._num_opening, beams)
        return partial(self.generate, task, settings, config)

    def settings(self, max_new_tokens: int, beams: int) -> GenerationConfig:
        """The model's own settings of generation, with these lengths and beams."""
        settings = GenerationConfig(**self.network.model.generation_config.to_diff_dict())
        tokenizer = self.encoder.processor.tokenizer
        known = {tokenizer.eos_token_id, *np.atleast_1d(settings.eos_token_id or []).tolist(), *self._turn_end}
        settings.eos_token_id = sorted(known - {None})
        settings.pad_token_id = settings.pad_token_id or tokenizer.pad_token_id or settings.eos_token_id[0]
        settings.update(max_new_tokens=max_new_tokens, num_beams=beams, do_sample=False, early_stopping=beams > 1)
        return settings

    @cached_property
    def _shortest(self) -> str:
        """A short answer as it is rendered. It is not a row, so `Day.num_requests` does not count it."""
        with rendering_on(Day(self.encoder.day.date)):
            text, [(start, end)], _ = render(self.encoder.processor, SHORTEST)
        return text[start:end]

    @cached_property
    def _turn_end(self) -> list[int]:
        """The token that ends a turn of the model in its chat template."""
        tokenizer = self.encoder.processor.tokenizer
        if self.encoder.fallback is not None:
            return [] if tokenizer.sep_token_id is None else [tokenizer.sep_token_id]
        return tokenizer(self._shortest, add_special_tokens=False)["input_ids"][-1:]

    @cached_property
    def _tags(self) -> Tags:
        """The tags of thoughts: the usual ones, and those of the model's own `response_template` for what it writes."""
        template = getattr(self.encoder.processor.tokenizer, "response_template", None) or {}
        fields = template.get("fields", {})
        found = [fields[name] for name in ("reasoning_content", "thinking") if name in fields]
        own = [(each.get("open"), each.get("close")) for each in found]
        return (*TAGS, *((begin, end) for begin, end in own if isinstance(begin, str) and isinstance(end, str)))

    @cached_property
    def _opening(self) -> str:
        """What a model writes before a short answer: the end of an empty thought, in some templates, or all of it."""
        opening = "" if self.encoder.fallback is not None else self._shortest.partition(SHORTEST[1].text)[0]
        return opening if patterns(self._tags)[1].search(opening) else ""

    @cached_property
    def _num_opening(self) -> int:
        """The tokens of `_opening`."""
        tokenizer = self.encoder.processor.tokenizer
        return len(tokenizer(self._opening, add_special_tokens=False)["input_ids"]) if self._opening else 0

    @cached_property
    def _prompt_opens_thought(self) -> bool:
        return bool(self._opening) and not patterns(self._tags)[0].search(self._opening)

    @torch.no_grad()
    def generate(
        self,
        task: str,
        settings: GenerationConfig,
        config: DecodeConfig,
        examples: Sequence[Example],
        images: str | None,
    ) -> list[ModelAnswer]:
        """The generated answer of each example.

        Raises:
            RowTooLongError: The images of one are beyond the model's positions.
        """
        encoder = self.encoder
        rows = [encoder.row(task, example, images, None) for example in examples]
        for example, row in zip(examples, rows, strict=True):
            if row.num_image_cut:
                raise self._too_long(task, example, "its images are")
        if num_cut := sum(row.num_cut > 0 for row in rows):
            log.warning("%d questions of %s were cut to the model's %d positions", num_cut, task, encoder.max_length)
        answers = [ModelAnswer("")] * len(rows)
        for group in encoder.groups(rows):
            inputs, _ = encoder.collate([rows[i] for i in group], left=encoder.form.continues)
            with naming(task, [examples[i].id for i in group]):
                ids = self.network.generate(
                    inputs, settings, **self._sampling(task, config, [examples[i] for i in group])
                )
            ended = [LENGTH if is_cut else STOP for is_cut in self._cut(ids, settings)]
            for index, text, end in zip(group, self._texts(ids), ended, strict=True):
                answer = ModelAnswer(text, ended=end)
                if not config.keep_thoughts:
                    tags = {"opened": self._prompt_opens_thought, "tags": self._tags}
                    answer = answer.without_thought(examples[index].answers, **tags)
                answers[index] = answer.before(config.stop).stripped()
        return answers

    def _cut(self, ids: Tensor, settings: GenerationConfig) -> list[bool]:
        """Whether answers (B, T) were cut at the most tokens: their last token neither is nor follows the end."""
        ends = {settings.pad_token_id, *np.atleast_1d(settings.eos_token_id).tolist()}
        return [row[-1:] != [] and row[-1] not in ends for row in ids.tolist()]

    def _texts(self, ids: Tensor) -> list[str]:
        """The texts of answers (B, T), without special tokens, but those of boxes and thoughts."""
        tokenizer = self.encoder.processor.tokenizer
        if not self._read_ids:
            return tokenizer.batch_decode(ids, skip_special_tokens=True)
        dropped = set(tokenizer.all_special_ids) - self._read_ids
        return tokenizer.batch_decode([[i for i in row if i not in dropped] for row in ids.tolist()])

    @cached_property
    def _read_ids(self) -> set[int]:
        """The tokens of boxes and thoughts that the tokenizer counts as special."""
        tokenizer = self.encoder.processor.tokenizer
        special = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
        tags = [tag for pair in self._tags for tag in pair]
        return {
            number for number, token in special if PLACEHOLDER.fullmatch(token) or any(token in tag for tag in tags)
        }

    def _sampling(self, task: str, config: DecodeConfig, examples: Sequence[Example]) -> dict[str, Any]:
        """Arguments of `generate` that greedy answers of full length do not need."""
        found: dict[str, Any] = {}
        if config.temperature:
            rows = [f"{task} {example.id}" for example in examples]
            found["logits_processor"] = LogitsProcessorList([SampledTokens(config, rows)])
        if config.stop:
            found |= {"stop_strings": list(config.stop), "tokenizer": self.encoder.processor.tokenizer}
        return found

    @torch.no_grad()
    def rank(
        self,
        task: str,
        known: Sequence[str],
        batch_size: int,
        examples: Sequence[Example],
        images: str | None,
    ) -> list[str]:
        """The likeliest candidate of each example: of those known, or of the names of its options."""
        answers = []
        for example in examples:
            candidates = known or option_names(task, example)
            if not candidates:
                raise ValueError(f"row {example.id} of {task} has no options to choose from: decode.answers: generate")
            parts = [candidates[start : start + batch_size] for start in range(0, len(candidates), batch_size)]
            losses = torch.cat([self._losses(task, example, images, part) for part in parts])
            answers.append(candidates[int(losses.argmin())])
        return answers

    def _losses(self, task: str, example: Example, images: str | None, candidates: Sequence[str]) -> Tensor:
        """The loss of each candidate as the answer of an example: (C,), summed over its tokens.

        Raises:
            RowTooLongError: With one of them, the row is longer than the model's positions.
        """
        rows = self.encoder.rows(task, example, images, candidates)
        if any(row.num_cut for row in rows):
            raise self._too_long(task, example, "with its answers it is")
        losses = torch.empty(len(rows), device=self.network.device)
        for group in self.encoder.groups(rows):
            batch = self.encoder.collate([rows[i] for i in group])
            with naming(task, [example.id]):
                losses[group] = self.network.row_losses(*batch)[0]
        return losses

    def _too_long(self, task: str, example: Example, what: str) -> RowTooLongError:
        limit = f"longer than the model's {self.encoder.max_length} positions"
        return RowTooLongError(f"row {example.id} of {task}: {what} {limit}: leave it out, or make its images smaller")


def option_names(task: str, example: Example) -> Sequence[str]:
    """The answers that name the options of an example: sentences, or else letters."""
    names = TASKS[task].names
    if names is None:
        return ascii_uppercase[: len(example.options)]
    return [names.replace("{option}", option) for option in example.options]
