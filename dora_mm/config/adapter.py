"""The config section of adapters: which parts of a model are trained, and how. See schema.py for the rules."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from dora_mm.config.report import nearest
from dora_mm.config.schema import InputPath, Items, Positive, Section, Share, Text
from dora_mm.config.training import OptimizerConfig


class AnyAdapterConfig(Section):
    """The adapter settings of every architecture; each architecture adds the `parts` of its target map."""

    method: Literal["dora", "lora", "magnitude", "full"] = "dora"  # magnitude: without A and B; full: the base weights
    rank: PositiveInt  # rank of A and B
    alpha: Positive = 0.0  # the update is scaled by alpha / rank; left out or null: alpha = rank, set below
    dropout: Share = 0.0  # probability, on the input of A
    norm_grad: Literal["detached", "exact"] = "detached"  # detached: no gradient through the row norm, as in the paper
    cache: Literal["weights", "norms"] = "weights"  # norms: builds W' twice instead of caching it, to save memory
    init_from: InputPath | None = None  # the adapter file, or its folder, to start from; null: a fresh adapter

    @model_validator(mode="before")
    @classmethod
    def _alpha_is_the_rank(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("alpha") is None and type(values.get("rank")) is int:
            return {**values, "alpha": float(max(values["rank"], 1))}  # a bad rank is reported as a rank, once
        return values

    @field_validator("parts", check_fields=False)
    @classmethod
    def _parts_are_distinct(cls, parts: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(parts)) < len(parts):
            raise ValueError("names a part twice")
        return parts


class AdapterConfig(AnyAdapterConfig):
    # The adapted parts of the UNet: self-attention, cross-attention, feed-forward layers, convolutions.
    parts: Annotated[Items[Literal["attn", "cross", "ff", "conv"]], Field(min_length=1)] = ("attn", "cross")
    text_encoders: bool = False  # whether to adapt the attention of both text encoders, too
    strength: Positive = 1.0  # scales the trained update once: the result is strength 1 of the saved file and of sheets


PARTS = (  # of all target maps of vision-language models
    *("text.attn", "text.mlp", "vision.attn", "vision.mlp", "connector", "cross"),
    *("text.qv", "text.ko", "cross.qv", "cross.ko"),  # of vl_bart, instead of text.attn and cross
)


class PartConfig(Section):
    """The settings of one part of the model; those left out are the adapter's and the optimizer's."""

    # full: its weights and biases themselves; frozen: nothing; null: adapter.method
    method: Literal["dora", "lora", "magnitude", "full", "frozen"] | None = None
    rank: PositiveInt | None = None  # null: adapter.rank
    alpha: Positive | None = None  # null: the same alpha / rank as the adapter's
    lr: Positive | None = None  # learning rate; null: optimizer.lr


class VLAdapterConfig(AnyAdapterConfig):
    # The parts of the model: a list of names, or names with settings ({text.attn: {rank: 4}}); null: those that its
    # target map has as the default
    parts: dict[str, PartConfig] = Field(default_factory=dict)
    # Trained in addition: biases, norms, embeddings, visual_embedding (vl_bart), or patterns of parameter names
    extra_trainable: Items[Text] = ()

    @field_validator("parts", mode="before")
    @classmethod
    def _named_parts(cls, parts: Any) -> Any:
        if isinstance(parts, list | tuple):
            if len(set(map(str, parts))) < len(parts):
                raise ValueError("names a part twice")
            parts = dict.fromkeys(parts)
        if not isinstance(parts, dict):
            return {} if parts is None else parts
        if unknown := [str(name) for name in parts if name not in PARTS]:
            name, known = unknown[0], ", ".join(PARTS)
            raise ValueError(f"there is no part {name!r}{nearest(name, PARTS)}; parts are {known}")
        return {name: {} if settings is None else settings for name, settings in parts.items()}

    @property
    def vision_parts(self) -> tuple[str, ...]:
        """The trained parts of the vision tower."""
        return tuple(part for part in self.trained_parts() if part.startswith("vision."))

    def trained_parts(self, default: Sequence[str] = ()) -> dict[str, PartConfig]:
        """The complete settings of every part that is not frozen; `default`: the parts where none is configured."""
        scaling = self.alpha / self.rank
        found = {}
        for name, part in (self.parts or dict.fromkeys(default, PartConfig())).items():
            rank = part.rank or self.rank
            method = part.method or self.method
            alpha = part.alpha or rank * scaling
            if method != "frozen":
                found[name] = part.model_copy(update={"method": method, "rank": rank, "alpha": alpha})
        return found


def check_adapter(adapter: AnyAdapterConfig, optimizer: OptimizerConfig) -> list[str]:
    """Finds settings that have no effect with `adapter.method`; one message per problem, each naming the keys."""
    problems = []
    if adapter.method in ("lora", "full") and optimizer.magnitude_lr is not None:
        problems.append(f"optimizer.magnitude_lr has no effect: adapter.method {adapter.method} has no magnitudes")
    if adapter.method in ("magnitude", "full") and adapter.dropout:
        problems.append(f"adapter.dropout has no effect: adapter.method {adapter.method} has no A and B")
    if adapter.method in ("lora", "full") and adapter.norm_grad != "detached":
        problems.append(f"adapter.norm_grad has no effect: adapter.method {adapter.method} has no magnitudes")
    return problems
