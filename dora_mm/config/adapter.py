"""The config section of adapters: which parts of a model are trained, and how. See schema.py for the rules."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from dora_mm.config.schema import AdapterPath, Items, Positive, Section, Share, Text
from dora_mm.config.training import OptimizerConfig
from dora_mm.registries.target_maps import DERIVED_PARTS, TARGET_MAPS, TargetMapRecord
from dora_mm.utils.messages import nearest

EACH_TEXT_ENCODER = "text_encoder"  # how the names of all text encoders of a model begin
TEXT_ENCODERS = "text_encoders"  # in front of a part: that part of every text encoder
ALL_LINEAR = "all-linear"  # instead of a part: the linear layers of all parts of the main network
FROZEN = "frozen"  # the method of parts that are not trained
REGEX = "re:"  # how patterns of paths begin that are regular expressions

EXTRA_WEIGHT_MODULES = (
    "series",
    "parallel",
    "prefix",
)  # methods that change no weight: a module of dora_mm/adapting each


class PartConfig(Section):
    """The settings of one part of the model; those left out are the adapter's and the optimizer's."""

    # full: all weights (of vision-language models the biases, too); frozen: none; null: adapter.method
    method: Literal["dora", "lora", "magnitude", "full", "frozen"] | None = None
    rank: PositiveInt | None = None  # null: adapter.rank
    alpha: Positive | None = None  # null: the same alpha / rank as the adapter's; with scaling sqrt the same alpha
    lr: Positive | None = None  # learning rate; null: optimizer.lr


class AdapterConfig(Section):
    """The adapter settings of every model; a subclass for each kind of model has the names of its parts."""

    full_trains_biases: ClassVar[bool]  # whether method full trains the biases of its layers, and not only weights

    method: Literal["dora", "lora", "magnitude", "full"] = "dora"  # magnitude: without A and B; full: the base weights
    rank: PositiveInt  # rank of A and B
    alpha: Positive = 0.0  # the update is scaled by alpha / rank; left out or null: alpha = rank
    # sqrt: by alpha / sqrt(rank) as in rank-stabilised LoRA; alpha is then given, and the same at all ranks
    scaling: Literal["rank", "sqrt"] = "rank"
    dropout: Share = 0.0  # probability, on the input of A
    norm_grad: Literal["detached", "exact"] = "detached"  # detached: no gradient through the row norm, as in the paper
    cache: Literal["weights", "norms"] = "weights"  # norms: builds W' twice instead of caching it, to save memory
    init_from: AdapterPath | None = None  # the adapter file, or its folder, to start from; null: a fresh adapter
    # The parts of the model: a list of names, or names with settings ({unet.attn: {rank: 4}}); null: those that the
    # target map of its main network has as the default. A name is that of a part; or all-linear, the linear layers of
    # all parts of the main network; or a pattern of paths of modules, such as q_proj or re:.*layers\.0\..*q_proj
    parts: dict[str, PartConfig] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _alpha_is_the_rank(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("alpha") is not None or type(values.get("rank")) is not int:
            return values
        rank = max(values["rank"], 1)  # a bad rank is reported as a rank, once
        if values.get("scaling") == "sqrt":
            raise ValueError(f"scaling sqrt needs alpha: alpha={rank**0.5:.3g} scales the update by 1 at rank {rank}")
        return {**values, "alpha": float(rank)}

    @field_validator("parts", mode="before", json_schema_input_type=dict[str, PartConfig | None] | list[str] | str)
    @classmethod
    def _named_parts(cls, parts: Any) -> Any:
        if parts == ALL_LINEAR:
            parts = [parts]
        if isinstance(parts, list | tuple | dict):
            for name in parts:
                if not isinstance(name, str):
                    raise ValueError(f"the name of a part is text, got {name!r}")
        if isinstance(parts, list | tuple):
            if len(set(parts)) < len(parts):
                raise ValueError("names a part twice")
            parts = dict.fromkeys(parts)
        if not isinstance(parts, dict):
            if parts is not None:
                raise ValueError(f"must be a list of parts, or parts with settings, got {parts!r}")
            return {}
        for name in parts:
            if cls.is_pattern(name) and (similar := _similar(name, (*cls.known_parts(), ALL_LINEAR))):
                known = ", ".join(cls.known_parts())
                raise ValueError(
                    f"there is no part {name!r}{similar}; parts are {known}, {ALL_LINEAR}, or patterns of paths of "
                    f"modules ({REGEX} marks a regular expression)"
                )
        for name in parts:
            if one := next((other for other in parts if _is_one_of(other, name)), None):
                raise ValueError(f"names {one} twice, since {name} means it, too")
        return {name: {} if settings is None else settings for name, settings in parts.items()}

    def all_parts(self, default: Sequence[str] = ()) -> dict[str, PartConfig]:
        """The complete settings of every part, with the alpha that layers and files divide by the rank.

        Args:
            default: The parts where none is configured.
        """
        found = {}
        for name, part in (self.parts or dict.fromkeys(default, PartConfig())).items():
            rank = part.rank or self.rank
            alpha = (part.alpha or self.alpha_at(rank)) * (rank**0.5 if self.scaling == "sqrt" else 1)
            found[name] = part.model_copy(update={"method": part.method or self.method, "rank": rank, "alpha": alpha})
        return found

    def alpha_at(self, rank: int) -> float:
        """The alpha that goes with another rank: for the same alpha / rank; with scaling sqrt the same alpha."""
        return self.alpha if self.scaling == "sqrt" else rank * self.alpha / self.rank

    def trained_parts(self) -> dict[str, PartConfig]:
        """The complete settings of every configured part that is not frozen."""
        return {name: part for name, part in self.all_parts().items() if part.method != FROZEN}

    @classmethod
    @abstractmethod
    def parts_of(cls, record: TargetMapRecord) -> tuple[str, ...]:
        """The names of the parts of a target map; none where it is for models of another kind."""

    @classmethod
    def known_parts(cls) -> tuple[str, ...]:
        """The names of the parts of all target maps, those of other packages among them."""
        return tuple(dict.fromkeys(part for record in TARGET_MAPS.values() for part in cls.parts_of(record)))

    @classmethod
    def is_part(cls, name: str) -> bool:
        """Whether a name of `parts` is that of a part of some target map."""
        return TARGET_MAPS.first(lambda record: name in cls.parts_of(record)) is not None

    @classmethod
    def is_pattern(cls, name: str) -> bool:
        """Whether a name of `parts` is a pattern of paths of modules."""
        return name != ALL_LINEAR and not cls.is_part(name)

    def trained_in(self, start: str) -> tuple[str, ...]:
        """The trained parts whose names begin like this; none where the config names no parts."""
        return tuple(part for part in self.trained_parts() if part.startswith(start))

    @property
    def methods(self) -> set[str]:
        """The methods of all trained parts."""
        return {str(part.method) for part in self.trained_parts().values()} if self.parts else {self.method}


class AssistantConfig(Section):
    """A frozen adapter under the trained one, left out when generating, such as one that undoes a distillation."""

    path: AdapterPath  # the adapter file of any tool, or its folder
    strength: float = 1.0  # its strength in training and in held-out losses
    in_samples: bool = False  # whether contact sheets during the training use it too; the last one never does

    @field_validator("strength")
    @classmethod
    def _is_at_work(cls, strength: float) -> float:
        if strength == 0:
            raise ValueError("must not be 0, at which the assistant has no effect: leave adapter.assistant out")
        return strength


class ImageAdapterConfig(AdapterConfig):
    """The `adapter` section for image models."""

    full_trains_biases: ClassVar[bool] = False

    strength: Positive = (
        1.0  # scales the trained update once: the result is strength 1 of the saved file and of contact sheets
    )
    assistant: AssistantConfig | None = None  # a frozen adapter under the trained one; null: none

    @classmethod
    def parts_of(cls, record: TargetMapRecord) -> tuple[str, ...]:
        if not record.networks:
            return ()
        is_of_encoders = any(network.startswith(EACH_TEXT_ENCODER) for network in record.networks)
        return (*record.names, *(f"{TEXT_ENCODERS}.{part}" for part in record.parts if is_of_encoders))

    @property
    def trains_text_encoders(self) -> bool:
        """Whether the embeddings of prompts change during the training."""
        return bool(self.trained_in(EACH_TEXT_ENCODER))


class VLAdapterConfig(AdapterConfig):
    """The `adapter` section for vision-language models."""

    full_trains_biases: ClassVar[bool] = True

    # series, parallel: bottlenecks of `rank` features behind the MLPs, or parallel to their last two layers; prefix:
    # `rank` virtual tokens in front of all rows, by PEFT
    method: Literal["dora", "lora", "magnitude", "full", "series", "parallel", "prefix"] = "dora"  # type: ignore[assignment]
    # Trained in addition: biases, norms, embeddings, visual_embedding (vl_bart), or patterns of parameter names
    extra_trainable: Items[Text] = ()

    @classmethod
    def parts_of(cls, record: TargetMapRecord) -> tuple[str, ...]:
        return () if record.networks else record.parts

    @classmethod
    def known_parts(cls) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*DERIVED_PARTS, *super().known_parts())))

    @classmethod
    def is_part(cls, name: str) -> bool:
        return name in DERIVED_PARTS or super().is_part(name)

    @property
    def vision_parts(self) -> tuple[str, ...]:
        """The trained parts of the vision tower."""
        return self.trained_in("vision.")

    @property
    def starts_as_base(self) -> bool:
        """Whether the model as the training starts is the model without its adapters, at any later time, too."""
        own = self.init_from or self.extra_trainable or self.method in EXTRA_WEIGHT_MODULES
        return not own and "full" not in self.methods


def _similar(name: str, known: Sequence[str]) -> str:
    """The text ", did you mean ...?" with the part that a name may be the end of, or that is similar; "" if none is.

    Behind the name of a network, only the ends of its parts count: `text_encoder.k_proj` is a pattern.
    """
    if name in known or name.startswith(REGEX):
        return ""
    if ending := next((part for part in known if part.endswith(f".{name}")), None):
        return f", did you mean {ending!r}?"
    front, _, end = name.rpartition(".")
    ends = [part.removeprefix(f"{front}.") for part in known if part.startswith(f"{front}.")]
    return nearest(end, ends).replace("'", f"'{front}.", 1) if ends else nearest(name, known)


def _is_one_of(part: str, name: str) -> bool:
    """Whether a part is that of a text encoder, and the name means that of each."""
    component, _, ending = name.partition(".")
    one, _, own_ending = part.partition(".")
    return component == TEXT_ENCODERS != one and one.startswith(EACH_TEXT_ENCODER) and ending == own_ending


def check_adapter(adapter: AdapterConfig, optimizer: OptimizerConfig) -> list[str]:
    """Finds settings that have no effect with the methods of an adapter; one message per problem, naming the keys."""
    problems, methods = [], adapter.methods
    where = f"adapter.method {adapter.method}" if methods == {adapter.method} else "adapter.parts"
    magnitudes, updates = methods & {"dora", "magnitude"}, methods & {"dora", "lora"}
    if not magnitudes and optimizer.magnitude_lr is not None:
        problems.append(f"optimizer.magnitude_lr has no effect: {where} has no magnitudes")
    if not updates and optimizer.b_lr_ratio != 1:
        problems.append(f"optimizer.b_lr_ratio has no effect: {where} has no A and B")
    if not updates and adapter.scaling != "rank":
        problems.append(f"adapter.scaling has no effect: {where} has no A and B")
    if not updates and adapter.dropout:
        problems.append(f"adapter.dropout has no effect: {where} has no A and B")
    if not magnitudes and adapter.norm_grad != "detached":
        problems.append(f"adapter.norm_grad has no effect: {where} has no magnitudes")
    if adapter.method in EXTRA_WEIGHT_MODULES:
        unused = {
            "parts": adapter.parts,
            "alpha": adapter.alpha != adapter.rank,
            "cache": adapter.cache != "weights",
            "init_from": adapter.init_from,
            "extra_trainable": adapter.extra_trainable if isinstance(adapter, VLAdapterConfig) else (),
        }
        problems += [
            f"adapter.{key} is not for adapter.method {adapter.method}: leave it out" for key in unused if unused[key]
        ]
    rated = [name for name, part in adapter.trained_parts().items() if part.lr is not None]
    if rated and optimizer.name == "prodigy":
        problems.append(f"adapter.parts: the lr of {rated[0]} has no effect: prodigy finds one rate for all")
    return problems
