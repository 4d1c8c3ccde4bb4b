"""What a config of the recipes in this folder may say. The rules are those of dora_mm/config/schema.py."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from dora_mm.config.schema import (
    EpochTrainConfig,
    Items,
    OptimizerConfig,
    PipelineConfig,
    ScheduleConfig,
    Section,
    Seed,
    Share,
    Text,
    TrainConfig,
    check_training,
    raise_problems,
)
from dora_mm.config.sdxl import LossConfig, ModelConfig, PixelSize, SheetConfig
from dora_mm.config.vl import EvaluateConfig, VisionConfig, VLDataConfig, check_vl_training


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
    icons: Text = "build/icons"  # what `python -m samples.build icons` made
    model: TinyModelConfig = TinyModelConfig()
    vae_from: Text | None = None  # a model folder whose VAE is taken; None: it is trained
    unet_from: Text | None = None  # a model folder whose UNet and text encoders are trained further; None: from nothing
    vae: PretrainStage
    unet: PretrainStage | None  # None: the UNet and text encoders of unet_from stay as they are
    decoder: DecoderStage | None = None  # the VAE's decoder learns to read latents as the UNet leaves them; None: not
    loss: LossConfig = LossConfig()
    caption_dropout: Share = 0.1
    unnamed_style: Share = 0.75  # of the flat icons, whose captions do not say so: flat is what it draws by default
    ema_decay: Share = 0.999
    sample: SheetConfig = SheetConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> "PretrainTinyConfig":
        problems = []
        if not self.unet and not (self.unet_from and self.decoder):
            problems.append("unet: null trains the decoder for a finished UNet: give unet_from and decoder")
        every = {"vae": self.vae, "unet": self.unet, "decoder": self.decoder}
        stages = {name: stage for name, stage in every.items() if stage}
        for name, stage in stages.items():
            problems += check_training(stage.optimizer, stage.schedule, stage.train)
            if stage.optimizer.magnitude_lr is not None:
                problems.append(f"{name}.optimizer.magnitude_lr has nothing to train: a model has no magnitudes")
        if len({stage.train.mixed_precision for stage in stages.values()}) > 1:
            problems.append(f"train.mixed_precision must be the same in {', '.join(stages)}")
        return raise_problems(self, problems)


class FitJudgeConfig(PipelineConfig):
    command: ClassVar[str] = "eval"
    pipeline: Literal["fit_judge"]
    output: Text | None = None  # as in training
    model: ModelConfig  # what the real icons pass through
    icons: Text = "build/icons"  # what `python -m samples.build icons` made
    # Of the scheduler's 1000: icons are noised up to here and predicted back, as the UNet leaves them.
    max_time: PositiveInt = 150


class TinyVLConfig(Section):
    """Sizes of the embedded VL-BART."""

    num_merges: Annotated[int, Field(ge=0, le=4096)] = 2000
    width: PositiveInt = 192
    layers: PositiveInt = 3  # of the encoder, and of the decoder
    heads: PositiveInt = 6


class PretrainTinyVLConfig(PipelineConfig):
    """The embedded VL-BART from nothing, on captions of scenes; its tokenizer knows the words of other tasks too."""

    command: ClassVar[str] = "train"
    pipeline: Literal["pretrain_tiny_vl"]
    seed: Seed = 0
    output: Text | None = None
    model: TinyVLConfig = TinyVLConfig()
    vision: VisionConfig
    fill_share: Share = 0.6  # of the rows: the model reads the caption with a few words masked, and writes these
    data: VLDataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    train: EpochTrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> "PretrainTinyVLConfig":
        problems = check_vl_training(self.optimizer, self.schedule, self.train)
        if not any(task.task == "caption" and task.train and task.valid for task in self.data.tasks):
            problems.append("data.tasks: caption is missing, with train and valid: it is what the model learns")
        if self.model.width % self.model.heads:
            problems.append(f"model.width ({self.model.width}) must be a multiple of model.heads ({self.model.heads})")
        return raise_problems(self, problems)


SCHEMAS: dict[str, type[PipelineConfig]] = {
    "pretrain_tiny": PretrainTinyConfig,
    "pretrain_tiny_vl": PretrainTinyVLConfig,
    "fit_judge": FitJudgeConfig,
}
