"""The config sections that name a model. See schema.py for the rules."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from dora_mm.config.schema import InputPath, Items, ModelPath, Section, Text
from dora_mm.config.vl_data import VLTask

EMBEDDED_IMAGE_MODEL = "samples/tiny-sdxl"  # draws where nothing names a model


class SDXLConfig(Section):
    """What only SDXL's models have."""

    # The embedding without a caption, in training: all zeros, as SDXL was trained, or the encoded empty text
    unconditional: Literal["zeros", "empty"] = "zeros"


class ZImageConfig(Section):
    """What only Z-Image's models have."""

    max_tokens: PositiveInt = 512  # of a prompt in its chat template; text beyond is cut


class ModelConfig(Section):
    """An image model; its files say of which family it is, and a section of another family is an error."""

    path: ModelPath  # a model folder, a hub name, or (SDXL) a single .safetensors checkpoint
    revision: Text | None = None  # a commit, branch or tag of a hub model; null: its main branch
    vae: ModelPath | None = None  # a folder or hub name of another VAE; null: the model's own
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # dtype of the frozen weights; adapters are float32
    sdxl: SDXLConfig | None = None  # null: its defaults
    z_image: ZImageConfig | None = None  # null: its defaults


class VisionConfig(Section):
    """The vision tower, frozen unless it is adapted, and the location of features that are already computed."""

    tower: Text = "RN101"  # a model of open_clip; timm/<name>: a model of timm
    pretrained: Text | None = "openai"  # a pretrained tag of the library, or a local file; null: random weights
    layers: Items[Text] = ()  # modules whose maps are concatenated on the coarsest grid; empty: the last
    features: Items[InputPath] = ()  # feature folders of dora-mm, .h5 files or .npz folders; empty: computed on the fly


Family = Literal["vlm", "vl_bart"]


OF_FAMILY: dict[str, Family] = {  # keys of the model section that only one family reads
    "random": "vl_bart",
    "visual": "vl_bart",
    "feature_dim": "vl_bart",
    "revision": "vlm",
    "dtype": "vlm",
    "attn_implementation": "vlm",
    "quantization": "vlm",
    "min_pixels": "vlm",
    "max_pixels": "vlm",
    "image_size": "vlm",
    "max_length": "vlm",
    "prompts": "vlm",
}


class VLModelConfig(Section):
    """The vision-language model: any of transformers' (family vlm), or VL-BART, which is made of a BART and a tower."""

    family: Family = "vlm"
    path: ModelPath  # a folder of save_pretrained, or a hub name; of vl_bart: a saved VL-BART or a plain BART
    revision: Text | None = None  # vlm: a commit, branch or tag of a hub model; null: the main branch
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # vlm: of the frozen weights
    attn_implementation: Text | None = None  # vlm: such as sdpa or flash_attention_2; null: what transformers chooses
    # vlm: the frozen weights in 8 or 4 bits, by bitsandbytes or torchao; null: not quantised
    quantization: Literal["int8", "nf4", "fp4", "torchao_int8"] | None = None
    min_pixels: PositiveInt | None = None  # vlm: of an image, where the processor keeps its shape (Qwen-VL)
    max_pixels: PositiveInt | None = None  # vlm: as min_pixels; more pixels are more tokens
    image_size: PositiveInt | None = None  # vlm: side in pixels, for processors that resize to a fixed size
    max_length: PositiveInt | None = None  # vlm: tokens per row of a training; text beyond is cut; null: positions
    prompts: dict[VLTask, Text] = Field(default_factory=dict)  # vlm: of a task, with {text} for the question
    random: bool = False  # vl_bart: read only the config from `path`, and initialize the weights from the seed
    # vl_bart: the kind of visual input; null: image for a plain BART. A saved VL-BART has one, which must match.
    visual: Literal["image", "video"] | None = None
    feature_dim: PositiveInt | None = None  # vl_bart: channels of the visual features; null: from the vision section

    @model_validator(mode="after")
    def _prompts_have_the_question(self) -> "VLModelConfig":
        for task, prompt in self.prompts.items():
            if task != "caption" and "{text}" not in prompt:
                raise ValueError(f"prompts: that of {task} needs {{text}}, the place of the question")
        return self

    @model_validator(mode="after")
    def _keys_are_of_the_family(self) -> "VLModelConfig":
        wrong = [key for key in self.model_fields_set if OF_FAMILY.get(key, self.family) != self.family]
        if changed := [key for key in sorted(wrong) if getattr(self, key) not in (None, False, "float32", {})]:
            raise ValueError("; ".join(f"{key} is for family {OF_FAMILY[key]}, not {self.family}" for key in changed))
        return self
