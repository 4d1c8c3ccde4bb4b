"""What a config may say: one pydantic model per section and per pipeline.

Sections first, pipelines after them; those of the vision-language side are in vl.py, and pipelines.py names them all.
Types are strict (no "8" for 8, no true for 1), unknown keys are errors, and instances are frozen. Defaults stand here
and there, and nowhere else.
"""

import re
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
PixelSize = Annotated[int, Field(ge=16, le=8192, multiple_of=8)]  # 8 pixels to a latent of SDXL's VAE


def bucket_step(resolution: int) -> int:
    """Sides of training pictures: multiples of 64 as in SDXL's pretraining, of 32 (its coarsest cell) below 512."""
    return 64 if resolution >= 512 else 32


class Section(BaseModel):
    """Base of every section and pipeline config."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


# --- sections that several pipelines share ---------------------------------------------------------------------------


class ModelConfig(Section):
    path: Text  # a folder, a hub name, or one .safetensors checkpoint
    vae: Text | None = None  # another VAE in place of the model's own (folder or hub name)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the frozen weights; adapters are float32


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
    warmup_share: Share = 0.0  # of all steps, in place of warmup_steps


class TrainConfig(Section):
    steps: PositiveInt  # optimizer steps
    batch_size: PositiveInt
    accumulation: PositiveInt = 1  # batches per optimizer step
    max_grad_norm: Positive | None = 1.0  # None: no clipping
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    checkpoint_every: Count = 0  # 0: only at the end and on interruption
    keep_checkpoints: PositiveInt = 2  # older ones are deleted
    log_every: PositiveInt = 10


# --- SDXL ------------------------------------------------------------------------------------------------------------


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


class AdapterConfig(AnyAdapterConfig):
    parts: Annotated[Items[Literal["attn", "cross", "ff", "conv"]], Field(min_length=1)] = ("attn", "cross")
    text_encoders: bool = False  # adapt both text encoders' attention as well


class DataConfig(Section):
    folder: Text  # images with metadata.jsonl, <name>.txt files, or neither
    resolution: PixelSize  # the area is about resolution x resolution; the shape follows the image
    instance_prompt: Text | None = None  # the caption of images that have none
    placeholder: Text | None = None  # a word that at least one caption must hold, such as TOK
    repeats: PositiveInt = 1
    background: Text = "white"  # transparent images are composed on it: a colour name or #rrggbb
    flip: bool = False
    crop: Literal["center", "random"] = "center"
    caption_dropout: Share = 0.0
    unconditional: Literal["zeros", "empty"] = "zeros"  # what a dropped caption becomes; zeros is SDXL's own meaning
    latent_cache: Text | None = None  # a folder that keeps latents between runs; None: in memory

    @field_validator("resolution")
    @classmethod
    def _resolution_is_a_bucket(cls, resolution: int) -> int:
        if resolution % bucket_step(resolution):
            raise ValueError(f"must be a multiple of 64 from 512 on and of 32 below, got {resolution}")
        return resolution

    @field_validator("placeholder")
    @classmethod
    def _placeholder_is_a_word(cls, placeholder: str | None) -> str | None:
        if placeholder is not None and not re.fullmatch(r"\S+", placeholder):
            raise ValueError(f"must be one word, got {placeholder!r}")
        return placeholder

    @field_validator("background")
    @classmethod
    def _background_is_a_colour(cls, background: str) -> str:
        from PIL import ImageColor

        try:
            ImageColor.getrgb(background)
        except ValueError:
            raise ValueError(f"must be a colour such as white or #ffffff, got {background!r}") from None
        return background


class LossConfig(Section):
    type: Literal["mse", "huber", "l1"] = "mse"
    min_snr_gamma: Positive | None = 5.0  # None: every timestep weighs the same
    noise_offset: NonNegative = 0.0
    timestep_bias: Annotated[float, Field(gt=-1)] = 0.0  # times are drawn with a density of t^bias; 0: evenly


class SheetConfig(Section):
    """Pictures that a training run draws."""

    prompts: Items[Text] = ()  # none: no pictures
    negative_prompt: str | None = None
    seeds: Annotated[Items[Seed], Field(min_length=1)] = (0,)
    every: Count = 0  # steps; 0: only at the end
    steps: PositiveInt = 25
    guidance: NonNegative = 5.0
    batch_size: PositiveInt = 1


class SampleConfig(SheetConfig):
    strength: float = 1.0
    before_after: bool = True  # the sheet shows the bare model beside the adapter


class AdapterFile(Section):
    path: Text
    strength: float = 1.0


# --- pipelines: `command` is the dora-mm command that runs them ------------------------------------------------------


class PipelineConfig(Section):
    command: ClassVar[str]
    pipeline: Text
    name: Annotated[str, Field(pattern=r"^[\w][\w.+-]*$")]  # runs/<name>/<NNN>; left out: the file name without .yaml


class TrainSDXLConfig(PipelineConfig):
    command: ClassVar[str] = "train"
    pipeline: Literal["train_sdxl"]
    seed: Seed = 0
    output: Text | None = None  # the run directory, refused if it exists; None: runs/<name>/<NNN>
    backend: Backend = "auto"  # which implementation of the layer runs, see dora_mm/backend.py
    model: ModelConfig
    adapter: AdapterConfig
    data: DataConfig
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    sample: SampleConfig = SampleConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> "TrainSDXLConfig":
        problems = check_training(self.optimizer, self.schedule, self.train, self.model.dtype)
        problems += check_adapter(self.adapter, self.optimizer)
        if self.adapter.method == "full" and self.model.dtype != "float32":
            problems.append("adapter.method full trains the weights themselves, so model.dtype must be float32")
        if self.data.latent_cache is not None and self.data.crop == "random":
            problems.append("data.latent_cache keeps nothing for data.crop random, which is a new crop every time")
        if self.sample.every and not self.sample.prompts:
            problems.append("sample.every has nothing to draw: sample.prompts is empty")
        if self.adapter.method == "full" and self.sample.strength != 1.0:
            problems.append("sample.strength must be 1 for adapter.method full: weights trained whole keep no base")
        return raise_problems(self, problems)


class SampleSDXLConfig(PipelineConfig):
    command: ClassVar[str] = "sample"
    pipeline: Literal["sample_sdxl"]
    output: Text | None = None  # as in training
    backend: Backend = "auto"
    model: ModelConfig
    adapter: AdapterFile | None = None
    prompts: Items[Text] = ()
    prompts_file: Text | None = None  # .txt (one a line), .jsonl or .csv (a column `prompt`)
    negative_prompt: str | None = None
    seeds: Annotated[Items[Seed], Field(min_length=1)] = (0,)
    steps: PositiveInt = 25
    guidance: NonNegative = 5.0
    height: PixelSize | None = None  # None: the model's own
    width: PixelSize | None = None
    batch_size: PositiveInt = 1
    strengths: Items[float] = ()  # columns of the sheet, times the adapter's own strength; none: 1
    images: bool = True  # one PNG per picture
    sheet: bool = True  # one labelled sheet of all, with a column "no adapter"

    @model_validator(mode="after")
    def _says_what_to_draw(self) -> "SampleSDXLConfig":
        problems = []
        if bool(self.prompts) == (self.prompts_file is not None):
            problems.append("give either prompts or prompts_file")
        if self.strengths and not self.adapter:
            problems.append("strengths needs an adapter")
        if not (self.images or self.sheet):
            problems.append("images and sheet are both false, so nothing would be drawn")
        return raise_problems(self, problems)


class PretrainStage(Section):
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig


class DecoderStage(PretrainStage):
    max_time: PositiveInt = 150  # of the scheduler's 1000: up to where latents are noised


class TinyModelConfig(Section):
    resolution: PixelSize = 128
    num_merges: Annotated[int, Field(ge=0, le=4096)] = 2000  # of CLIP's byte-pair merges: the vocabulary
    vae_channels: Annotated[Items[PositiveInt], Field(min_length=2)] = (16, 32, 64, 64)  # a level each; halves the side
    # SDXL has 4. At 48 numbers to one, a VAE this small gives up colour before it gives up shapes: 8 keep both.
    latent_channels: PositiveInt = 8
    unet_channels: Annotated[tuple[PositiveInt, PositiveInt, PositiveInt], Field(strict=False)] = (48, 96, 128)


class PretrainTinyConfig(PipelineConfig):
    """The embedded model from nothing: its VAE, then text encoders and UNet, then the decoder once more."""

    command: ClassVar[str] = "train"
    pipeline: Literal["pretrain_tiny"]
    seed: Seed = 0
    output: Text | None = None
    icons: Text = "build/icons"  # what build_samples made
    model: TinyModelConfig = TinyModelConfig()
    vae_from: Text | None = None  # a model folder whose VAE is taken; None: it is trained
    unet_from: Text | None = None  # a model folder whose UNet and text encoders are trained further; None: from nothing
    vae: PretrainStage
    unet: PretrainStage
    decoder: DecoderStage | None = None  # the VAE's decoder learns to read latents as the UNet leaves them; None: not
    loss: LossConfig = LossConfig()
    caption_dropout: Share = 0.1
    unnamed_style: Share = 0.75  # of the flat icons, whose captions do not say so: flat is what it draws by default
    ema_decay: Share = 0.999
    sample: SheetConfig = SheetConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> "PretrainTinyConfig":
        problems = []
        stages = {"vae": self.vae, "unet": self.unet} | ({"decoder": self.decoder} if self.decoder else {})
        for name, stage in stages.items():
            problems += check_training(stage.optimizer, stage.schedule, stage.train)
            if stage.optimizer.magnitude_lr is not None:
                problems.append(f"{name}.optimizer.magnitude_lr has nothing to train: a model has no magnitudes")
        if len({stage.train.mixed_precision for stage in stages.values()}) > 1:
            problems.append(f"train.mixed_precision must be the same in {', '.join(stages)}")
        return raise_problems(self, problems)


# --- the judge -------------------------------------------------------------------------------------------------------


class ConceptChoice(Section):
    """Which of the judge's things are drawn, and how often."""

    role: Literal["report", "tune", "icon3d", "lego", "all"] = "report"  # report: in no adapter's images
    # Evenly spread over the list; None: all of the role. Two things left of three are the least that has a covariance.
    count: Annotated[int, Field(ge=3)] | None = 40
    seeds: Annotated[Items[Seed], Field(min_length=1)] = (0, 1, 2)


class DrawConfig(Section):
    steps: PositiveInt = 20
    guidance: NonNegative = 5.0
    negative_prompt: str | None = None
    batch_size: PositiveInt = 16


class ClipConfig(Section):
    """Similarity by CLIP weights that the user has."""

    path: Text  # a folder with open_clip's config and weights, or a hub name
    text: Text = "a picture of {thing}"  # what a picture is compared with
    images: Text | None = None  # a folder of pictures in the wanted style; None: no image similarity


class FitJudgeConfig(PipelineConfig):
    command: ClassVar[str] = "eval"
    pipeline: Literal["fit_judge"]
    output: Text | None = None  # as in training
    model: ModelConfig  # what the real icons pass through
    icons: Text = "build/icons"  # what build_samples made
    # Of the scheduler's 1000: icons are noised up to here and predicted back, as the UNet leaves them.
    max_time: PositiveInt = 150


JudgedStyle = Literal["flat", "3d", "brick"]


class EvalSDXLConfig(PipelineConfig):
    command: ClassVar[str] = "eval"
    pipeline: Literal["eval_sdxl"]
    output: Text | None = None  # as in training
    model: ModelConfig
    adapter: AdapterFile | None = None  # None: the bare model only
    judge: Text  # the folder of a fitted judge
    style: JudgedStyle
    prompt: Text  # in the style, with {thing}
    flat_prompt: Text = "a flat icon of {thing}"  # what the bare model knows
    concepts: ConceptChoice = ConceptChoice()
    draw: DrawConfig = DrawConfig()
    clip: ClipConfig | None = None

    @model_validator(mode="after")
    def _prompts_name_the_thing(self) -> "EvalSDXLConfig":
        problems = check_templates(prompt=self.prompt, flat_prompt=self.flat_prompt)
        return raise_problems(self, problems + (check_templates(**{"clip.text": self.clip.text}) if self.clip else []))


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


class CompareSDXLConfig(PipelineConfig):
    """Bare model, full fine-tuning, LoRA, DoRA, and DoRA at half the rank, each at its own best learning rate."""

    command: ClassVar[str] = "eval"
    pipeline: Literal["compare_sdxl"]
    output: Text  # the campaign's folder; one that exists is gone on with
    base: Text  # the config of a train_sdxl run: what all runs have in common
    steps: PositiveInt = 250  # of every training
    ranks: Annotated[Items[PositiveInt], Field(min_length=1)] = (1, 4, 8)
    learning_rates: LearningRates
    extra_rates: Count = 1  # further candidates, a factor apart, while the best one is the lowest or the highest
    workers: PositiveInt = 1  # trainings at a time; small models train two at a time faster than one with two threads
    judge: Text
    style: JudgedStyle
    prompt: Text
    flat_prompt: Text = "a flat icon of {thing}"
    tune: ConceptChoice = ConceptChoice(role="tune", count=24, seeds=(0, 1))  # rates are chosen on these
    report: ConceptChoice = ConceptChoice()  # each seed is a training of its own
    draw: DrawConfig = DrawConfig()
    columns: PositiveInt = 8  # concepts in the picture

    @model_validator(mode="after")
    def _sections_agree(self) -> "CompareSDXLConfig":
        problems = check_templates(prompt=self.prompt, flat_prompt=self.flat_prompt)
        if self.tune.role == self.report.role:
            problems.append("tune.role and report.role must differ: rates are chosen on other things than the reported")
        if len(self.report.seeds) < 2:
            problems.append("report.seeds must be two or more: each is a training, and one alone has no spread")
        return raise_problems(self, problems)


# --- checks across sections ------------------------------------------------------------------------------------------


def check_training(
    optimizer: OptimizerConfig, schedule: ScheduleConfig, train: TrainConfig, dtype: str = "float32"
) -> list[str]:
    """What contradicts itself between the sections of a training run, as sentences that name the keys."""
    problems = []
    if schedule.warmup_steps and schedule.warmup_share:
        problems.append("give either schedule.warmup_steps or schedule.warmup_share")
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


def check_templates(**templates: str) -> list[str]:
    """Prompts, by their keys, that cannot be filled in with a thing."""
    return [f"{key} must hold {{thing}} once" for key, text in templates.items() if text.count("{thing}") != 1]


ConfigT = TypeVar("ConfigT", bound=PipelineConfig)


def raise_problems(config: ConfigT, problems: list[str]) -> ConfigT:
    """Ends an after-validator: one error that holds every problem, or the config itself."""
    if problems:
        raise ValueError("; ".join(problems))
    return config
