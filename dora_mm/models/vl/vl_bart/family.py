"""The losses of VL-BART's tasks, and their batches. Prompts and lengths are in the tasks' records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import BartTokenizer
from transformers.models.bart.modeling_bart import shift_tokens_right

from dora_mm.config.models import VisionConfig, VLBartModelConfig
from dora_mm.config.paths import resolve_model
from dora_mm.config.vl import DecodeConfig
from dora_mm.core import TargetMap
from dora_mm.data.features.sources import open_features
from dora_mm.data.seen import SeenFiles
from dora_mm.data.vl.answers import Answer
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.needed import found_features
from dora_mm.data.vl.readers.video import split_subtitles
from dora_mm.data.vl.row_view import Piece, RowView
from dora_mm.data.vl.rows import OnBadData
from dora_mm.data.vl.tables import ExampleTable
from dora_mm.models.hub import local_copy
from dora_mm.models.identity import ModelIdentity, digests_of
from dora_mm.models.vl.row_counts import RowCounts
from dora_mm.models.vl.towers.tower import load_tower, tower_map
from dora_mm.models.vl.vl_bart.answering import Answerer
from dora_mm.models.vl.vl_bart.loading import empty_vl_bart, load_vl_bart
from dora_mm.models.vl.vl_bart.model import VLBart, VLInputs, token_log_likelihood
from dora_mm.models.vl.vl_bart.text import bart_text, encode_inputs, encode_targets
from dora_mm.models.vl.vl_bart.visual_inputs import VisionEncoder
from dora_mm.models.vl.vl_model import Structure, Target, VLModel, likeliest_answer, weighted_loss
from dora_mm.registries.vl_tasks import TASKS
from dora_mm.targets import find
from dora_mm.utils.day import Day
from dora_mm.utils.digest import module_digest
from dora_mm.utils.losses import LossSum

VISION = "vision"  # the component of the tower


@dataclass(frozen=True)
class VLBatch:
    """Rows of one task, each with one target answer."""

    task: str
    inputs: VLInputs
    targets: Tensor  # (B, T) ids, padded
    weights: Tensor  # weight of each row's loss (B,): the score of its answer


class VLBartModel:
    """A VL-BART with its tokenizer and vision encoder; implements `VLModel`.

    Args:
        model: The VL-BART.
        tokenizer: Its tokenizer.
        vision: Encodes the images, or reads their features.
        config: The sections of the config that they were loaded from; without them there is no `fresh`.
    """

    opens_without_weights: ClassVar[bool] = False
    question_task = "vqa"
    pipeline_tag = "visual-question-answering"
    reads_images = True
    reads_several = converses = False
    prepares_batches = False  # the vision tower encodes the images of a batch

    def __init__(
        self,
        model: VLBart,
        tokenizer: BartTokenizer,
        vision: VisionEncoder,
        config: tuple[VLBartModelConfig, VisionConfig] | None = None,
    ):
        self.model, self.tokenizer, self.vision, self.config = model, tokenizer, vision, config
        # of the weights as they were loaded: an adapter changes them
        weights = {"base_digest": module_digest(model), "vision_digest": vision.identity}
        folder = local_copy(resolve_model(config[0].path)) if config else None
        self.identity = ModelIdentity(weights, digests_of(folder) if folder else {})
        self.day = Day()  # which nothing asks for
        self.counts = RowCounts()  # all 0: texts have the lengths of their task, which count as no cut

    @classmethod
    def load(
        cls,
        config: VLBartModelConfig,
        vision_config: VisionConfig,
        *,
        seed: int,
        trained_tower: bool = False,
        device: torch.device | str = "cpu",
        vision: VisionEncoder | None = None,
    ) -> VLBartModel:
        """Loads the model and its vision encoder.

        Args:
            config: The `model` section.
            vision_config: The `vision` section.
            seed: Seed of the weights that no file holds.
            trained_tower: The tower is adapted, so its outputs must not be kept from one step to the next.
            device: Where they compute.
            vision: The vision encoder, if it is loaded already.

        Raises:
            ValueError: One of them cannot be loaded, or they do not fit; the message names the key.
        """
        vision = vision or VisionEncoder(vision_config, seed=seed, trained=trained_tower)
        if config.feature_dim not in (None, vision.feature_dim):
            raise ValueError(
                f"model.feature_dim is {config.feature_dim}, but vision gives {vision.feature_dim} channels"
            )
        model: Any
        model, tokenizer = load_vl_bart(config, vision.feature_dim, seed)
        return cls(model.to(device), tokenizer, vision.to(device), (config, vision_config))

    @classmethod
    def interactive_settings(cls, path: str, run: VLBartModelConfig | None, given: Mapping[str, str]) -> dict[str, Any]:
        if given:
            raise ValueError(f"--dtype and --revision are not for {path}, a VL-BART")
        if run is None:
            raise ValueError(
                f"{path} is a VL-BART, whose vision tower only a run of its own names: give one by --adapter"
            )
        return {}

    @classmethod
    def is_local(cls, config: VLBartModelConfig, vision: VisionConfig) -> bool:
        copy = local_copy(resolve_model(config.path))
        return copy is not None and len(found_features(vision)) == len(vision.features)

    @classmethod
    def structure(cls, config: VLBartModelConfig, vision: VisionConfig, *, tower: bool = False) -> Structure:
        with torch.device("meta"):
            features = found_features(vision)
            dim = open_features(features).dim if features else config.feature_dim
            trunk: Any = load_tower(vision.model_copy(update={"pretrained": None})) if tower or dim is None else None
            network = empty_vl_bart(config, trunk.feature_dim if dim is None else dim)
        networks = {"model": network} | ({VISION: trunk} if tower else {})
        return Structure(networks, vl_bart_maps(trunk if tower else None))

    def fresh(self, seed: int) -> VLModel:
        assert self.config is not None
        config, vision = self.config
        depends_on_seed = self.vision.trained or (vision.pretrained is None and not vision.features)
        return VLBartModel.load(
            config,
            vision,
            seed=seed,
            trained_tower=self.vision.trained,
            device=self.model.device,
            vision=None if depends_on_seed else self.vision,
        )

    @property
    def networks(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {"model": self.model}
        return found if self.vision.tower is None else {**found, VISION: self.vision.tower}

    @property
    def target_maps(self) -> dict[str, TargetMap]:
        return vl_bart_maps(self.vision.tower)

    def check_in_step(self, task: str, table: ExampleTable, images: str | None) -> None:
        raise ValueError(f"train.shard: {self.nonuniform_reason}: leave it out")

    @property
    def nonuniform_reason(self) -> str:
        return "VL-BART, which fits on any GPU, runs its encoder and its decoder as networks of their own"

    @property
    def files(self) -> SeenFiles:
        return self.vision.files

    def check_rows(self, table: ExampleTable) -> ExampleTable:
        return self.vision.check_rows(table)

    def lengths(self, task: str, table: ExampleTable, rows: Iterable[int], images: str | None) -> None:
        return None

    @torch.no_grad()
    def row_view(self, task: str, example: Example, images: str | None) -> RowView:
        batch = self.batch(task, [example], images, [(likeliest_answer(example), 1.0)])
        ids, targets = batch.inputs.input_ids[0], batch.targets[0]
        visual = self.num_visual_tokens(batch.inputs.visual_features)
        heading = f"{len(ids) + visual:,} tokens, {visual:,} for images, {len(targets):,} with loss"
        read, written = self.tokenizer.batch_decode([ids.tolist(), targets.tolist()])
        pieces = [Piece(read), Piece(f"<visual> x {visual}", is_image=True)]
        return RowView(heading, pieces, [Piece(written, learned=True)])

    def content(self, example: Example, images: str | None) -> str:
        return " ".join(self.vision.digest(name, images) for name in example.images)

    def box_grid(self, size: tuple[int, int]) -> None:
        return None

    def answerer(self, task: str, config: DecodeConfig, candidates: Sequence[str]) -> Answer:
        answer = Answerer(self.model, self.tokenizer, task, config, candidates)
        return lambda examples, images: answer(self.inputs(task, examples, images))

    def check(self, tasks: Iterable[str]) -> None:
        """Checks that the model was built for these tasks and their visual input.

        Raises:
            ValueError: VL-BART has no prompt for a task, or reads clips and a task has images, or the other way round.
        """
        reads_clips = self.model.config.pooled_side is None
        for task in tasks:
            if TASKS[task].bart is None:
                raise ValueError(f"data: the task {task} needs a model of transformers (model.family vlm), not VL-BART")
            if TASKS[task].clips != reads_clips:
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
        if TASKS[task].clips:
            before, texts = zip(*(split_subtitles(example.text) for example in examples), strict=True)
            if bart_text(task).subtitles_only:
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

    def batch(
        self,
        task: str,
        examples: Sequence[Example],
        images: str | None,
        targets: Sequence[Target],
        *,
        on_bad_data: OnBadData = "stop",
    ) -> VLBatch:
        """Builds a training batch.

        Args:
            task: Name of the task.
            examples: B examples.
            images: The folder of the images; not used if precomputed features are read.
            targets: The answer to learn of each.
            on_bad_data: No row is left out here: those that cannot be read are found before a training.

        Raises:
            ValueError: As `inputs`.
        """
        answers, weights = zip(*targets, strict=True)
        device = self.model.device
        max_positions = self.model.config.max_position_embeddings
        ids = encode_targets(self.tokenizer, task, answers, max_positions=max_positions).to(device)
        return VLBatch(task, self.inputs(task, examples, images), ids, torch.tensor(weights, device=device))

    def row_losses(self, batch: VLBatch) -> tuple[Tensor, Tensor]:
        config = self.model.config
        pad = config.pad_token_id
        shifted = shift_tokens_right(batch.targets, pad, config.decoder_start_token_id)
        logits = self.model(*batch.inputs, decoder_input_ids=shifted, use_cache=False).logits
        return -token_log_likelihood(logits, batch.targets, pad).sum(-1), (batch.targets != pad).sum(-1)

    def loss(self, batch: VLBatch, generator: torch.Generator) -> LossSum:
        return weighted_loss(batch.task, *self.row_losses(batch), batch.weights)


def vl_bart_maps(tower: nn.Module | None) -> dict[str, TargetMap]:
    """The target maps of a VL-BART and, where its tower is a vision transformer, of the tower."""
    name = tower_map(tower) if tower is not None else None
    return {"model": find("bart")} | ({VISION: find(name)} if name else {})
