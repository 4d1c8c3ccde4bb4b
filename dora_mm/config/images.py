"""The config of a training on captioned images. See schema.py for the rules."""

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from dora_mm.config.adapter import ImageAdapterConfig, check_adapter
from dora_mm.config.generation import SampleConfig
from dora_mm.config.losses import LossConfig
from dora_mm.config.models import ModelConfig
from dora_mm.config.resolutions import Resolution, Resolutions, check_resolutions
from dora_mm.config.schema import (
    Backend,
    Count,
    InputPath,
    Items,
    NewFolder,
    NonNegative,
    PipelineConfig,
    Positive,
    ReferenceArea,
    Section,
    Seed,
    Share,
    Text,
    raise_problems,
)
from dora_mm.config.streaming import ImageStreamConfig, check_streaming
from dora_mm.config.training import (
    CHANGEABLE,
    AdapterTrainConfig,
    EMAConfig,
    EpochTrainConfig,
    OptimizerConfig,
    ScheduleConfig,
    ValidationConfig,
    check_sharding,
    check_training,
    check_validation,
)
from dora_mm.utils.folders import Links


class HeldOutImagesConfig(Section):
    """Held-out images, whose loss validates the training."""

    exclusive: ClassVar[tuple[tuple[str, str], ...]] = (("share", "folder"),)

    # The share of the images of data.folder; which ones depends on their content alone. null: folder is set
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    folder: InputPath | None = None  # a folder of its own, captioned like data.folder; null: share is set
    limit: PositiveInt | None = None  # the highest number of these images; null: no limit

    @model_validator(mode="after")
    def _one_of_both(self) -> "HeldOutImagesConfig":
        if (self.share is None) == (self.folder is None):
            raise ValueError("give either share or folder")
        return self


class ImageFolderConfig(Section):
    """One of several folders of images."""

    path: InputPath  # as data.folder
    # preserve: images for the `preserve` section, with their own captions; validate: held out, as data.valid
    role: Literal["train", "preserve", "validate"] = "train"
    repeats: Positive = 1.0  # how often each image occurs in an epoch, times data.repeats; 0.5: in every second epoch
    # Of the losses of its images: a step's loss is divided by the sum of weights, so it acts between images of one step
    weight: Positive = 1.0
    prompt: Text | None = None  # the caption of images without one; null: data.instance_prompt
    resolution: Resolution | None = None  # pixels; null: data.resolution or data.resolutions
    masks: InputPath | None = None  # as data.mask.folder
    references: Items[InputPath] = ()  # as data.references

    @model_validator(mode="after")
    def _has_an_effect(self) -> "ImageFolderConfig":
        if self.role == "validate" and (self.repeats, self.weight) != (1.0, 1.0):
            raise ValueError("repeats and weight have no effect on a folder of role validate: leave them out")
        if self.role == "preserve" and self.weight != 1.0:
            raise ValueError("weight has no effect on a folder of role preserve: set preserve.weight")
        if self.role == "preserve" and self.masks:
            raise ValueError("masks have no effect on a folder of role preserve: leave them out")
        if self.role == "preserve" and self.references:
            raise ValueError("references are not for a folder of role preserve: leave them out")
        return self


class CaptionConfig(Section):
    """Caption processing, repeated in every epoch; tags are separated by commas."""

    prefix: Text | None = None  # before every caption, with a space; never moved or dropped; null: none
    suffix: Text | None = None  # after every caption, likewise
    lines: bool = False  # each line of a text is a caption of its own, of which one is sampled
    alternatives: bool = False  # one of {a|b} is sampled; as in prompts, a backslash before the brace leaves it
    shuffle: bool = False  # shuffle the tags
    tag_dropout: Share = 0.0  # probability of leaving out a tag
    # The first tags that are neither moved nor dropped; of a caption with |||, all before it, and behind a second one
    keep: Count = 0

    @model_validator(mode="after")
    def _keeps_from_something(self) -> "CaptionConfig":
        if self.keep and not self.shuffle and not self.tag_dropout:
            raise ValueError("keep has no effect without shuffle or tag_dropout: leave it out")
        return self


class MaskConfig(Section):
    """Loss masks: the loss of an image is sum(w loss) / sum(w) over its pixels, with w = max(mask, floor)."""

    # file: a file next to cat.jpg, cat.mask.png or OneTrainer's cat-masklabel.png, white counts; alpha: what is opaque
    source: Literal["file", "alpha"] = "file"
    # A folder of masks that are named as the images of data.folder; null: they lie next to the images
    folder: InputPath | None = None
    floor: Share = 0.1  # the lowest weight of a pixel
    # base: where the mask is black, the prediction is held at that of the base model, by (1 - w) (difference)^2
    outside: Literal["ignored", "base"] = "ignored"

    @model_validator(mode="after")
    def _folder_is_of_files(self) -> "MaskConfig":
        if self.folder is not None and self.source == "alpha":
            raise ValueError("folder has no effect with source alpha: leave one of them out")
        return self


class DataConfig(Section):
    exclusive: ClassVar[tuple[tuple[str, str], ...]] = (("folder", "folders"), ("resolution", "resolutions"))

    # Images, with captions in metadata.jsonl, metadata.csv, or <name>.txt or <name>.caption files, or without captions
    folder: InputPath | None = None  # null: folders are set
    folders: Items[ImageFolderConfig] = ()  # several, each with its own settings; empty: folder is set
    # Whether links that lead out of their folder are followed; those of the hub's cache are, without it
    follow_links: bool = False
    subfolders: bool = False  # whether images in subfolders count; those in 10_name then occur 10 times in an epoch
    # Pixels; an image has an area of about resolution x resolution and keeps its aspect ratio
    resolution: Resolution | None = None  # null: resolutions are set
    # Several: an epoch has every image once at each that it is large enough for, and at least at the smallest one
    resolutions: Resolutions = ()  # empty: resolution is set
    instance_prompt: Text | None = None  # the caption of images without one; null: every image needs a caption
    # Files that look like captions and are not used: stop: they are an error; ignore: they are named
    unused_captions: Literal["stop", "ignore"] = "stop"
    placeholder: Text | None = None  # a word that must occur in a caption, such as TOK; null: no check
    repeats: PositiveInt = 1  # how often each image occurs in an epoch
    background: Text = "white"  # behind transparent images: a colour name or #rrggbb
    flip: bool = False  # augmentation: mirror images at random
    crop: Literal["center", "random"] = "center"  # what remains when an image exceeds the target size
    captions: CaptionConfig | None = None  # caption processing; null: none
    caption_dropout: Share = 0.0  # probability of training an image without its caption
    mask: MaskConfig | None = None  # loss masks; null: none
    # Folders of reference images, for models that edit: a.png, or a_1.png and a_2.png, for a.png in data.folder; of
    # several folders the first has the first reference of each image. metadata.jsonl can name them instead
    references: Items[InputPath] = ()
    # To how many pixels a larger reference is scaled down; pipeline: as the model's pipeline does; target: those of the
    # training image
    reference_area: ReferenceArea = "pipeline"
    reference_dropout: Share = 0.0  # probability of training a batch without its references
    latent_cache: Text | None = None  # a folder that keeps latents between runs; null: in memory only
    text_cache: Text | None = None  # a folder that keeps encoded captions, also between runs; null: in memory
    valid: HeldOutImagesConfig | None = None  # held-out images; null: none

    @property
    def all_folders(self) -> dict[str, ImageFolderConfig]:
        """All folders by their keys, also where there is one."""
        if self.folder is not None:
            masks = self.mask and self.mask.folder
            return {"data.folder": ImageFolderConfig(path=self.folder, masks=masks, references=self.references)}
        return {f"data.folders[{number}]": folder for number, folder in enumerate(self.folders)}

    @property
    def links(self) -> Links:
        """What becomes of links that lead out of the folders."""
        return Links(self.follow_links, "set data.follow_links=true")

    @property
    def all_resolutions(self) -> tuple[int, ...]:
        """The resolutions in ascending order, also where there is one."""
        return self.resolutions if self.resolution is None else (self.resolution,)

    @property
    def has_class_images(self) -> bool:
        """Whether the model is held on images of their own."""
        return any(folder.role == "preserve" for folder in self.folders)

    @property
    def holds_out(self) -> bool:
        """Whether some images are not trained on."""
        return self.valid is not None or any(folder.role == "validate" for folder in self.folders)

    @model_validator(mode="after")
    def _folders_agree(self) -> "DataConfig":
        problems = check_resolutions(self.resolution, self.resolutions)
        if (self.folder is None) == (not self.folders):
            problems.append("give either folder or folders")
        roles = {folder.role for folder in self.folders}
        if self.folders and "train" not in roles:
            problems.append("no folder has the role train")
        if self.valid is not None and "validate" in roles:
            problems.append("give either valid or a folder of role validate")
        if self.valid is not None and self.valid.folder is not None and self.folders:
            problems.append("valid.folder belongs to data.folder: give a folder of role validate instead")
        if self.mask and self.mask.folder and self.folders:
            problems.append("mask.folder belongs to data.folder: give masks to each of folders instead")
        if self.references and self.folders:
            problems.append("references belongs to data.folder: give references to each of folders instead")
        if any(folder.masks for folder in self.folders) and (self.mask is None or self.mask.source == "alpha"):
            problems.append("masks of folders have no effect without mask of source file: set mask, or leave them out")
        return raise_problems(self, problems)

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


class PreserveConfig(Section):
    """Prior preservation: keeps the base model's predictions on prompts that should not change.

    A loss of its own: the distance (`loss.type`) of the prediction from that of the base model, mean over its images,
    times `weight`, added to the mean over the training's. Its images are those of the batch, at the same noise, or
    those of folders of role preserve.
    """

    # Of these images: "" for no prompt, or a class such as "an icon"; null: their captions without data.placeholder,
    # and of folders of role preserve their captions
    prompt: str | None = None
    weight: NonNegative = 1.0  # weight of this loss
    every: PositiveInt = 1  # optimizer steps


class TokenConfig(Section):
    """A word of captions and prompts that stands for new tokens, with embeddings of their own."""

    count: PositiveInt | None = None  # number of tokens; null: as many as init has, or 2
    # Words whose embeddings they start as; null: sampled at random, as long as the tables' rows are on average
    init: Text | None = None
    lr: Positive | None = None  # learning rate; null: optimizer.lr


class ImageTrainConfig(EpochTrainConfig, AdapterTrainConfig):
    # The last step that trains them (the pivot of pivotal tuning); null: the last step of the training
    stop_tokens_after: PositiveInt | None = None  # for new tokens
    stop_text_encoders_after: PositiveInt | None = None  # the same for adapters of text encoders


class TrainDiffusionConfig(PipelineConfig):
    command: ClassVar[str] = "train"
    changeable: ClassVar[tuple[str, ...]] = (
        *CHANGEABLE,
        "train.epochs",
        "adapter.strength",
        "adapter.assistant.in_samples",
        "data.latent_cache",
        "evaluate",  # the held-out loss of a step is the same, however often it is computed
        "memory",
        "sample",
    )
    pipeline: Literal["train_diffusion"]
    seed: Seed = 0  # seed of everything random in the run
    output: NewFolder | None = None  # the run directory, which must not exist yet; null: runs/<name>/<NNN>
    backend: Backend = "auto"  # implementation of the adapted layers, see dora_mm/backend.py
    model: ModelConfig
    adapter: ImageAdapterConfig
    # New tokens by the word that captions have for them; empty: no new tokens
    tokens: dict[str, TokenConfig] = Field(default_factory=dict)
    data: DataConfig
    loss: LossConfig = LossConfig()
    preserve: PreserveConfig | None = None  # prior preservation; null: none
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    ema: EMAConfig | None = None  # exponential moving average of the weights, saved in adapter-ema/; null: none
    train: ImageTrainConfig
    memory: ImageStreamConfig = ImageStreamConfig()  # frozen weights that stay in main memory until they are used
    evaluate: ValidationConfig = ValidationConfig()
    sample: SampleConfig = SampleConfig()

    @field_validator("tokens")
    @classmethod
    def _tokens_are_words(cls, tokens: dict[str, TokenConfig]) -> dict[str, TokenConfig]:
        for word in tokens:
            if not re.fullmatch(r"[\w-]*\w", word):  # a word of a text, and the name of a file
                raise ValueError(f"a new token is a word of letters, digits, _ and -, got {word!r}")
        return tokens

    @property
    def trains_text(self) -> bool:
        """Whether the embeddings of some prompts change during the training."""
        return self.adapter.trains_text_encoders or bool(self.tokens)

    @model_validator(mode="after")
    def _sections_agree(self) -> "TrainDiffusionConfig":
        problems = check_training(self.optimizer, self.schedule, self.train, self.model.dtype, self.ema)
        problems += check_adapter(self.adapter, self.optimizer)
        problems += check_sharding(self.train, self.adapter.cache, self.model.quantization)
        problems += check_streaming(self.memory, self.train, self.adapter.methods, self.adapter.cache)
        problems += check_validation(self.evaluate, self.data.holds_out, "data.valid is null")
        full = "full" in self.adapter.methods
        if full and self.data.mask and self.data.mask.outside == "base":
            problems.append("data.mask.outside base needs the base model, whose weights adapter.method full changes")
        problems += self._check_preserve(full=full)
        problems += self._check_text()
        if full and self.model.quantization:
            problems.append("adapter.method full trains the base weights, which model.quantization rounds")
        if full and self.model.dtype != "float32":
            problems.append("adapter.method full trains the base weights, so model.dtype must be float32")
        if self.data.latent_cache is not None and self.data.crop == "random":
            problems.append("data.latent_cache cannot be used with data.crop random: every crop is new")
        if self.data.text_cache is not None and self.adapter.trains_text_encoders:
            problems.append("data.text_cache has no effect where text encoders are trained: leave it out")
        if self.model.text_quantization and self.trains_text:
            problems.append("model.text_quantization rounds what adapter.parts or tokens train: leave one of them out")
        if self.sample.every and not self.sample.prompts:
            problems.append("sample.every has no effect: sample.prompts is empty")
        problems += self._check_assistant(full=full)
        if full and self.adapter.strength != 1.0:
            problems.append("adapter.strength must be 1 for adapter.method full: it keeps no base weights")
        return raise_problems(self, problems)

    def _check_text(self) -> list[str]:
        """Problems with new tokens, and with the last steps of training tokens and text encoders."""
        rated = [word for word, token in self.tokens.items() if token.lr is not None]
        problems = []
        if rated and self.optimizer.name == "prodigy":
            problems.append(f"tokens.{rated[0]}.lr has no effect: prodigy finds one rate for all")
        trained = {
            "stop_tokens_after": (bool(self.tokens), "there are no tokens"),
            "stop_text_encoders_after": (self.adapter.trains_text_encoders, "no text encoder is adapted"),
        }
        for key, (is_trained, why) in trained.items():
            last = getattr(self.train, key)
            if last is not None and not is_trained:
                problems.append(f"train.{key} has no effect: {why}")
            elif last is not None and self.train.steps is not None and last >= self.train.steps:
                problems.append(f"train.{key} ({last}) must be below train.steps ({self.train.steps})")
        return problems

    def _check_assistant(self, *, full: bool) -> list[str]:
        if self.adapter.assistant is None:
            return []
        problems = ["adapter.assistant needs the base weights, which adapter.method full changes"] if full else []
        if self.adapter.assistant.in_samples and not self.sample.prompts:
            problems.append("adapter.assistant.in_samples has no effect: sample.prompts is empty")
        return problems

    def _check_preserve(self, *, full: bool) -> list[str]:
        if self.preserve is None:
            return ["a folder of role preserve needs the section preserve"] if self.data.has_class_images else []
        problems = []
        if full:
            problems.append("preserve needs the base model, whose weights adapter.method full changes")
        if self.data.has_class_images and self.preserve.prompt is not None:
            problems.append("preserve.prompt has no effect: folders of role preserve have captions of their own")
        captions = self.data.captions
        from_captions = self.preserve.prompt is None and not self.data.has_class_images
        if from_captions and captions and captions.tag_dropout and not captions.keep:
            problems.append(
                "preserve.prompt null removes data.placeholder, which data.captions.tag_dropout may have dropped: set "
                "preserve.prompt, or data.captions.keep for the tags with the placeholder"
            )
        if from_captions and self.data.placeholder is None:
            problems.append(
                "preserve without a prompt uses the captions without data.placeholder, but there is none: set "
                "preserve.prompt (a class such as 'an icon') or data.placeholder"
            )
        return problems
