"""The schemas of the configs in samples/build/configs, under the rules of dora_mm/config/schema.py."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from dora_mm.config.generation import ContactSheetConfig, PixelSize
from dora_mm.config.images import LossConfig
from dora_mm.config.models import ModelConfig, VisionConfig
from dora_mm.config.schema import Items, PipelineConfig, Section, Seed, Share, Text, raise_problems
from dora_mm.config.training import (
    EpochTrainConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    check_training,
)
from dora_mm.config.vl import EvaluateConfig
from dora_mm.config.vl_data import VLDataConfig


class PretrainStage(Section):
    """How one stage is trained."""

    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig


class DecoderStage(PretrainStage):
    """How the stage of the decoder alone is trained."""

    max_time: PositiveInt = 150  # the highest of the scheduler's 1000 timesteps to which latents are noised


class TinyModelConfig(Section):
    """Sizes of the embedded SDXL model."""

    resolution: PixelSize = 128
    num_merges: Annotated[int, Field(ge=0, le=4096)] = 2000  # of CLIP's byte-pair merges, for the vocabulary
    # Channels of each level; each level after the first halves the side.
    vae_channels: Annotated[Items[PositiveInt], Field(min_length=2)] = (16, 32, 64, 64)
    # SDXL has 4. Compressing 48 numbers to one, a VAE this small loses colour before it loses shapes; 8 keep both.
    latent_channels: PositiveInt = 8
    unet_channels: Annotated[tuple[PositiveInt, PositiveInt, PositiveInt], Field(strict=False)] = (48, 96, 128)


class PretrainTinyConfig(PipelineConfig):
    """Pretrains the embedded SDXL model: its VAE, then text encoders and UNet, then the decoder again."""

    command: ClassVar[str] = "train"
    pipeline: Literal["pretrain_tiny"]
    seed: Seed = 0
    output: Text | None = None
    icons: Text = "build/icons"  # the folder that `python -m samples.build icons` makes
    model: TinyModelConfig = TinyModelConfig()
    vae_from: Text | None = None  # a model folder whose trained VAE is used; null: the VAE is trained
    unet_from: Text | None = None  # a model folder whose UNet and text encoders are trained further; null: from scratch
    vae: PretrainStage
    unet: PretrainStage | None  # null: the UNet and text encoders of unet_from are not trained
    decoder: DecoderStage | None = None  # trains the VAE's decoder on latents predicted by the UNet; null: skipped
    loss: LossConfig = LossConfig()
    caption_dropout: Share = 0.1  # share of the training images without a caption, for classifier-free guidance
    unnamed_style: Share = 0.75  # of the flat icons, whose captions do not name the style: flat becomes the default
    ema_decay: Share = 0.999  # of the averaged weights, which are saved
    sample: ContactSheetConfig = ContactSheetConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> "PretrainTinyConfig":
        problems = []
        if not self.unet and not (self.unet_from and self.decoder):
            problems.append("unet: null trains only the decoder, for a trained UNet: set unet_from and decoder")
        configured = {"vae": self.vae, "unet": self.unet, "decoder": self.decoder}
        stages = {name: stage for name, stage in configured.items() if stage}
        for name, stage in stages.items():
            problems += check_training(stage.optimizer, stage.schedule, stage.train)
            if stage.optimizer.magnitude_lr is not None:
                problems.append(f"{name}.optimizer.magnitude_lr: a base model has no magnitudes, remove it")
        if len({stage.train.mixed_precision for stage in stages.values()}) > 1:
            problems.append(f"train.mixed_precision must be the same in {', '.join(stages)}")
        return raise_problems(self, problems)


class TinyZImageConfig(Section):
    """Sizes of the embedded Z-Image."""

    num_merges: Annotated[int, Field(ge=0, le=4096)] = 600  # byte-pair merges of its tokenizer
    text_width: Annotated[int, Field(gt=0, multiple_of=16)] = 64  # of the text encoder
    width: PositiveInt = 112  # of the transformer
    layers: PositiveInt = 3  # of the transformer, that read picture and prompt
    heads: PositiveInt = 4  # attention heads of each layer

    @model_validator(mode="after")
    def _heads_are_even(self) -> "TinyZImageConfig":
        if self.width % (2 * self.heads) or self.width // self.heads < 6:
            raise ValueError(f"width ({self.width}) must give each of the heads ({self.heads}) an even number from 6")
        return self


class TinyKleinConfig(Section):
    """Sizes of the embedded FLUX.2 klein."""

    num_merges: Annotated[int, Field(ge=0, le=4096)] = 600  # byte-pair merges of its tokenizer
    max_tokens: Annotated[int, Field(ge=16)] = 40  # that prompts are filled up to
    text_width: Annotated[int, Field(gt=0, multiple_of=16)] = 32  # of the text encoder
    width: PositiveInt = 72  # of the transformer
    layers: PositiveInt = 1  # of the transformer, with a stream for the picture and one for the prompt
    single_layers: PositiveInt = 4  # those with one stream
    heads: PositiveInt = 3  # attention heads of each layer
    mlp_ratio: Annotated[float, Field(gt=0)] = 2.0  # hidden size of the feed-forward layers, by the width

    @model_validator(mode="after")
    def _heads_fit(self) -> "TinyKleinConfig":
        if self.width % (4 * self.heads) or self.width // self.heads < 12:
            raise ValueError(f"width ({self.width}) must give each of the heads ({self.heads}) a multiple of 4 from 12")
        return self


class PretrainTinyFlowConfig(PipelineConfig):
    """Pretrains an embedded flow model: transformer and text encoder, around a trained VAE."""

    command: ClassVar[str] = "train"
    seed: Seed = 0
    output: Text | None = None
    icons: Text = "build/icons"  # the folder that `python -m samples.build icons` makes
    vae: Text = "samples/tiny-sdxl/vae"  # the folder of the VAE
    # How many of the 237 things that adapters are scored on, beside those of samples/lego: what eval_diffusion chooses
    # with the same concepts.count, or with one that divides it
    reported: PositiveInt = 48
    loss: LossConfig = LossConfig()
    caption_dropout: Share = 0.1  # share of the training images without a caption, for classifier-free guidance
    unnamed_style: Share = 0.75  # of the icons, whose captions do not name the style
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    compile: bool = False  # the transformer's blocks by torch.compile, which needs a C++ compiler
    ema_decay: Share = 0.999  # of the averaged weights, which are saved
    sample: ContactSheetConfig = ContactSheetConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> "PretrainTinyFlowConfig":
        return raise_problems(self, check_training(self.optimizer, self.schedule, self.train))


class PretrainTinyZImageConfig(PretrainTinyFlowConfig):
    """Pretrains the embedded Z-Image; the VAE's weights are not saved with it."""

    pipeline: Literal["pretrain_tiny_z_image"]
    model: TinyZImageConfig = TinyZImageConfig()


class PretrainTinyKleinConfig(PretrainTinyFlowConfig):
    """Pretrains the embedded FLUX.2 klein, also on editing pairs."""

    pipeline: Literal["pretrain_tiny_klein"]
    model: TinyKleinConfig = TinyKleinConfig()
    pairs_every: Annotated[int, Field(ge=2)] = 2  # of so many batches one has references
    pairs_batch_size: PositiveInt = 16  # of these batches, whose rows are longer


class FitClassifierConfig(PipelineConfig):
    """Fits the judge on the real icons, for one model."""

    command: ClassVar[str] = "eval"
    pipeline: Literal["fit_judge"]
    output: Text | None = None
    model: ModelConfig  # the model whose VAE and UNet the real icons pass through
    icons: Text = "build/icons"  # the folder that `python -m samples.build icons` makes
    # The highest of the scheduler's 1000 timesteps to which icons are noised before the UNet denoises them in one step.
    max_time: PositiveInt = 150


class TinyVLConfig(Section):
    """Sizes of the embedded VL-BART."""

    num_merges: Annotated[int, Field(ge=0, le=4096)] = 2000  # byte-pair merges of its tokenizer
    width: PositiveInt = 192
    layers: PositiveInt = 3  # of the encoder, and of the decoder
    heads: PositiveInt = 6  # attention heads of each layer


class PretrainTinyVLConfig(PipelineConfig):
    """Pretrains the embedded VL-BART on captions of scenes; its tokenizer is trained on the other tasks as well."""

    command: ClassVar[str] = "train"
    pipeline: Literal["pretrain_tiny_vl"]
    seed: Seed = 0
    output: Text | None = None
    model: TinyVLConfig = TinyVLConfig()
    vision: VisionConfig
    fill_share: Share = 0.6  # share of the examples in which the model fills in masked words instead of captioning
    data: VLDataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    train: EpochTrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> "PretrainTinyVLConfig":
        problems = check_training(self.optimizer, self.schedule, self.train)
        if not any(task.task == "caption" and task.train and task.valid for task in self.data.all_tasks):
            problems.append("data.tasks: the task caption is missing, with train and valid: the model is trained on it")
        if self.model.width % self.model.heads:
            problems.append(f"model.width ({self.model.width}) must be a multiple of model.heads ({self.model.heads})")
        return raise_problems(self, problems)


class PretrainTinyVLMConfig(PipelineConfig):
    """Trains the projector and the tower's last stage of the embedded vision-language model."""

    command: ClassVar[str] = "train"
    pipeline: Literal["pretrain_tiny_vlm"]
    seed: Seed = 0
    output: Text | None = None
    scenes: Annotated[int, Field(ge=2)] = 16_000  # drawn for it, whose features are kept in build/features
    held_out: PositiveInt = 500  # of these, which are only scored
    words: PretrainStage  # tokens resemble the words for what they show
    sentences: PretrainStage  # captions through the frozen language model
    compile: bool = False  # the frozen language model by torch.compile, which needs a C++ compiler: twice as fast
    row_length: PositiveInt = 160  # tokens of a row of sentences: an image and some five captions

    @model_validator(mode="after")
    def _sections_agree(self) -> "PretrainTinyVLMConfig":
        problems = [] if self.held_out < self.scenes else ["held_out must be less than scenes"]
        for stage in (self.words, self.sentences):
            problems += check_training(stage.optimizer, stage.schedule, stage.train)
        return raise_problems(self, problems)


SCHEMAS: dict[str, type[PipelineConfig]] = {
    "pretrain_tiny": PretrainTinyConfig,
    "pretrain_tiny_z_image": PretrainTinyZImageConfig,
    "pretrain_tiny_klein": PretrainTinyKleinConfig,
    "pretrain_tiny_vl": PretrainTinyVLConfig,
    "pretrain_tiny_vlm": PretrainTinyVLMConfig,
    "fit_judge": FitClassifierConfig,
}
