"""What a config of the SDXL pipelines and their judge may say. The rules are those of schema.py."""

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from dora_mm.config.schema import (
    AnyAdapterConfig,
    Backend,
    Count,
    Items,
    LearningRates,
    NonNegative,
    OptimizerConfig,
    PipelineConfig,
    Positive,
    ScheduleConfig,
    Section,
    Seed,
    Share,
    Text,
    TrainConfig,
    check_adapter,
    check_training,
    raise_problems,
)

PixelSize = Annotated[int, Field(ge=16, le=8192, multiple_of=8)]  # 8 pixels to a latent of SDXL's VAE


def bucket_step(resolution: int) -> int:
    """Sides of training pictures: multiples of 64 as in SDXL's pretraining, of 32 (its coarsest cell) below 512."""
    return 64 if resolution >= 512 else 32


class ModelConfig(Section):
    path: Text  # a folder, a hub name, or one .safetensors checkpoint
    vae: Text | None = None  # another VAE in place of the model's own (folder or hub name)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the frozen weights; adapters are float32


class AdapterConfig(AnyAdapterConfig):
    parts: Annotated[Items[Literal["attn", "cross", "ff", "conv"]], Field(min_length=1)] = ("attn", "cross")
    text_encoders: bool = False  # adapt both text encoders' attention as well
    strength: Positive = 1.0  # of what was trained: strength 1 of the saved file, and what sheets show


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
    before_after: bool = True  # the sheet shows the bare model beside the adapter


class AdapterFile(Section):
    path: Text
    strength: float = 1.0


# --- pipelines -------------------------------------------------------------------------------------------------------


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
        if self.adapter.method == "full" and self.adapter.strength != 1.0:
            problems.append("adapter.strength must be 1 for adapter.method full: weights trained whole keep no base")
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


def check_templates(**templates: str) -> list[str]:
    """Prompts, by their keys, that cannot be filled in with a thing."""
    return [f"{key} must hold {{thing}} once" for key, text in templates.items() if text.count("{thing}") != 1]
