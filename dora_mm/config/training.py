"""The config sections of a training: optimizer, schedule, length. See schema.py for the rules."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from dora_mm.config.schema import Count, Items, NonNegative, Positive, Section, Share, name_in
from dora_mm.registries.optimizers import OPTIMIZERS


class OptimizerConfig(Section):
    # 8 bit: of bitsandbytes, on a GPU; adafactor keeps one number per row and column instead of two per parameter
    name: Annotated[str, name_in(OPTIMIZERS)] = "adamw"
    lr: Positive  # learning rate; prodigy finds its own and multiplies it by this, so set 1.0
    b_lr_ratio: Positive = 1.0  # B's rate as a multiple of lr; under Adam it is alpha / rank by another name
    # Decay rates of both moments; null: those of dora_mm/registries/optimizers.py, 0.9 and 0.999 for most
    betas: Annotated[tuple[Share, Share], Field(strict=False)] | None = None
    eps: Positive | None = None  # added to the denominator of the update; null: 1e-8, or what the optimizer has
    weight_decay: NonNegative = 0.01  # decoupled from the gradient, as in AdamW
    decay_biases: bool = False  # weight decay of biases, too, where those are trained
    # Learning rate of all magnitudes (not for prodigy), also of parts that have an lr of their own; null: as A and B
    magnitude_lr: Positive | None = None
    # Further arguments of the optimizer's class, such as {d_coef: 0.5} of prodigy
    options: dict[str, bool | int | float | str | Items[float | None]] = Field(default_factory=dict)


class EMAConfig(Section):
    """Exponential moving average (EMA) of the trained weights, kept in addition to the weights."""

    decay: Share = 0.999  # decay per step, at first less: (1 + step) / (10 + step)


class ScheduleConfig(Section):
    exclusive: ClassVar[tuple[tuple[str, str], ...]] = (("warmup_steps", "warmup_ratio"),)

    # After the warmup; restarts: of cosines; warmup_stable_decay: constant, and a cosine at the end
    name: Literal["constant", "cosine", "linear", "restarts", "polynomial", "warmup_stable_decay"] = "constant"
    warmup_steps: Count = 0  # optimizer steps of linear warmup
    warmup_ratio: Share = 0.0  # warmup as a fraction of all steps, instead of warmup_steps
    cycles: PositiveInt | None = None  # for restarts: the number of cosines; null: 4
    power: Positive | None = None  # for polynomial: the exponent; null: 2
    # of warmup_stable_decay: the decay as a fraction of all steps; null: 0.1
    decay_ratio: Annotated[float, Field(gt=0, le=1)] | None = None


class TrainConfig(Section):
    steps: PositiveInt  # length of the training in optimizer steps
    batch_size: PositiveInt  # examples per micro-batch and process
    gradient_accumulation_steps: PositiveInt = 1  # micro-batches per optimizer step
    max_grad_norm: Positive | None = 1.0  # gradients are clipped to this total norm; null: no clipping
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"  # dtype of autocast; no: without autocast
    gradient_checkpointing: bool = False  # recompute activations in the backward pass to save memory
    compile: bool = False  # torch.compile for the repeated blocks of the trained model, in training steps alone
    checkpoint_every: Count = 0  # optimizer steps between checkpoints; 0: only at the end and on interruption
    keep_checkpoints: PositiveInt = 2  # how many of the newest checkpoints are kept; older ones are deleted
    log_every: PositiveInt = 10  # optimizer steps between two rows of metrics.jsonl, which checkpoints have, too
    # Each of several processes keeps a part of the main network's frozen weights instead of all (docs/gpu.md)
    shard: bool = False
    # What shows the metrics beside metrics.jsonl; null: TensorBoard, where it is installed
    track: Items[Literal["tensorboard", "wandb", "trackio"]] | None = None


class AdapterTrainConfig(TrainConfig):
    """A training of adapters."""

    # Steps after which the gradients of the full weights are measured, for dora-mm analyse
    gradients_at: Items[Count] = ()


class ValidationConfig(Section):
    every: Count = 0  # optimizer steps between validations; 0: only at the end
    # How many validations in a row without a better one end the training; null: it has all of its steps
    patience: PositiveInt | None = None
    # Optimizer steps between measurements of the loss of each image that is trained on, or of each validation row: the
    # page of the training then shows which stay apart; 0: only before the first step and at the end; null: never
    per_example_every: Count | None = None


# A longer training has the same first steps; checkpointing computes the same activations again. Only the rate is one of
# the steps to come: a training that diverged goes on from its last checkpoint with a lower one.
CHANGEABLE = (
    *(f"train.{key}" for key in ("steps", "checkpoint_every", "keep_checkpoints", "log_every", "track")),
    "train.gradient_checkpointing",
    "train.gradients_at",
    "optimizer.lr",
)


# Quantised weights that torch does not divide: torch 2.13 with bitsandbytes 0.50 and torchao 0.18
NOT_SHARDED: Mapping[str | None, str] = {
    "int8": "bitsandbytes' weight of 8 bits is gathered without its scales; use nf4 or fp4",
    "float8": "a weight of it is gathered without its scales; leave it out",
    "torchao_int8": "torchao's weight cannot be split (aten.split); use nf4 or fp4",
}


class EpochTrainConfig(TrainConfig):
    """Training settings whose length is given either in optimizer steps or in epochs."""

    exclusive: ClassVar[tuple[tuple[str, str], ...]] = (("steps", "epochs"),)

    steps: PositiveInt | None = None  # type: ignore[assignment]  # optimizer steps; null: epochs is set
    epochs: PositiveInt | None = None  # passes over all training data; null: steps is set

    @property
    def num_steps(self) -> int:
        """The length in optimizer steps, where epochs were converted to steps."""
        assert self.steps is not None
        return self.steps


def check_validation(evaluate: ValidationConfig, has_valid: bool, missing: str) -> list[str]:
    """Finds settings of validations that have no effect.

    Args:
        evaluate: The `evaluate` section.
        has_valid: Whether there is something to validate on.
        missing: A sentence for when there is not.

    Returns:
        One message per problem, each naming the keys.
    """
    if evaluate.every and not has_valid:
        return [f"evaluate.every has no effect: {missing}"]
    if evaluate.patience and not evaluate.every:
        return ["evaluate.patience has no effect: evaluate.every is 0, so the only validation is at the end"]
    return []


def check_sharding(train: TrainConfig, adapter_cache: str, quantization: str | None = None) -> list[str]:
    """Finds settings with which `train.shard` would gather all weights after all, or compute something else.

    Args:
        train: The `train` section.
        adapter_cache: The key `adapter.cache`.
        quantization: The key `model.quantization`.

    Returns:
        One message per problem, each naming the keys.
    """
    if not train.shard:
        return []
    problems = []
    if adapter_cache != "norms":
        problems.append("train.shard needs adapter.cache norms: else each process keeps all adapted weights whole")
    if train.compile:
        problems.append("train.shard is not for train.compile: compiled blocks were not tried with gathered weights")
    if why := NOT_SHARDED.get(quantization):
        problems.append(f"train.shard is not for model.quantization {quantization}: {why}")
    return problems


def check_training(
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    train: TrainConfig,
    dtype: str = "float32",
    ema: EMAConfig | None = None,
) -> list[str]:
    """Finds contradictions between the sections of a training config.

    Args:
        optimizer: The `optimizer` section.
        schedule: The `schedule` section.
        train: The `train` section.
        dtype: The dtype of the frozen base weights.
        ema: The `ema` section.

    Returns:
        One message per problem, each naming the keys.
    """
    problems = check_rate(optimizer)
    if isinstance(train, EpochTrainConfig) and (train.steps is None) == (train.epochs is None):
        problems.append("give either train.steps or train.epochs")
    if schedule.warmup_steps and schedule.warmup_ratio:
        problems.append("give either schedule.warmup_steps or schedule.warmup_ratio")
    if train.steps is not None and schedule.warmup_steps >= train.steps:  # a number of epochs tells it only later
        problems.append(
            f"schedule.warmup_steps ({schedule.warmup_steps}) must be below train.steps ({train.steps}): set fewer, or "
            "schedule.warmup_ratio"
        )
    needed = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype, train.mixed_precision)
    if train.mixed_precision != needed:  # float32 adapters on half-precision weights need autocast
        problems.append(
            f"train.mixed_precision must be {needed} for model.dtype {dtype}, not {train.mixed_precision}: "
            f"--set train.mixed_precision={needed}"
        )
    if isinstance(train, AdapterTrainConfig):
        problems += check_measured_steps(train)
    if optimizer.name == "prodigy":
        rates = {"magnitude_lr": optimizer.magnitude_lr is not None, "b_lr_ratio": optimizer.b_lr_ratio != 1}
        problems += [
            f"optimizer.{key} needs optimizer.name adamw: prodigy finds one rate for all" for key in rates if rates[key]
        ]
    if optimizer.name == "schedule_free" and schedule.name != "constant":
        problems.append(f"optimizer.name schedule_free needs schedule.name constant, not {schedule.name}")
    if optimizer.name == "schedule_free" and ema:
        problems.append("ema is not for optimizer.name schedule_free, whose result is an average already: leave it out")
    owners = {"cycles": "restarts", "power": "polynomial", "decay_ratio": "warmup_stable_decay"}
    problems += [
        f"schedule.{key} has no effect: it is of schedule.name {owner}"
        for key, owner in owners.items()
        if getattr(schedule, key) is not None and schedule.name != owner
    ]
    return problems


def check_rate(optimizer: OptimizerConfig) -> list[str]:
    """Finds a learning rate that is one of other optimizers, as after `--set optimizer.name=...` alone."""
    record, name, lr = OPTIMIZERS[optimizer.name], optimizer.name, optimizer.lr
    if record.least_lr <= lr < record.most_lr:
        return []
    what = "learns nothing below" if lr < record.least_lr else "destroys the weights from"
    bound = f"{record.least_lr:g}" if lr < record.least_lr else f"{record.most_lr:g} on"
    return [
        f"optimizer.lr {lr:g} is a rate of other optimizers: {name} {what} {bound}: --set optimizer.lr={record.lr:g}"
    ]


def check_measured_steps(train: AdapterTrainConfig) -> list[str]:
    """Finds why gradients cannot be measured at the steps that `train` names."""
    problems = [
        f"train.gradients_at is not for train.{key}, whose layers have no whole weights and gradients to measure"
        for key, is_on in (("compile", train.compile), ("shard", train.shard))
        if train.gradients_at and is_on
    ]
    if train.steps is not None and (late := [step for step in train.gradients_at if step >= train.steps]):
        problems.append(f"train.gradients_at: a training of {train.steps} steps has no step {late[0]}: they begin at 0")
    return problems
