"""The config sections that name a model. See schema.py for the rules."""

from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from operator import or_
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Discriminator, Field, PositiveInt, Tag, field_validator
from pydantic.fields import FieldInfo

from dora_mm.config.schema import (
    Dtype,
    InputPath,
    IsoDate,
    Items,
    ModelPath,
    Positive,
    Section,
    SectionChoice,
    SectionT,
    Text,
)
from dora_mm.config.vl_data import TaskName
from dora_mm.registries.image_families import IMAGE_FAMILIES
from dora_mm.registries.registry import load
from dora_mm.registries.vl_families import DEFAULT, VL_FAMILIES
from dora_mm.registries.vl_tasks import TASKS

EMBEDDED_IMAGE_MODEL = "samples/tiny-sdxl"  # draws where nothing names a model


def starts() -> dict[str, Mapping[int, str]]:
    """The recipes that `dora-mm new` starts from, by family and by the GB of the GPU that each needs."""
    families = (*IMAGE_FAMILIES.items(), *VL_FAMILIES.items())
    return {name: family.starts for name, family in families if family.starts}


class ImageFamilyConfig(Section):
    """Settings specific to one family of image models."""

    only_training: ClassVar[frozenset[str]] = frozenset()  # keys on which images do not depend


class SDXLConfig(ImageFamilyConfig):
    """Settings specific to SDXL."""

    only_training: ClassVar[frozenset[str]] = frozenset({"unconditional"})

    # The embedding without a caption, in training: all zeros, as SDXL was trained, or the encoded empty text
    unconditional: Literal["zeros", "empty"] = "zeros"


class ZImageConfig(ImageFamilyConfig):
    """Settings specific to Z-Image."""

    max_tokens: PositiveInt = 512  # of a prompt in its chat template; the rest is cut


class Flux2KleinConfig(ImageFamilyConfig):
    """Settings specific to FLUX.2 klein."""

    only_training: ClassVar[frozenset[str]] = frozenset({"shift_steps"})

    max_tokens: PositiveInt = 512  # of a prompt in its chat template; the rest is cut, shorter ones are filled up
    # How far noise levels move towards noise depends on the number of sampling steps, and trainings have none: theirs
    # are those of sampling in so many steps. 50 is the pipeline's own number for the base models
    shift_steps: PositiveInt = 50


class QwenImageConfig(ImageFamilyConfig):
    """Settings specific to Qwen-Image."""

    max_tokens: Annotated[int, Field(gt=0, le=1024)] = 512  # of a prompt; the rest is cut


class QwenImageEditConfig(ImageFamilyConfig):
    """Settings specific to Qwen-Image-Edit: none, since its pipeline cuts no prompt."""


class QwenImage21Config(ImageFamilyConfig):
    """Settings specific to Qwen-Image-2.1: none, since its pipeline cuts no prompt."""


class Krea2Config(ImageFamilyConfig):
    """Settings specific to Krea 2."""

    # Of a prompt, with the 5 of its template's end; text beyond is cut
    max_tokens: Annotated[int, Field(gt=5)] = 512


class StableDiffusion3Config(ImageFamilyConfig):
    """Keys of the models of Stable Diffusion 3."""

    max_tokens: Annotated[int, Field(gt=0, le=512)] = 256  # of a prompt as T5 reads it; text beyond is cut


class ModelConfig(Section):
    """An image model. Its files decide the family; a section of another family is an error.

    The sections of families are further keys, with the names of the families; null: its defaults. See `add_sections`.
    """

    path: ModelPath  # a model folder, a hub name, or (SDXL) a single .safetensors checkpoint
    revision: Text | None = None  # a commit, branch or tag of a hub model; null: its main branch
    # Which of its weights, such as fp16; null: those whose files have no such name, or what there is, and of the hub
    # those in half precision where `dtype` is
    variant: Text | None = None
    vae: ModelPath | None = None  # a folder or hub name of another VAE; null: the model's own
    # A .safetensors file with the denoiser alone, as flow models are passed around, in 16 bits or float8 with scales;
    # all else is that of `path`. null: the model's own
    denoiser: InputPath | None = None
    dtype: Dtype = "float32"  # bfloat16 or float16, of the frozen weights; adapters are float32
    # The Linear layers of all parts of the denoiser in 8 or 4 bits: float8 has a scale for each row and needs no
    # package, int8, nf4 and fp4 are of bitsandbytes, torchao_int8 of torchao; null: in dtype
    quantization: Literal["float8", "int8", "torchao_int8", "nf4", "fp4"] | None = None
    # The Linear layers in the blocks of all text encoders, likewise; null: in dtype
    text_quantization: Literal["float8", "int8", "nf4"] | None = None
    # What an SDXL model predicts; auto: what its files say, of a single checkpoint its tensors v_pred and ztsnr
    prediction: Literal["auto", "epsilon", "v_prediction"] = "auto"

    def quantization_of(self, component: str, denoiser: str) -> str | None:
        """How a component is quantised; `denoiser` is the name of that."""
        if component == denoiser:
            return self.quantization
        return self.text_quantization if component.startswith("text_encoder") else None

    def sections(self) -> Iterator[tuple[str, ImageFamilyConfig]]:
        """The sections of families that are given, by the name of the family."""
        yield from ((name, section) for name, section in self if isinstance(section, ImageFamilyConfig))

    def generation_settings(self) -> dict[str, Any]:
        """The settings other than files on which images depend, without defaults, by section and key."""
        own = self.model_dump(
            include={"prediction", "quantization", "text_quantization", "denoiser"}, exclude_defaults=True
        )
        found = {
            name: section.model_dump(exclude_defaults=True, exclude=set(section.only_training))
            for name, section in self.sections()
        }
        return own | {name: settings for name, settings in found.items() if settings}


def add_sections(names: Iterable[str]) -> None:
    """Gives the `model` section of image models the sections of families, and all configs that contain it.

    Args:
        names: Keys of IMAGE_FAMILIES.
    """
    new = [name for name in names if name not in ModelConfig.model_fields]
    for name in new:
        section: Any = load(IMAGE_FAMILIES[name].section) | None
        ModelConfig.model_fields[name] = FieldInfo(annotation=section, default=None)
    if new:
        ModelConfig.model_rebuild(force=True)
        _rebuild()


def _rebuild() -> None:
    """Makes all sections check what those inside them now have."""
    for section in _subclasses(Section):
        section.model_rebuild(force=True)


def _subclasses(kind: type[Section]) -> Iterator[type[Section]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


add_sections(IMAGE_FAMILIES.built_in)


class VisionConfig(Section):
    """The vision tower, frozen unless it is adapted, and the location of features that are already computed."""

    tower: Text = "RN101"  # a model of open_clip; timm/<name>: a model of timm
    pretrained: Text | None = "openai"  # a pretrained tag of the library, or a local file; null: random weights
    layers: Items[Text] = ()  # modules whose maps are concatenated on the coarsest grid; empty: the last
    features: Items[InputPath] = ()  # feature folders of dora-mm, .h5 files or .npz folders; empty: computed on the fly


class VLFamilyConfig(Section):
    """The model section of a family of vision-language models, with what is known of the family before it is loaded.

    Those of families have `family` (the family's name), `path`, `revision`, `dtype`, `quantization`, `prompts` and
    `date`, as keys, or as class variables what these always are.
    """

    own_tower: ClassVar[bool]  # it encodes images itself; False: with the tower or features of the `vision` section
    uses_all_parameters: ClassVar[bool]  # every batch reaches every trained parameter
    # What full fine-tuning trains besides the layers of all parts, in comparisons; None: what the base config does
    full_extra: ClassVar[tuple[str, ...] | None]


class VLMModelConfig(VLFamilyConfig):
    """Any vision-language model or decoder language model of transformers."""

    own_tower: ClassVar[bool] = True
    # A batch without images leaves the vision parts without gradients, and some classes never use a tower's last layer.
    uses_all_parameters: ClassVar[bool] = False
    full_extra: ClassVar[tuple[str, ...] | None] = None

    family: Literal["vlm"] = "vlm"  # vision-language and language models of transformers
    path: ModelPath  # a folder of save_pretrained, or a hub name
    revision: Text | None = None  # a commit, branch or tag of a hub model; null: the main branch
    dtype: Dtype = "float32"  # bfloat16 or float16, of the frozen weights
    attn_implementation: Text | None = None  # such as sdpa or flash_attention_2; null: transformers' choice
    # The frozen weights in 8 or 4 bits, by bitsandbytes or torchao; null: not quantised
    quantization: Literal["int8", "nf4", "fp4", "torchao_int8"] | None = None
    # Fewer pixels are fewer tokens; docs/vlm_classes.md says which of these the processor of each class takes
    min_pixels: PositiveInt | None = None  # of an image, where the processor keeps its shape (Qwen-VL)
    max_pixels: PositiveInt | None = None  # as min_pixels, or where it bounds the number of patches (LFM2-VL)
    image_size: PositiveInt | None = None  # the longer side in pixels (Idefics3, Pixtral)
    max_tiles: PositiveInt | None = None  # into which an image is cut, without the small image of the whole
    fps: Positive | None = None  # frames per second of video; null: 1
    max_frames: Annotated[int, Field(ge=2)] | None = None  # most frames of a video; null: 16
    max_length: PositiveInt | None = None  # cutoff in tokens; longer training rows are cut; null: the model's positions
    loss_over: Literal["answers", "prompts and answers"] = "answers"  # tokens that are learned; never those of images
    prompts: dict[TaskName, Text] = Field(default_factory=dict)  # the prompt of each task, with {text} for the question
    # The day for chat templates that ask for it, such as 2026-12-01; null: the day on which the run began
    date: IsoDate | None = None

    @field_validator("prompts")
    @classmethod
    def _prompts_have_the_question(cls, prompts: dict[str, str]) -> dict[str, str]:
        for task, prompt in prompts.items():
            if "{text}" in (TASKS[task].prompt or "{text}") and "{text}" not in prompt:
                raise ValueError(f"that of {task} needs {{text}}, the place of the question")
        return prompts


class VLBartModelConfig(VLFamilyConfig):
    """VL-BART, which is made of a BART and a vision tower."""

    own_tower: ClassVar[bool] = False
    uses_all_parameters: ClassVar[bool] = True
    full_extra: ClassVar[tuple[str, ...] | None] = ("biases", "norms", "embeddings", "visual_embedding")
    # What others have keys for
    revision: ClassVar[None] = None
    dtype: ClassVar[str] = "float32"
    quantization: ClassVar[None] = None
    prompts: ClassVar[Mapping[str, str]] = MappingProxyType({})
    date: ClassVar[None] = None

    family: Literal["vl_bart"]  # the model of the paper: BART with features of images
    path: ModelPath  # a saved VL-BART or a plain BART: a folder or a hub name
    random: bool = False  # read only the config from `path`, and initialize the weights from the seed
    # The kind of visual input; null: image for a plain BART. A saved VL-BART has one, which must match.
    visual: Literal["image", "video"] | None = None
    feature_dim: PositiveInt | None = None  # channels of the visual features; null: from the vision section


def _of_family(name: str) -> Any:
    return Annotated[load(VL_FAMILIES[name].section), Tag(name)]


CHOICE = SectionChoice("family", default=DEFAULT)
BY_FAMILY = Discriminator(CHOICE.tag_of)
if TYPE_CHECKING:
    VLModelConfig: TypeAlias = VLMModelConfig | VLBartModelConfig
else:
    VLModelConfig = Annotated[reduce(or_, map(_of_family, VL_FAMILIES.built_in)), BY_FAMILY]


def add_vl_family(name: str) -> None:
    """Gives all `model` sections of vision-language models the class of a family as one more choice.

    Args:
        name: A key of VL_FAMILIES; another name adds all families, among which a message then lists them.
    """
    if name in VL_FAMILIES.built_in:
        return
    added = [_of_family(each) for each in ([name] if name in VL_FAMILIES else VL_FAMILIES)]
    fields = [field for section in _subclasses(Section) for field in section.model_fields.values()]
    unions: list[tuple[Any, Any]] = [
        (field, reduce(or_, added, field.annotation)) for field in fields if BY_FAMILY in field.metadata
    ]
    if any(union != field.annotation for field, union in unions):
        for field, union in unions:
            field.annotation = union
        _rebuild()


def validated(schema: type[SectionT], values: Any) -> SectionT:
    """Validates a config or a `model` section, which may name families of other packages.

    Raises:
        ValidationError: They do not fit the schema.
        ValueError: A package that adds a family cannot be imported.
    """
    field = schema.model_fields.get("model")
    model = values if schema is ModelConfig else values.get("model") if field and isinstance(values, Mapping) else None
    if isinstance(model, Mapping):
        if field and BY_FAMILY in field.metadata:
            add_vl_family(CHOICE.tag_of(model))
        else:
            add_sections(name for name in model if name not in ModelConfig.model_fields and name in IMAGE_FAMILIES)
    return schema.model_validate(values)
