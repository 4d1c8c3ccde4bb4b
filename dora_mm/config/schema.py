"""The schemas of configs: one pydantic model per section and per pipeline.

This module holds what several pipelines share; sdxl.py and vl.py hold the rest, and pipelines.py lists all pipelines.
Types are strict (no "8" for 8, no true for 1), unknown keys are errors, and instances are frozen. All defaults are
defined in these modules and nowhere else. In the comments, null is YAML's null, Python's None.
"""

from enum import Enum
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

T = TypeVar("T")
# YAML has only lists, which a strict tuple field would reject; the items remain strict.
Items = Annotated[tuple[T, ...], Field(strict=False)]
Text = Annotated[str, Field(min_length=1)]


class PathKind(Enum):
    """What a key that holds a path is for; `dora_mm.config.paths` checks them."""

    INPUT = "a file or folder that must exist"
    MODEL = "a file or folder that must exist, or the name of a hub repository"
    FOLDER = "a folder that is written to"
    NEW_FOLDER = "a folder that is written to, and must not exist yet"


InputPath = Annotated[Text, PathKind.INPUT]
ModelPath = Annotated[Text, PathKind.MODEL]
OutputFolder = Annotated[Text, PathKind.FOLDER]
NewFolder = Annotated[Text, PathKind.NEW_FOLDER]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=0)]
Backend = Literal["auto", "torch", "triton"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """Base of every section and pipeline config."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _text_has_no_nul(cls, value: T) -> T:
        """No file has a NUL character in its name, and no prompt needs one."""
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and "\0" in text:
                raise ValueError(f"contains a NUL character: {text!r}")
        return value


class OptimizerConfig(Section):
    name: Literal["adamw", "prodigy", "adamw_8bit", "paged_adamw_8bit"] = "adamw"  # 8 bit: of bitsandbytes, on a GPU
    lr: Positive  # learning rate; prodigy finds its own, so set 1.0
    betas: Annotated[tuple[Share, Share], Field(strict=False)] = (0.9, 0.999)  # decay rates of both moments
    eps: Positive = 1e-8  # added to the denominator of the update
    weight_decay: NonNegative = 0.01  # decoupled from the gradient, as in AdamW
    decay_biases: bool = False  # weight decay of biases, too, where those are trained
    magnitude_lr: Positive | None = None  # learning rate of the magnitudes (adamw only); null: same as lr


class ScheduleConfig(Section):
    name: Literal["constant", "cosine", "linear"] = "constant"  # after the warmup
    warmup_steps: Count = 0  # optimizer steps of linear warmup
    warmup_ratio: Share = 0.0  # warmup as a fraction of all steps, instead of warmup_steps


class TrainConfig(Section):
    steps: PositiveInt  # length of the training in optimizer steps
    batch_size: PositiveInt  # examples per micro-batch and process
    gradient_accumulation_steps: PositiveInt = 1  # micro-batches per optimizer step
    max_grad_norm: Positive | None = 1.0  # gradients are clipped to this total norm; null: no clipping
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"  # dtype of autocast; no: without autocast
    gradient_checkpointing: bool = False  # recompute activations in the backward pass, to save memory
    checkpoint_every: Count = 0  # optimizer steps between checkpoints; 0: only at the end and on interruption
    keep_checkpoints: PositiveInt = 2  # how many of the newest checkpoints are kept; older ones are deleted
    log_every: PositiveInt = 10  # optimizer steps between two rows of metrics.jsonl


# A longer training has the same first steps; checkpointing computes the same activations again.
CHANGEABLE = tuple(
    f"train.{key}" for key in ("steps", "checkpoint_every", "keep_checkpoints", "log_every", "gradient_checkpointing")
)


class EpochTrainConfig(TrainConfig):
    """Training settings whose length is given either in optimizer steps or in epochs."""

    steps: PositiveInt | None = None  # type: ignore[assignment]  # optimizer steps; null: epochs is set
    epochs: PositiveInt | None = None  # passes over the data of all tasks; null: steps is set


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


class LearningRates(Section):
    """The candidate learning rates of each method; at least three, so that every method gets a suitable one."""

    # of full fine-tuning; null: it is not compared
    full: Annotated[Items[Positive], Field(min_length=3)] | None = None
    lora: Annotated[Items[Positive], Field(min_length=3)]  # LoRA, at every rank
    dora: Annotated[Items[Positive], Field(min_length=3)]  # DoRA, at every rank

    @field_validator("full", "lora", "dora")
    @classmethod
    def _rates_are_distinct(cls, rates: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if rates is not None and len(set(rates)) < len(rates):
            raise ValueError("names a rate twice")
        return rates


class PipelineConfig(Section):
    """Base of the config of every pipeline."""

    command: ClassVar[str]  # the dora-mm command that runs this pipeline
    # Keys and sections on which the finished steps of a run do not depend; None: a resumed run finds out by itself
    changeable: ClassVar[tuple[str, ...] | None] = ()
    dry_run_lists_missing: ClassVar[bool] = False  # a dry run reports missing files itself, and so may lack any of them
    pipeline: Text  # the recipe that reads this config
    name: Annotated[
        str, Field(pattern=r"^[\w][\w.+-]*$", max_length=200)
    ]  # runs/<name>/<NNN>; left out: the file name without .yaml


# --- checks across sections ------------------------------------------------------------------------------------------


def check_training(
    optimizer: OptimizerConfig, schedule: ScheduleConfig, train: TrainConfig, dtype: str = "float32"
) -> list[str]:
    """Finds contradictions between the sections of a training config.

    Args:
        optimizer: The `optimizer` section.
        schedule: The `schedule` section.
        train: The `train` section; its `steps` must be set.
        dtype: The dtype of the frozen base weights.

    Returns:
        One message per problem, each naming the keys.
    """
    problems = []
    if schedule.warmup_steps and schedule.warmup_ratio:
        problems.append("give either schedule.warmup_steps or schedule.warmup_ratio")
    if schedule.warmup_steps >= train.steps:
        problems.append(f"schedule.warmup_steps ({schedule.warmup_steps}) must be below train.steps ({train.steps})")
    needed = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype, train.mixed_precision)
    if train.mixed_precision != needed:  # float32 adapters on half-precision weights need autocast
        problems.append(f"train.mixed_precision must be {needed} for model.dtype {dtype}, not {train.mixed_precision}")
    if optimizer.name == "prodigy" and optimizer.magnitude_lr is not None:
        problems.append("optimizer.magnitude_lr needs optimizer.name adamw: prodigy finds one rate for all")
    return problems


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


SectionT = TypeVar("SectionT", bound=Section)


def raise_problems(section: SectionT, problems: list[str]) -> SectionT:
    """Ends a model validator of mode "after".

    Returns:
        The section or config, if there are no problems.

    Raises:
        ValueError: There are problems; the message contains all of them.
    """
    if problems:
        raise ValueError("; ".join(problems))
    return section
