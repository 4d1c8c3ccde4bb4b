"""The configs of image generation (batches, grids, the samples of a training) and of its scores. See schema.py."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt, model_validator

from dora_mm.config.latest import numbered_adapters
from dora_mm.config.models import ModelConfig
from dora_mm.config.schema import (
    AdapterPath,
    Backend,
    Count,
    InputPath,
    Items,
    ModelPath,
    NonNegative,
    OutputFolder,
    PipelineConfig,
    ReferenceArea,
    Section,
    Seed,
    Text,
    raise_problems,
)
from dora_mm.config.streaming import ImageStreamConfig

WITHOUT_GUIDANCE = 1.0  # up to this scale of guidance the negative prompt is not looked at, by any family
LARGEST_SIZE = 8192  # pixels of a side


def _checked_size(size: int) -> int:
    if size % 8 or not 16 <= size <= LARGEST_SIZE:
        raise ValueError(f"must be a multiple of 8 from 16 to {LARGEST_SIZE}, got {size}")
    return size


PixelSize = Annotated[int, AfterValidator(_checked_size)]  # SDXL's VAE maps 8 x 8 pixels to one latent
NumSteps = Annotated[int, Field(gt=0, le=10_000)]  # of a scheduler; those of training are 1,000
Rescale = Annotated[float, Field(ge=0, le=1)]  # how much of the contrast that guidance adds is taken back


def as_references(value: Any) -> Any:
    """ReferencePaths of an image: one path is a list of one."""
    return (value,) if isinstance(value, str) else value


ReferencePaths = Annotated[
    Items[InputPath], BeforeValidator(as_references, json_schema_input_type=str | list[str])
]  # for one image


class ContactSheetConfig(Section):
    """The images that a training run samples."""

    prompts: Items[Text] = ()  # empty: no images
    images: Items[ReferencePaths] = ()  # of models that edit: the references of each prompt; empty: none
    negative_prompt: str | None = None  # null: none
    seeds: Annotated[Items[Seed], Field(min_length=1)] = (0,)  # one image per prompt and seed
    every: Count = 0  # optimizer steps between contact sheets; 0: only at the end
    steps: NumSteps = 25  # denoising steps
    guidance: NonNegative = 5.0  # classifier-free guidance scale
    guidance_rescale: Rescale = 0.0  # against the contrast that guidance adds; 0.7 for zero terminal SNR
    batch_size: PositiveInt = 1  # images per batch

    @model_validator(mode="after")
    def _guidance_has_an_effect(self) -> "ContactSheetConfig":
        for key in ("negative_prompt", "guidance_rescale") if self.guidance <= WITHOUT_GUIDANCE else ():
            if getattr(self, key) not in (None, 0.0):
                raise ValueError(f"{key} has no effect at guidance {self.guidance:g}: leave it out")
        if self.images and len(self.images) != len(self.prompts):
            count = len(self.prompts)
            raise ValueError(f"images has the references of {len(self.images)} prompts, and prompts has {count}")
        return self


class SampleConfig(ContactSheetConfig):
    """Contact sheets of a training, by default with the base model's images for comparison."""

    before_after: bool = True  # contact sheets also show images of the base model without the adapter


class AdapterChoice(Section):
    """An existing adapter and its strength."""

    path: AdapterPath  # the adapter file, its folder or a run
    # Scales the update: 0 is the base model, 1 the trained one. Or by part and block: {unet.down: 0.5, text_encoder: 0}
    strength: float | dict[str, float] = 1.0


class MemoryConfig(ImageStreamConfig):
    """Settings that reduce the memory of generation, at the cost of time."""

    # Where the weights wait: model: in main memory, but for the network that runs
    offload: Literal["none", "model"] = "none"
    vae_tiling: bool = False  # the VAE decodes one image at a time, in overlapping tiles of 512 pixels
    attention_slicing: bool = False  # attention in two steps; only where torch has no fused attention (Apple's MPS)

    @model_validator(mode="after")
    def _moves_once(self) -> "MemoryConfig":
        if self.offload == "model" and (self.stream, self.stream_text) != (None, None):
            raise ValueError("offload model moves whole networks, and stream their blocks: leave one of them out")
        return self


SchedulerName = Literal[
    "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_2m_sde", "dpmpp_2m_sde_karras", "unipc", "ddim", "lcm"
]  # the names in models/schedulers.py


PromptSyntax = Literal["plain", "a1111"]


class ImageGenerationConfig(PipelineConfig):
    """Settings shared by all pipelines that generate images from prompts."""

    changeable: ClassVar[tuple[str, ...] | None] = None  # every image is compared with what it should be
    output: OutputFolder | None = None  # the run directory; an interrupted run continues; null: runs/<name>/<NNN>
    backend: Backend = "auto"  # implementation of the adapted layers, see dora_mm/backend.py
    model: ModelConfig | None = None  # null: the model that the adapter's file names; without adapter the embedded one
    memory: MemoryConfig = MemoryConfig()
    adapter: AdapterChoice | None = None  # null: the base model
    # plain: prompts are text; a1111: with weights such as (word:1.3), alternatives {a|b} by seed, and BREAK
    prompt_syntax: PromptSyntax = "plain"
    # null: none. Left out, this, `steps`, `guidance` and `guidance_rescale` are those of the training's contact sheets
    negative_prompt: str | None = None
    steps: NumSteps = 25  # denoising steps
    guidance: NonNegative = 5.0  # classifier-free guidance scale
    guidance_rescale: Rescale = 0.0  # against the contrast that guidance adds; 0.7 for zero terminal SNR
    scheduler: SchedulerName | None = None  # null: the model's own
    height: PixelSize | None = None  # pixels; null: the model's native size
    width: PixelSize | None = None  # pixels; null: the model's native size
    batch_size: PositiveInt = 1  # images per batch


class EditingConfig(ImageGenerationConfig):
    """Images that models which edit can make of reference images."""

    images: ReferencePaths = ()  # reference images of every image; empty: none
    reference_area: ReferenceArea = "pipeline"  # to how many pixels larger references are scaled down, as in `data`


class BatchGenerationConfig(EditingConfig):
    """Batch generation: each prompt, or each row of a file, with all seeds and strengths."""

    command: ClassVar[str] = "sample"
    pipeline: Literal["sample"]
    prompts: Items[Text] = ()  # prompts of the images
    prompts_file: InputPath | None = None  # .csv, .tsv, .xlsx, .jsonl or .txt, a column per setting; replaces `prompts`
    seeds: Annotated[Items[Seed], Field(min_length=1)] = (0,)  # one image per prompt and seed
    # One image for each; they multiply the adapter's. null: 1, and images without adapter are those of the bare model
    strengths: Annotated[Items[float], Field(min_length=1)] | None = None
    contact_sheet: bool = True  # whether to save labelled contact sheets of all images

    @model_validator(mode="after")
    def _has_prompts(self) -> "BatchGenerationConfig":
        problems = []
        if not self.prompts and self.prompts_file is None:
            problems.append("give prompts or prompts_file")
        return raise_problems(self, problems)


AxisName = Literal["prompt", "seed", "strength", "adapter", "checkpoint", "scheduler", "steps", "guidance", "size"]


class Axis(Section):
    """The axis of a grid: the setting that varies over its rows or columns, and its values."""

    name: AxisName  # size: 1024 or 832x1216; checkpoint: a step of the run that adapter.path names
    values: Items[str | int | float] = ()  # empty, for checkpoint alone: all that the run has kept

    @model_validator(mode="before")
    @classmethod
    def _latest_runs_have_their_number(cls, values: Any) -> Any:
        given = values.get("values") if isinstance(values, dict) and values.get("name") == "adapter" else None
        if not isinstance(given, list):
            return values
        return {**values, "values": [numbered_adapters(each) if isinstance(each, str) else each for each in given]}


class GridConfig(EditingConfig):
    """A table of images over the values of one or two settings."""

    command: ClassVar[str] = "grid"
    pipeline: Literal["grid"]
    prompt: Text | None = None  # the prompt of every image; null: an axis has the prompts
    seed: Seed = 0  # seed of every image where no axis has seeds
    rows: Axis | None = None  # the setting of the rows and its values; null: one row
    columns: Axis  # the setting of the columns and its values
    without_adapter: bool = True  # whether the first column is generated without adapter

    @model_validator(mode="after")
    def _axes_agree(self) -> "GridConfig":
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


# --- images that are scored ---------------------------------------------------------------------------------------


class RoleConfig(Section):
    """Which of the classifier's concepts are generated."""

    role: Literal["report", "tune", "icon3d", "lego", "all"] = "report"  # report: in no training set
    # How many concepts, evenly spaced over the list; null: all of the role. At least three: a concept held out of three
    # leaves two, the fewest that have a covariance.
    count: Annotated[int, Field(ge=3)] | None = 40


class ConceptChoice(RoleConfig):
    """Which of the classifier's concepts are generated, and with which seeds."""

    seeds: Annotated[Items[Seed], Field(min_length=1)] = (0, 1, 2)  # one image per concept and seed


class ImageSamplingConfig(Section):
    """Generation settings of scored images."""

    steps: NumSteps = 20  # denoising steps
    guidance: NonNegative = 5.0  # classifier-free guidance scale
    guidance_rescale: Rescale = 0.0  # against the contrast that guidance adds; 0.7 for zero terminal SNR
    negative_prompt: str | None = None  # null: none
    batch_size: PositiveInt = 16  # images per batch


class ClipConfig(Section):
    """CLIP similarity, with weights that the user supplies."""

    path: Text  # a folder with an open_clip config and weights, or a hub name
    text: Text = "a picture of {thing}"  # the text that an image is compared with
    images: InputPath | None = None  # a folder of images in the target style; null: no image similarity


ClassifiedStyle = Literal["flat", "3d", "brick"]


class EvalDiffusionConfig(PipelineConfig):
    """Generates things that no adapter was trained on, and scores them by a classifier."""

    command: ClassVar[str] = "eval"
    pipeline: Literal["eval_diffusion"]
    output: OutputFolder | None = None  # the run directory; an interrupted one continues; null: runs/<name>/<NNN>
    model: ModelConfig
    adapter: AdapterChoice | None = None  # null: only the base model
    classifier: InputPath  # the folder of a fitted classifier
    style: ClassifiedStyle  # the target style
    prompt: Text  # the prompt of the target style; {thing} is replaced by the concept
    flat_prompt: Text = "a flat icon of {thing}"  # the prompt of the style that the base model knows
    concepts: ConceptChoice = ConceptChoice()
    sampling: ImageSamplingConfig = ImageSamplingConfig()
    clip: ClipConfig | None = None  # null: no CLIP similarity

    @model_validator(mode="after")
    def _prompts_name_the_thing(self) -> "EvalDiffusionConfig":
        problems = check_templates(prompt=self.prompt, flat_prompt=self.flat_prompt)
        return raise_problems(self, problems + (check_templates(**{"clip.text": self.clip.text}) if self.clip else []))


class ScoredAdapterConfig(ImageGenerationConfig):
    """Images by the bare model and an adapter, which an image encoder compares with others."""

    command: ClassVar[str] = "eval"
    adapter: AdapterChoice  # pyright: ignore[reportGeneralTypeIssues]  (without a default: here it is required)
    seeds: Annotated[Items[Seed], Field(min_length=1)] = (0, 1)  # one image per prompt and seed
    clip_model: ModelPath | None = None  # a folder or hub name of open_clip; null: the embedded encoder
    timm_model: ModelPath | None = None  # a folder or hub name of timm, such as of DINOv2, instead; null: none

    @model_validator(mode="after")
    def _has_one_encoder(self) -> Self:
        if self.clip_model and self.timm_model:
            raise ValueError("give either clip_model or timm_model")
        return self


class EvalStyleConfig(ScoredAdapterConfig):
    """Generates images with and without an adapter, and scores their similarity to the training images."""

    pipeline: Literal["eval_style"]
    images: InputPath | None = None  # the images of the style; null: the adapter's training images
    follow_links: bool = False  # as data.follow_links, of images
    prompts: Items[Text] = ()  # with the style; empty: those of the training, and some in the words of its captions
    prompts_without_style: Items[Text] = ()  # without the style; empty: six things


class EvalEditConfig(ScoredAdapterConfig):
    """Generates edits with and without an adapter, and measures their distance to the targets."""

    pipeline: Literal["eval_edit"]
    images: InputPath | None = None  # targets with captions, as data.folder; null: those that the training held out
    references: Items[InputPath] = ()  # folders of their references, as data.references
    follow_links: bool = False  # as data.follow_links, of images, references and masks
    reference_area: ReferenceArea = "pipeline"  # as in `data`
    prompt: Text | None = None  # the instruction of targets without a caption; null: that of the training
    masks: InputPath | None = None  # masks of what is edited, named as the targets: outside, the reference should stay
    # Without a mask it should stay where no channel of target and reference, from 0 to 1, is so far apart or farther
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _images_come_with_references(self) -> Self:
        if self.images is None and (self.references or self.masks):
            raise ValueError("references and masks are those of images: give images, too")
        return self


def check_templates(**templates: str) -> list[str]:
    """Finds prompts, given by their config keys, that lack {thing}; one message per problem."""
    return [f"{key} must contain {{thing}} once" for key, text in templates.items() if text.count("{thing}") != 1]
