"""The config schemas of the SDXL pipelines and of the judge of styles. See schema.py for the rules."""

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from dora_mm.config.schema import (
    CHANGEABLE,
    AnyAdapterConfig,
    Backend,
    Count,
    InputPath,
    Items,
    LearningRates,
    ModelPath,
    NewFolder,
    NonNegative,
    OptimizerConfig,
    OutputFolder,
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

PixelSize = Annotated[int, Field(ge=16, le=8192, multiple_of=8)]  # SDXL's VAE maps 8 x 8 pixels to one latent


def bucket_step(resolution: int) -> int:
    """The number of pixels that the sides of training images are multiples of.

    64 as in SDXL's pretraining; below a resolution of 512 it is 32, the size of one cell of the coarsest feature map.
    """
    return 64 if resolution >= 512 else 32


class ModelConfig(Section):
    path: ModelPath  # a model folder, a hub name, or a single .safetensors checkpoint
    revision: Text | None = None  # a commit, branch or tag of a hub model; null: its main branch
    vae: ModelPath | None = None  # a folder or hub name of another VAE; null: the model's own
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # dtype of the frozen weights; adapters are float32


class AdapterConfig(AnyAdapterConfig):
    # The adapted parts of the UNet: self-attention, cross-attention, feed-forward layers, convolutions.
    parts: Annotated[Items[Literal["attn", "cross", "ff", "conv"]], Field(min_length=1)] = ("attn", "cross")
    text_encoders: bool = False  # whether to adapt the attention of both text encoders, too
    strength: Positive = 1.0  # scales the trained update once: the result is strength 1 of the saved file and of sheets


class DataConfig(Section):
    folder: InputPath  # images, with captions in metadata.jsonl or <name>.txt files, or without captions
    subfolders: bool = False  # whether images in subfolders count; those in 10_name then occur 10 times in an epoch
    resolution: PixelSize  # pixels; an image has an area of about resolution x resolution and keeps its aspect ratio
    instance_prompt: Text | None = None  # the caption of images without one; null: every image needs a caption
    placeholder: Text | None = None  # a word that must occur in a caption, such as TOK; null: no check
    repeats: PositiveInt = 1  # how often each image occurs in an epoch
    background: Text = "white"  # behind transparent images: a colour name or #rrggbb
    flip: bool = False  # augmentation: mirror images at random
    crop: Literal["center", "random"] = "center"  # what remains when an image exceeds the target size
    caption_dropout: Share = 0.0  # probability of training an image without its caption
    unconditional: Literal["zeros", "empty"] = "zeros"  # embedding without a caption; zeros: as SDXL
    latent_cache: Text | None = None  # a folder that keeps latents between runs; null: in memory only

    @field_validator("resolution")
    @classmethod
    def _resolution_is_a_bucket(cls, resolution: int) -> int:
        if resolution % bucket_step(resolution):
            raise ValueError(f"must be a multiple of 64, or of 32 below 512, got {resolution}")
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
    type: Literal["mse", "huber", "l1"] = "mse"  # distance between prediction and target
    min_snr_gamma: Positive | None = 5.0  # gamma of Min-SNR loss weights; null: every timestep has weight 1
    noise_offset: NonNegative = 0.0  # standard deviation of noise that is constant over an image
    timestep_bias: Annotated[float, Field(gt=-1)] = 0.0  # timesteps are drawn with density t^bias; 0: uniform


class SheetConfig(Section):
    """The images that a training run samples."""

    prompts: Items[Text] = ()  # empty: no images
    negative_prompt: str | None = None  # null: none
    seeds: Annotated[Items[Seed], Field(min_length=1)] = (0,)  # one image per prompt and seed
    every: Count = 0  # optimizer steps between sheets; 0: only at the end
    steps: PositiveInt = 25  # denoising steps
    guidance: NonNegative = 5.0  # classifier-free guidance scale
    batch_size: PositiveInt = 1  # images per batch


class SampleConfig(SheetConfig):
    before_after: bool = True  # sheets also show images of the base model without the adapter


class AdapterFile(Section):
    path: InputPath  # the adapter file or its folder
    # Scales the update: 0 is the base model, 1 the trained one. Or by part and block: {unet.down: 0.5, text_encoder: 0}
    strength: float | dict[str, float] = 1.0


class MemoryConfig(Section):
    """What pictures take less memory with, and more time."""

    # Where the weights wait: model: in main memory, but for the network that runs; layers: but for the layer that runs
    offload: Literal["none", "model", "layers"] = "none"
    vae_tiling: bool = False  # the VAE decodes one picture at a time, in overlapping tiles of 512 pixels
    attention_slicing: bool = False  # attention in two steps; only where torch has no fused attention (Apple's MPS)


# --- pipelines -------------------------------------------------------------------------------------------------------


class TrainSDXLConfig(PipelineConfig):
    command: ClassVar[str] = "train"
    changeable: ClassVar[tuple[str, ...]] = (*CHANGEABLE, "adapter.strength", "data.latent_cache", "sample")
    pipeline: Literal["train_sdxl"]
    seed: Seed = 0  # seed of everything random in the run
    output: NewFolder | None = None  # the run directory, which must not exist yet; null: runs/<name>/<NNN>
    backend: Backend = "auto"  # implementation of the adapted layers, see dora_mm/backend.py
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
            problems.append("adapter.method full trains the base weights, so model.dtype must be float32")
        if self.data.latent_cache is not None and self.data.crop == "random":
            problems.append("data.latent_cache cannot be used with data.crop random: every crop is new")
        if self.sample.every and not self.sample.prompts:
            problems.append("sample.every has no effect: sample.prompts is empty")
        if self.adapter.method == "full" and self.adapter.strength != 1.0:
            problems.append("adapter.strength must be 1 for adapter.method full: it keeps no base weights")
        return raise_problems(self, problems)


SchedulerName = Literal[
    "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_2m_sde", "dpmpp_2m_sde_karras", "unipc", "ddim", "lcm"
]  # the names in models/sdxl/schedulers.py


class PicturesConfig(PipelineConfig):
    """What all pipelines share that draw pictures for prompts."""

    changeable: ClassVar[tuple[str, ...] | None] = None  # every picture is compared with what it should be
    output: OutputFolder | None = None  # the run directory; one of the same pipeline goes on; null: runs/<name>/<NNN>
    backend: Backend = "auto"  # implementation of the adapted layers, see dora_mm/backend.py
    model: ModelConfig | None = None  # null: the model that the adapter's file names; without adapter the embedded one
    memory: MemoryConfig = MemoryConfig()
    adapter: AdapterFile | None = None  # null: the base model
    negative_prompt: str | None = None  # null: none
    steps: PositiveInt = 25  # denoising steps
    guidance: NonNegative = 5.0  # classifier-free guidance scale
    scheduler: SchedulerName | None = None  # null: the model's own
    height: PixelSize | None = None  # pixels; null: the model's native size
    width: PixelSize | None = None  # pixels; null: the model's native size
    batch_size: PositiveInt = 1  # images per batch


class SampleSDXLConfig(PicturesConfig):
    command: ClassVar[str] = "sample"
    pipeline: Literal["sample_sdxl"]
    prompts: Items[Text] = ()
    prompts_file: InputPath | None = None  # .csv, .tsv, .jsonl or .txt, a column per setting; replaces `prompts`
    seeds: Annotated[Items[Seed], Field(min_length=1)] = (0,)  # one image per prompt and seed
    strengths: Annotated[Items[float], Field(min_length=1)] = (1.0,)  # one image for each; they multiply the adapter's
    sheet: bool = True  # whether to save labelled sheets of all images

    @model_validator(mode="after")
    def _says_what_to_draw(self) -> "SampleSDXLConfig":
        problems = []
        if not self.prompts and self.prompts_file is None:
            problems.append("give prompts or prompts_file")
        if self.strengths != (1.0,) and not self.adapter and self.prompts_file is None:
            problems.append("strengths needs an adapter")
        return raise_problems(self, problems)


AxisName = Literal["prompt", "seed", "strength", "adapter", "checkpoint", "scheduler", "steps", "guidance", "size"]


class Axis(Section):
    """What differs from one row or column of a grid to the next."""

    name: AxisName  # size: 1024 or 832x1216; checkpoint: a step of the run that adapter.path names
    values: Items[str | int | float] = ()  # empty, for checkpoint alone: all that the run has kept


class GridSDXLConfig(PicturesConfig):
    command: ClassVar[str] = "grid"
    pipeline: Literal["grid_sdxl"]
    prompt: Text | None = None  # null: an axis has the prompts
    seed: Seed = 0
    rows: Axis | None = None  # null: one row
    columns: Axis
    without_adapter: bool = True  # whether the first column is drawn without adapter

    @model_validator(mode="after")
    def _axes_agree(self) -> "GridSDXLConfig":
        names = [axis.name for axis in (self.rows, self.columns) if axis]
        problems = []
        if len(set(names)) < len(names):
            problems.append(f"rows and columns are both {names[0]}")
        if ("prompt" in names) == (self.prompt is not None):
            problems.append("give either prompt or an axis of prompts")
        if "adapter" in names and (self.adapter or "checkpoint" in names):
            problems.append("an axis of adapters needs no adapter and no axis of checkpoints")
        if {"strength", "checkpoint"} & set(names) and not self.adapter and "adapter" not in names:
            problems.append("an axis of strengths or checkpoints needs an adapter")
        for key, axis in (("rows", self.rows), ("columns", self.columns)):
            if axis and not axis.values and axis.name != "checkpoint":
                problems.append(f"{key}.values is empty")
        return raise_problems(self, problems)


# --- the judge -------------------------------------------------------------------------------------------------------


class ConceptChoice(Section):
    """Which of the judge's concepts are sampled, and with which seeds."""

    role: Literal["report", "tune", "icon3d", "lego", "all"] = "report"  # report: in no training set
    # How many concepts, evenly spaced over the list; null: all of the role. At least three: a concept held out of three
    # leaves two, the fewest that have a covariance.
    count: Annotated[int, Field(ge=3)] | None = 40
    seeds: Annotated[Items[Seed], Field(min_length=1)] = (0, 1, 2)  # one image per concept and seed


class DrawConfig(Section):
    steps: PositiveInt = 20  # denoising steps
    guidance: NonNegative = 5.0  # classifier-free guidance scale
    negative_prompt: str | None = None  # null: none
    batch_size: PositiveInt = 16  # images per batch


class ClipConfig(Section):
    """CLIP similarity, with weights that the user supplies."""

    path: Text  # a folder with an open_clip config and weights, or a hub name
    text: Text = "a picture of {thing}"  # the text that an image is compared with
    images: InputPath | None = None  # a folder of images in the target style; null: no image similarity


JudgedStyle = Literal["flat", "3d", "brick"]


class EvalSDXLConfig(PipelineConfig):
    command: ClassVar[str] = "eval"
    pipeline: Literal["eval_sdxl"]
    output: NewFolder | None = None  # the run directory, which must not exist yet; null: runs/<name>/<NNN>
    model: ModelConfig
    adapter: AdapterFile | None = None  # null: only the base model
    judge: InputPath  # the folder of a fitted judge
    style: JudgedStyle  # the target style
    prompt: Text  # asks for the target style; {thing} is replaced by the concept
    flat_prompt: Text = "a flat icon of {thing}"  # asks for the style that the base model knows
    concepts: ConceptChoice = ConceptChoice()
    draw: DrawConfig = DrawConfig()
    clip: ClipConfig | None = None  # null: no CLIP similarity

    @model_validator(mode="after")
    def _prompts_name_the_thing(self) -> "EvalSDXLConfig":
        problems = check_templates(prompt=self.prompt, flat_prompt=self.flat_prompt)
        return raise_problems(self, problems + (check_templates(**{"clip.text": self.clip.text}) if self.clip else []))


class CompareSDXLConfig(PipelineConfig):
    """Compares the base model, full fine-tuning, LoRA, DoRA and DoRA at half rank, each at its best learning rate."""

    command: ClassVar[str] = "eval"
    pipeline: Literal["compare_sdxl"]
    output: OutputFolder  # the campaign's folder; one that exists is resumed
    base: InputPath  # a config of train_sdxl, with the settings that all trainings share
    steps: PositiveInt = 250  # optimizer steps of every training
    ranks: Annotated[Items[PositiveInt], Field(min_length=1)] = (1, 4, 8)  # of LoRA and DoRA; DoRA also at their halves
    learning_rates: LearningRates
    extra_rates: Count = 1  # more candidates to try, a factor apart, while the best one is the lowest or the highest
    workers: PositiveInt = 1  # trainings at a time; small models train faster two at a time than one with two threads
    judge: InputPath  # the folder of a fitted judge
    style: JudgedStyle  # the target style
    prompt: Text  # asks for the target style; {thing} is replaced by the concept
    flat_prompt: Text = "a flat icon of {thing}"  # asks for the style that the base model knows
    tune: ConceptChoice = ConceptChoice(role="tune", count=24, seeds=(0, 1))  # learning rates are chosen on these
    report: ConceptChoice = ConceptChoice()  # the reported scores; each seed is a separate training
    draw: DrawConfig = DrawConfig()
    columns: PositiveInt = 8  # concepts shown in the sheet

    @model_validator(mode="after")
    def _sections_agree(self) -> "CompareSDXLConfig":
        problems = check_templates(prompt=self.prompt, flat_prompt=self.flat_prompt)
        if self.tune.role == self.report.role:
            problems.append("tune.role and report.role must differ: rates must not be chosen on the reported concepts")
        if len(self.report.seeds) < 2:
            problems.append("report.seeds needs at least two seeds: each is a training, and one has no variance")
        return raise_problems(self, problems)


# --- checks across sections ------------------------------------------------------------------------------------------


def check_templates(**templates: str) -> list[str]:
    """Finds prompts, given by their config keys, that lack {thing}; one message per problem."""
    return [f"{key} must contain {{thing}} once" for key, text in templates.items() if text.count("{thing}") != 1]
