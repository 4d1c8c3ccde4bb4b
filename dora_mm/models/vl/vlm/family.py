"""The vision-language and language models of transformers: what trainings and comparisons ask of a family."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from dora_mm.config.models import VisionConfig, VLMModelConfig
from dora_mm.config.paths import resolve_model
from dora_mm.config.vl import DecodeConfig
from dora_mm.core import TargetMap
from dora_mm.data.seen import SeenFiles
from dora_mm.data.vl.answers import Answer
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.image_folder import image_path
from dora_mm.data.vl.row_view import RowView
from dora_mm.data.vl.rows import OnBadData
from dora_mm.data.vl.tables import ExampleTable
from dora_mm.models.folders import empty_model, has_weights, identity_of, model_class, read_config, saved_dtype
from dora_mm.models.identity import ModelIdentity
from dora_mm.models.opening import check_revision, commit_of
from dora_mm.models.vl.row_counts import RowCounts
from dora_mm.models.vl.vl_model import RowLengths, Structure, Target, VLModel, weighted_loss
from dora_mm.models.vl.vlm.answers import VLMAnswers
from dora_mm.models.vl.vlm.boxes import box_grid
from dora_mm.models.vl.vlm.chat import chat_template
from dora_mm.models.vl.vlm.encoding import TokenRow
from dora_mm.models.vl.vlm.example_encoder import ExampleEncoder
from dora_mm.models.vl.vlm.forms import form_of
from dora_mm.models.vl.vlm.loading import check_token_ids, completed, load_processor
from dora_mm.models.vl.vlm.network import VLMNetwork, naming
from dora_mm.models.vl.vlm.prompts import FALLBACK_PROMPTS, TEXTS
from dora_mm.models.vl.vlm.videos import FPS, MAX_FRAMES
from dora_mm.models.vl.vlm.view import row_lengths, row_view
from dora_mm.registries.vl_tasks import TASKS
from dora_mm.targets import map_of
from dora_mm.utils.day import Day
from dora_mm.utils.losses import LossSum

LONGEST = 1 << 20  # tokens per row of a model whose config has no limit


@dataclass(frozen=True)
class VLMBatch:
    """Rows of one task.

    Attributes:
        task: Name of the task.
        groups: The rows in groups that are computed together, each as (inputs, labels (G, T), which rows these are
            (G,)).
        weights: The weight of each row (B,).
        examples: Those whose rows these are.
        num_cut: How many of the rows lost text or whole exchanges to `model.max_length`.
        left_out: A sentence on each example that could not be encoded, and is missing here.
        longest: The tokens of the longest row that could be encoded, before it was cut.
    """

    task: str
    groups: tuple[tuple[Mapping[str, Tensor], Tensor, Tensor], ...]
    weights: Tensor = field(default_factory=lambda: torch.zeros(0))
    examples: tuple[Example, ...] = ()
    num_cut: int = 0
    left_out: tuple[str, ...] = ()
    longest: int = 0

    def ids(self, numbers: Tensor) -> list[str]:
        """The ids of the examples of these rows (G,), each once; of pairs, rejected answers come last."""
        return list(dict.fromkeys(self.examples[number % len(self.examples)].id for number in numbers.tolist()))


class VLM:
    """A vision-language model of transformers with its processor, or a decoder language model; implements `VLModel`.

    Args:
        config: The `model` section.
        device: Where its weights are read to.
        day: The day for a chat template that asks for it; None: that of the config.

    Attributes:
        rows: Makes the rows of a training, which have at most `model.max_length` tokens.
        prompts: Makes rows to answer, which are only as short as the model's positions: without its end a question
            asks for something else.
        network: Computes with the weights.
        fallback: What a model without a chat template can read; None for those that have one.
        commit: The commit of a hub model; None for a local one.
        counts: See `VLModel.counts`.
        files: See `VLModel.files`.
        day: See `VLModel.day`.

    Raises:
        ValueError: The model or its processor cannot be loaded; a folder is given with a revision; or its class has
            neither a chat template nor a plain prompt that is known here.
    """

    opens_without_weights: ClassVar[bool] = True
    prepares_batches = True
    question_task = "chat"

    def __init__(self, config: VLMModelConfig, device: torch.device | str = "cpu", day: Day | None = None):
        self.path = resolve_model(config.path)
        check_revision(self.path, config.revision)
        self.model_config: Any = read_config(self.path, config.revision)
        check_token_ids(self.model_config.to_dict())
        self.commit = commit_of(self.path, config.revision)
        self.config = config.model_copy(update={"revision": self.commit})  # all is read of one commit
        self.name = model_class(self.model_config, self.path).__name__  # for messages
        processor: Any = load_processor(self.config, self.model_config)
        self.reads_images = processor.image_processor is not None
        fallback = FALLBACK_PROMPTS.get(self.model_config.model_type) if self.reads_images else TEXTS
        has_template = chat_template(processor) is not None
        self.fallback = None if has_template else fallback
        if self.fallback is None and not has_template:
            raise ValueError(
                f"model.path: {self.path}, a {self.name}, has no chat template, and is none of {list(FALLBACK_PROMPTS)}"
            )
        form = form_of(self.name, self.model_config)
        positions = getattr(self.model_config.get_text_config(), "max_position_embeddings", None) or LONGEST
        limit = min(config.max_length or positions, positions)
        key = "model.max_length" if limit == config.max_length else "the model's positions"
        reads = (processor, self.model_config, form, self.fallback, config.prompts)
        self.files, self.day = SeenFiles(), day or Day(config.date)
        frames = (config.fps or FPS, config.max_frames or MAX_FRAMES, self.files, self.day)
        if (learns_prompts := config.loss_over == "prompts and answers") and not form.continues:
            raise ValueError(f"model.loss_over: {self.name} reads its prompts, but does not write them: leave it out")
        self.rows = ExampleEncoder(*reads, limit, key, *frames, learns_prompts=learns_prompts)
        self.prompts = ExampleEncoder(*reads, positions, "the model's positions", *frames)
        self.network = VLMNetwork(self.config, form, torch.device(device))
        self.counts = RowCounts(limit, self.day)

    @classmethod
    def load(
        cls, config: VLMModelConfig, vision_config: VisionConfig, *, device: torch.device | str = "cpu", **settings: Any
    ) -> VLM:
        return cls(config, device)

    @classmethod
    def interactive_settings(cls, path: str, run: VLMModelConfig | None, given: Mapping[str, str]) -> dict[str, Any]:
        if run is not None:
            return {**given} if resolve_model(run.path) == path else {"revision": None, **given}
        return {**given, "dtype": given.get("dtype") or saved_dtype(path, read_config(path, given.get("revision")))}

    @classmethod
    def is_local(cls, config: VLMModelConfig, vision: VisionConfig) -> bool:
        return has_weights(resolve_model(config.path), config.revision)

    @classmethod
    def structure(cls, config: VLMModelConfig, vision: VisionConfig, *, tower: bool = False) -> Structure:
        empty: Any = empty_model(resolve_model(config.path), config.revision).to(getattr(torch, config.dtype))
        network = VLMNetwork(config, form_of(type(empty).__name__, empty.config), torch.device("meta"))
        network.model = completed(empty)
        return Structure({"model": empty}, {"model": map_of(empty)}, partial(row_losses, network))

    @property
    def model(self) -> Any:
        """The model of transformers, which is loaded on first use."""
        return self.network.model

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"model": self.model}

    @property
    def target_maps(self) -> dict[str, TargetMap]:
        return {"model": map_of(self.model)}

    @property
    def reads_several(self) -> bool:
        return self.fallback is None or self.fallback.images is None

    @property
    def pipeline_tag(self) -> str:
        return "image-text-to-text" if self.reads_images else "text-generation"

    @property
    def converses(self) -> bool:
        return self.fallback is None

    @property
    def nonuniform_reason(self) -> str | None:
        if self.rows.num_groups_differ:
            return f"{self.name} computes the rows of a batch in groups, as many as they differ"
        return None

    def check_in_step(self, task: str, table: ExampleTable, images: str | None) -> None:
        filmed = np.flatnonzero(table.filmed())
        if not len(filmed):
            return
        example = table[int(filmed[0])]
        if self.rows.videos_differ(self.rows.row(task, example, images, None)):
            raise ValueError(
                f"train.shard: {self.name} computes rows with videos in groups, as many as their lengths differ, and "
                f"the processes have to gather a block at the same time: leave it out, or the rows with videos (one is "
                f"{example.id} of {task})"
            )

    @property
    def identity(self) -> ModelIdentity:
        return self._identity

    @cached_property
    def _identity(self) -> ModelIdentity:
        return identity_of(self.path, self.commit)

    def fresh(self, seed: int) -> VLModel:
        return type(self)(self.config, self.network.loads_to, self.day)

    def check(self, tasks: Iterable[str]) -> None:
        for task in tasks:
            record = TASKS[task]
            if record.prompt is None:
                raise ValueError(f"data: the task {task} needs model.family vl_bart, not a model of transformers")
            if record.images and not self.reads_images:
                raise ValueError(f"data: {self.name} reads no images, and the rows of {task} have them")
            if record.kind == "conversations" and self.fallback is None and task in self.config.prompts:
                raise ValueError(f"model.prompts: {task} has no effect, since conversations are read as they are")
            if record.images == 2 and self.fallback and self.fallback.images == 1:
                raise ValueError(f"data: {self.name} reads one image per row, and {task} has two")

    def check_rows(self, table: ExampleTable) -> ExampleTable:
        if not self.reads_images:
            table = table.without(table.lengths("images") > 0, f"has an image, and {self.name} reads none")
        elif "video" not in self.rows.encoder.kinds:
            table = table.without(table.filmed(), f"has a video, and {self.name} reads none")
        if self.fallback is None:
            return table
        if self.reads_images:
            table = table.without(table.lengths("images") == 0, f"has no image, and {self.name} needs one")
        if self.fallback.images == 1:
            table = table.without(table.lengths("images") > 1, f"has several images, and {self.name} reads one")
        marked = table.has("boxes") & (table.lengths("turns") > 0)
        for bad, what in ((table.has("tools"), "tools"), (marked, "boxes in its texts")):
            table = table.without(bad, f"has {what}, and {self.name} has no chat template")
        reason = f"has several turns before its answer, and {self.name} reads one: it has no chat template"
        turns = np.maximum(table.lengths("turns"), table.lengths("rejected"))
        return table.without(turns - table.lengths("answers") > 1, reason)

    def batch(
        self,
        task: str,
        examples: Sequence[Example],
        images: str | None,
        targets: Sequence[Target],
        *,
        on_bad_data: OnBadData = "stop",
    ) -> VLMBatch:
        found, left_out, longest = [], [], 0
        for example, (answer, weight) in zip(examples, targets, strict=True):
            try:
                rows = self.rows.answered(task, example, images, answer)
                longest = max(longest, *(row.length + row.num_cut for row in rows))
                if lost := next((row for row in rows if row.loses_answer), None):
                    left_out.append(f"row {example.id} of {task}: {self._why_left_out(lost)}")
                    continue
                found.append((example, rows, weight))
            except ValueError as error:
                if on_bad_data == "stop":
                    raise ValueError(f"{error}; data.on_bad_data: skip leaves such rows out") from error
                left_out.append(str(error))
        rows = [row for of_answer in zip(*(rows for _, rows, _ in found), strict=True) for row in of_answer]
        groups = [
            (*self.rows.collate([rows[i] for i in group]), torch.tensor(group)) for group in self.rows.groups(rows)
        ]
        weights = torch.tensor([weight for _, _, weight in found])
        kept, num_cut = tuple(example for example, _, _ in found), sum(row.num_cut > 0 for row in rows)
        return VLMBatch(task, tuple(groups), weights, kept, num_cut, tuple(left_out), longest)

    def _why_left_out(self, row: TokenRow) -> str:
        num_tokens = row.num_image_tokens + row.num_image_cut
        images = f"; {num_tokens} of its {row.length + row.num_cut} are images" if num_tokens else ""
        return f"its whole answer is beyond {self.rows.max_length} tokens ({self.rows.limit_from}){images}"

    def row_losses(self, batch: VLMBatch) -> tuple[Tensor, Tensor]:
        self.counts.longest = max(self.counts.longest, batch.longest)
        if torch.is_grad_enabled():  # a validation does not count
            self.counts.add(batch.num_cut, batch.left_out)
        return row_losses(self.network, batch)

    def loss(self, batch: VLMBatch, generator: torch.Generator) -> LossSum:
        return weighted_loss(batch.task, *self.row_losses(batch), batch.weights)

    def lengths(self, task: str, table: ExampleTable, rows: Iterable[int], images: str | None) -> RowLengths:
        return row_lengths(self.rows, task, table, rows, images)

    def row_view(self, task: str, example: Example, images: str | None) -> RowView:
        return row_view(self.rows, task, example, images)

    def content(self, example: Example, images: str | None) -> str:
        return " ".join(self.files.digest(image_path(images, name)) for name in example.images)

    def box_grid(self, size: tuple[int, int]) -> Sequence[int] | None:
        return box_grid(size, self.prompts.processor, self.model_config.model_type)

    def answerer(self, task: str, config: DecodeConfig, candidates: Sequence[str]) -> Answer:
        return VLMAnswers(self.prompts, self.network).answerer(task, config, candidates)


def row_losses(network: VLMNetwork, batch: VLMBatch) -> tuple[Tensor, Tensor]:
    """The losses of the rows of a batch by a network; see `VLModel.row_losses`."""
    if not batch.groups:
        return network.zero_loss().expand(1)[:0], torch.zeros(0, device=network.device)
    found = []
    for inputs, labels, numbers in batch.groups:
        with naming(batch.task, batch.ids(numbers)):
            found.append(network.row_losses(inputs, labels))
    order = torch.argsort(torch.cat([numbers for _, _, numbers in batch.groups])).to(network.device)
    sums, counts = (torch.cat(parts)[order] for parts in zip(*found, strict=True))
    return sums, counts
