"""The vision-language models of transformers: examples as rows, their losses, and answers."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from string import ascii_uppercase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from dora_mm.config.loader import resolve_model
from dora_mm.config.models import VLMModelConfig
from dora_mm.config.vl import DecodeConfig
from dora_mm.core import TargetMap
from dora_mm.data.images.pixels import load_rgb
from dora_mm.data.vl.example import IMAGE, Answer, Example, Turn
from dora_mm.data.vl.image_folder import image_path
from dora_mm.data.vl.lengths import RowLengths
from dora_mm.data.vl.shown import ShownRow
from dora_mm.data.vl.tables import ExampleTable
from dora_mm.models.folders import identity_of, model_class, read_config
from dora_mm.models.opening import check_revision, commit_of
from dora_mm.models.vl import ROW_MEANS, Target, mean_over_processes
from dora_mm.models.vlm.chat import Rendered, render, render_prompt
from dora_mm.models.vlm.encoding import IGNORED, Row, RowEncoder, collate
from dora_mm.models.vlm.forms import Form, cross_entropy, form_of
from dora_mm.models.vlm.loading import load_processor, load_vlm
from dora_mm.models.vlm.prompts import ANSWER_TOKENS, DECIDED, PLAIN, PROMPTS, SAME_IMAGES, SAME_LENGTH, Plain
from dora_mm.models.vlm.row_lengths import row_lengths
from dora_mm.models.vlm.shown import shown_row
from dora_mm.targets import map_of

log = logging.getLogger(__name__)
LONGEST = 1 << 20  # tokens per row of a model whose config has no limit


@dataclass(frozen=True)
class VLMBatch:
    """Rows of one task.

    Attributes:
        task: Name of the task.
        groups: The rows in groups that are computed together, each as (inputs, labels (B, T), row weights (B,)).
        num_cut: How many of the rows lost text to `model.max_length`.
    """

    task: str
    groups: tuple[tuple[Mapping[str, Tensor], Tensor, Tensor], ...]
    num_cut: int = 0


class VLM:
    """A vision-language model of transformers with its processor; implements `VLModel`.

    Args:
        config: The `model` section.
        device: Where the model computes.

    Attributes:
        processor: Its processor.
        encoder: Encodes the rows of a training, which have at most `model.max_length` tokens.
        reader: Encodes rows to answer, which are only as short as the model's positions.
        plain: What a class without a chat template can read; None for those that have one.
        limit_from: What sets the number of tokens that a row may have: a key of the config, or the model.
        commit: The commit of a hub model; None for a local one.
        num_cut: See `VLModel.num_cut`.

    Raises:
        ValueError: The model or its processor cannot be loaded; a folder is given with a revision; or its class has
            neither a chat template nor a plain prompt that is known here.
    """

    prepares_batches = True
    question_task = "chat"

    def __init__(self, config: VLMModelConfig, device: torch.device | str = "cpu"):
        self.device, self.path = torch.device(device), resolve_model(config.path)
        check_revision(self.path, config.revision)
        self.model_config: Any = read_config(self.path, config.revision)
        self.commit = commit_of(self.path, config.revision)
        self.config = config.model_copy(update={"revision": self.commit})  # all is read of one commit
        self.name = model_class(self.model_config, self.path).__name__  # for messages
        self.processor: Any = load_processor(self.config)
        self.plain = None if self.processor.chat_template else PLAIN.get(self.model_config.model_type)
        if self.plain is None and not self.processor.chat_template:
            raise ValueError(
                f"model.path: {self.path}, a {self.name}, has no chat template, and is none of {list(PLAIN)}"
            )
        positions = getattr(self.model_config.get_text_config(), "max_position_embeddings", None) or LONGEST
        self.encoder = RowEncoder(self.processor, min(config.max_length or positions, positions))
        self.reader = RowEncoder(self.processor, positions)  # without its end a question asks for something else
        self.limit_from = (
            "model.max_length" if self.encoder.max_length == config.max_length else "the model's positions"
        )
        self.num_cut = 0

    @cached_property
    def model(self) -> Any:
        """The model, loaded on first use, since data can be checked without it."""
        return load_vlm(self.config, self.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the frozen weights; those that are trained themselves are float32."""
        return getattr(torch, self.config.dtype)

    @cached_property
    def form(self) -> Form:
        return form_of(self.name, self.model_config)

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"model": self.model}

    @property
    def target_maps(self) -> dict[str, TargetMap]:
        return {"model": map_of(self.model)}

    @property
    def reads_several(self) -> bool:
        return self.plain is None or self.plain.images is None

    @property
    def identity(self) -> dict[str, str]:
        return self._identity

    @cached_property
    def _identity(self) -> dict[str, str]:
        return identity_of(self.path, self.commit)

    def fresh(self, seed: int) -> VLM:
        return VLM(self.config, self.device)

    def check(self, tasks: Iterable[str]) -> None:
        for task in tasks:
            if task not in PROMPTS:
                raise ValueError(f"data: the task {task} needs model.family vl_bart, not a model of transformers")
            if task == "chat" and self.plain is None and task in self.config.prompts:
                raise ValueError("model.prompts: chat has no effect, since conversations are read as they are")
            if task == "nlvr2" and self.plain and self.plain.images == 1:
                raise ValueError(f"data: {self.name} reads one image per row, and nlvr2 has two")

    def check_rows(self, table: ExampleTable) -> ExampleTable:
        if self.plain is None:
            return table
        table = table.without(table.lengths("images") == 0, f"has no image, and {self.name} needs one")
        if self.plain.images == 1:
            table = table.without(table.lengths("images") > 1, f"has several images, and {self.name} reads one")
        reason = f"has several turns before its answer, and {self.name} reads one: it has no chat template"
        return table.without(table.lengths("turns") - table.lengths("answers") > 1, reason)

    # --- rows --------------------------------------------------------------------------------------------------------

    def batch(self, task: str, examples: Sequence[Example], images: str | None, targets: Sequence[Target]) -> VLMBatch:
        rows = [self.row(task, example, images, answer) for example, (answer, _) in zip(examples, targets, strict=True)]
        batches = [
            (*self._collate([rows[i] for i in group]), torch.tensor([targets[i][1] for i in group]))
            for group in self._groups(rows)
        ]
        return VLMBatch(task, tuple(batches), sum(row.num_cut > 0 for row in rows))

    def row(self, task: str, example: Example, images: str | None, answer: str | None) -> Row:
        """One example as the model reads it.

        Args:
            task: Name of the task.
            example: The example.
            images: The folder of its images.
            answer: The answer with loss; None: only what the model reads before it answers.

        Raises:
            ValueError: An image cannot be read, or the row cannot be encoded; the message names the row.
        """
        return self._encoded(task, example, self._pictures(example, images), answer, answer is not None)

    def _pictures(self, example: Example, folder: str | None) -> list[Any]:
        return [self.load_image(folder, name) for name in example.images]

    def _encoded(
        self, task: str, example: Example, pictures: list[Any], answer: str | None, trained: bool = False
    ) -> Row:
        encoder = self.encoder if trained else self.reader
        try:
            rendered = self.rendered(task, example, answer)
            if self.plain is not None:
                return self._plain_row(encoder, rendered.text, pictures, self.plain, answer)
            if answer is None:
                return encoder.question(rendered.text, pictures)
            return encoder.conversation(*rendered, pictures)
        except ValueError as error:
            raise ValueError(f"row {example.id} of {task}: {error}") from error

    def rendered(self, task: str, example: Example, answer: str | None) -> Rendered:
        """The text that the processor reads, with the places of the answers: none where they are no part of it.

        Args:
            task: Name of the task.
            example: The example.
            answer: As in `row`.

        Raises:
            ValueError: As `render`.
        """
        if self.plain is not None:
            token = self.processor.image_token * len(example.images) if self.plain.image_token else ""
            return Rendered(token + self.prompt(task, example.text), ())
        turns = self.turns(task, example, answer)
        return Rendered(render_prompt(self.processor, turns), ()) if answer is None else render(self.processor, turns)

    def _plain_row(self, encoder: RowEncoder, text: str, pictures: list[Any], plain: Plain, answer: str | None) -> Row:
        if self.form.continues:
            return encoder.question(text, pictures, None if answer is None else plain.separator + answer)
        row = encoder.question(text, pictures, ends=True)
        return replace(row, labels=encoder.decoder_target(answer or "", self.form.start))

    def turns(self, task: str, example: Example, answer: str | None) -> list[Turn]:
        """The conversation of an example: its own, or the task's prompt with the images in front."""
        if example.turns:
            turns = list(example.turns)
            return turns[:-1] if answer is None and turns[-1].role == "assistant" else turns
        asked = "\n".join([*[IMAGE] * len(example.images), self.prompt(task, example.text)])
        return [Turn("user", asked, False), *([] if answer is None else [Turn("assistant", answer, True)])]

    def prompt(self, task: str, text: str) -> str:
        """What the model is asked about an example with this text."""
        known = self.plain.prompts if self.plain else PROMPTS
        return {**known, **self.config.prompts}[task].replace("{text}", text)

    def load_image(self, folder: str | None, name: str) -> Any:
        return load_rgb(image_path(folder, name), "white")

    def lengths(self, task: str, table: ExampleTable, images: str | None, *, texts: bool = True) -> RowLengths:
        return row_lengths(self, task, table, images, texts=texts)

    def shown(self, task: str, example: Example, images: str | None) -> ShownRow:
        return shown_row(self, task, example, images)

    def _groups(self, rows: Sequence[Row]) -> list[list[int]]:
        """The rows, by index, that this class can compute in one batch."""
        kind, groups = self.model_config.model_type, defaultdict(list)
        for index, row in enumerate(rows):
            images = row.num_images if kind in SAME_IMAGES else None
            groups[images, row.length if kind in SAME_LENGTH else None].append(index)
        return list(groups.values())

    def _collate(self, rows: Sequence[Row], *, left: bool = False) -> tuple[dict[str, Tensor], Tensor]:
        tokenizer = self.processor.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return collate(rows, pad=pad, left=left)

    # --- losses ------------------------------------------------------------------------------------------------------

    def loss(self, batch: VLMBatch, generator: torch.Generator) -> Tensor:
        """The loss of a batch.

        VQA and GQA: the mean over rows of score times the row's mean over tokens. Others: the mean over the tokens of
        the answers, over those of all processes. A row without an answer, whose weight is 0, adds nothing to either.

        Args:
            batch: A batch of one task.
            generator: Not used: this loss draws nothing.

        Returns:
            A scalar, float32.
        """
        self.num_cut += batch.num_cut
        total, count = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for inputs, labels, weights in batch.groups:
            sums, counts = self.row_losses(inputs, labels)
            weights = weights.to(self.device)
            if batch.task in ROW_MEANS:
                total = total + (sums / counts.clamp(min=1) * weights).sum()
                count = count + len(weights)
            else:
                total = total + (sums * (weights > 0)).sum()
                count = count + (counts * (weights > 0)).sum()
        return mean_over_processes(total, count)

    def row_losses(self, inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each row, summed over its target tokens, and their number: (B,) each."""
        labels = labels.to(self.device)
        with self._precision():
            losses = cross_entropy(*self.form.target_logits(self.model, self._moved(inputs), labels))
        return losses.sum(-1), (labels != IGNORED).sum(-1)

    def _precision(self) -> torch.autocast:
        """Autocast where the frozen weights are in half precision: those that are trained themselves are float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype.itemsize < 4)

    def _moved(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs on the model's device; pixels in its dtype."""
        return {k: v.to(self.device, self.dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}

    # --- answers -----------------------------------------------------------------------------------------------------

    def answerer(self, task: str, config: DecodeConfig, candidates: Sequence[str]) -> Answer:
        if config.answers == "trie" and config.takes_candidates(task):
            raise ValueError("answers: trie needs model.family vl_bart: use generate or rank")
        if task in DECIDED or task == "choice":
            return partial(self._ranked, task, DECIDED.get(task), config.batch_size)
        if config.takes_candidates(task):
            if not candidates:
                raise ValueError(f"answers: {config.answers} needs candidate answers of {task}: set the task's train")
            return partial(self._ranked, task, sorted(set(candidates)), config.batch_size)
        settings = self._settings(
            config.max_new_tokens or ANSWER_TOKENS.get(task, 16), config.beams if task == "caption" else 1
        )
        return partial(self._generated, task, settings)

    def _settings(self, max_new_tokens: int, beams: int) -> GenerationConfig:
        settings = GenerationConfig(**self.model.generation_config.to_diff_dict())
        tokenizer = self.processor.tokenizer
        known = {tokenizer.eos_token_id, *np.atleast_1d(settings.eos_token_id or []).tolist(), *self._turn_end}
        settings.eos_token_id = sorted(known - {None})
        settings.pad_token_id = settings.pad_token_id or tokenizer.pad_token_id or settings.eos_token_id[0]
        settings.update(max_new_tokens=max_new_tokens, num_beams=beams, do_sample=False, early_stopping=beams > 1)
        return settings

    @cached_property
    def _turn_end(self) -> list[int]:
        """The token that ends a turn of the model in its chat template."""
        if self.plain is not None:
            return [] if self.processor.tokenizer.sep_token_id is None else [self.processor.tokenizer.sep_token_id]
        turns = [Turn("user", "?", False), Turn("assistant", "!", True)]
        text, [(start, end)] = render(self.processor, turns)
        ids = self.processor.tokenizer(text[start:end], add_special_tokens=False)["input_ids"]
        return ids[-1:]

    @torch.no_grad()
    def _generated(
        self, task: str, settings: GenerationConfig, examples: Sequence[Example], images: str | None
    ) -> list[str]:
        rows = [self.row(task, example, images, None) for example in examples]
        if num_cut := sum(row.num_cut > 0 for row in rows):
            log.warning(
                "%d questions of %s were cut to the model's %d positions", num_cut, task, self.reader.max_length
            )
        answers = [""] * len(rows)
        for group in self._groups(rows):
            inputs, _ = self._collate([rows[i] for i in group], left=self.form.continues)
            with self._precision():
                ids = self.form.generate(self.model, self._moved(inputs), settings)
            texts = self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
            for index, text in zip(group, texts, strict=True):
                answers[index] = text.strip()
        return answers

    @torch.no_grad()
    def _ranked(
        self,
        task: str,
        known: Sequence[str] | None,
        batch_size: int,
        examples: Sequence[Example],
        images: str | None,
    ) -> list[str]:
        """The likeliest candidate of each example: of those known for the task, or the letters of its options."""
        answers = []
        for example in examples:
            candidates = known or ascii_uppercase[: len(example.options)]
            pictures, sums = self._pictures(example, images), []
            for start in range(0, len(candidates), batch_size):
                some = candidates[start : start + batch_size]
                sums.append(self._candidate_losses(task, example, pictures, some))
            answers.append(candidates[int(torch.cat(sums).argmin())])
        return answers

    def _candidate_losses(self, task: str, example: Example, pictures: list[Any], candidates: Sequence[str]) -> Tensor:
        """The loss of each candidate as the answer of an example: (C,), summed over its tokens."""
        rows = [self._encoded(task, example, pictures, candidate) for candidate in candidates]
        if any(row.num_cut for row in rows):
            raise ValueError(
                f"row {example.id} of {task}: with its answers it is longer than the model's "
                f"{self.reader.max_length} positions: leave it out, or make its images smaller"
            )
        return self.row_losses(*self._collate(rows))[0]
