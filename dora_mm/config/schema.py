"""What a config may say: one pydantic model per section and per pipeline.

Here stands what several pipelines share; sdxl.py and vl.py hold the rest, and pipelines.py names them all.
Types are strict (no "8" for 8, no true for 1), unknown keys are errors, and instances are frozen. Defaults stand here
and there, and nowhere else.
"""

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

T = TypeVar("T")
# YAML has lists only, and a strict tuple takes tuples only; the items stay strict.
Items = Annotated[tuple[T, ...], Field(strict=False)]
Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=0)]
Backend = Literal["auto", "torch", "triton"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """Base of every section and pipeline config."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class OptimizerConfig(Section):
    name: Literal["adamw", "prodigy"] = "adamw"
    lr: Positive  # prodigy finds its own rate: 1.0
    betas: Annotated[tuple[Share, Share], Field(strict=False)] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.01
    magnitude_lr: Positive | None = None  # the magnitudes in a group of their own; None: lr


class ScheduleConfig(Section):
    name: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: Count = 0
    warmup_ratio: Share = 0.0  # of all steps, in place of warmup_steps


class TrainConfig(Section):
    steps: PositiveInt  # optimizer steps
    batch_size: PositiveInt
    gradient_accumulation_steps: PositiveInt = 1  # batches per optimizer step
    max_grad_norm: Positive | None = 1.0  # None: no clipping
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    checkpoint_every: Count = 0  # 0: only at the end and on interruption
    keep_checkpoints: PositiveInt = 2  # older ones are deleted
    log_every: PositiveInt = 10


class EpochTrainConfig(TrainConfig):
    """The length of a training in steps or in epochs."""

    steps: PositiveInt | None = None  # type: ignore[assignment]  # optimizer steps; or else:
    epochs: PositiveInt | None = None  # passes over the data of all tasks


class AnyAdapterConfig(Section):
    """What adapters of every architecture have in common; each adds the `parts` of its target map."""

    method: Literal["dora", "lora", "magnitude", "full"] = "dora"
    rank: PositiveInt
    alpha: Positive = 0.0  # left out or null: the rank, filled in below
    dropout: Share = 0.0
    norm_grad: Literal["detached", "exact"] = "detached"
    cache: Literal["weights", "norms"] = "weights"  # norms: builds W' twice instead of keeping it, for less memory
    init_from: Text | None = None  # an adapter file or its folder to go on from

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


class LearningRates(Section):
    """Each method's candidates; at least three, so that no method is judged at another's rate."""

    full: Annotated[Items[Positive], Field(min_length=3)]
    lora: Annotated[Items[Positive], Field(min_length=3)]
    dora: Annotated[Items[Positive], Field(min_length=3)]

    @field_validator("full", "lora", "dora")
    @classmethod
    def _rates_are_distinct(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(rates)) < len(rates):
            raise ValueError("names a rate twice")
        return rates


class PipelineConfig(Section):
    command: ClassVar[str]  # the dora-mm command that runs it
    pipeline: Text
    name: Annotated[str, Field(pattern=r"^[\w][\w.+-]*$")]  # runs/<name>/<NNN>; left out: the file name without .yaml


# --- checks across sections ------------------------------------------------------------------------------------------


def check_training(
    optimizer: OptimizerConfig, schedule: ScheduleConfig, train: TrainConfig, dtype: str = "float32"
) -> list[str]:
    """What contradicts itself between the sections of a training run, as sentences that name the keys."""
    problems = []
    if schedule.warmup_steps and schedule.warmup_ratio:
        problems.append("give either schedule.warmup_steps or schedule.warmup_ratio")
    if schedule.warmup_steps >= train.steps:
        problems.append(f"schedule.warmup_steps ({schedule.warmup_steps}) must be below train.steps ({train.steps})")
    needed = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype, train.mixed_precision)
    if train.mixed_precision != needed:  # float32 adapters over half weights compute under autocast
        problems.append(f"train.mixed_precision must be {needed} for model.dtype {dtype}, not {train.mixed_precision}")
    if optimizer.name == "prodigy" and optimizer.magnitude_lr is not None:
        problems.append("optimizer.magnitude_lr is for adamw: prodigy finds one rate for all")
    return problems


def check_adapter(adapter: AnyAdapterConfig, optimizer: OptimizerConfig) -> list[str]:
    """Settings that the method has no use for, as sentences that name the keys."""
    problems = []
    if adapter.method in ("lora", "full") and optimizer.magnitude_lr is not None:
        problems.append(f"optimizer.magnitude_lr has nothing to train: {adapter.method} has no magnitudes")
    if adapter.method in ("magnitude", "full") and adapter.dropout:
        problems.append(f"adapter.dropout has nothing to drop: {adapter.method} has no A and B")
    if adapter.method in ("lora", "full") and adapter.norm_grad != "detached":
        problems.append(f"adapter.norm_grad has no norm to act on: {adapter.method} has no magnitudes")
    return problems


ConfigT = TypeVar("ConfigT", bound=PipelineConfig)


def raise_problems(config: ConfigT, problems: list[str]) -> ConfigT:
    """Ends an after-validator: one error that holds every problem, or the config itself."""
    if problems:
        raise ValueError("; ".join(problems))
    return config
