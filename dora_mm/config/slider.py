"""The config of a training of a slider: an adapter whose strength moves an attribute both ways. See schema.py."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from dora_mm.config.adapter import ImageAdapterConfig, check_adapter
from dora_mm.config.generation import ContactSheetConfig, NumSteps, ScoredAdapterConfig
from dora_mm.config.images import Resolution
from dora_mm.config.models import ModelConfig
from dora_mm.config.schema import (
    Backend,
    InputPath,
    Items,
    NewFolder,
    NonNegative,
    PipelineConfig,
    Positive,
    Section,
    Seed,
    Text,
    raise_problems,
)
from dora_mm.config.training import CHANGEABLE, OptimizerConfig, ScheduleConfig, TrainConfig, check_training

THING = "{thing}"  # in captions: what each of `slider.things` replaces
OF_CAPTIONS = ("plus", "minus", "things", "eta", "strengths", "denoising_steps", "guidance")  # keys without pairs
SIDES = (1.0, -1.0)
Side = Literal["plus", "minus", "neutral"]


class ImagePairsConfig(Section):
    """Two folders of images, paired by their names: one shows less, and the other more of the attribute."""

    plus: InputPath  # at strength 1; metadata.jsonl or text files beside its images can caption them
    minus: InputPath  # at strength -1: an image of each name, in the same size


class SliderConfig(Section):
    """The attribute that the strength moves, by captions or by pairs of images."""

    plus: Text | None = None  # the caption at strength 1; null: images is set
    minus: Text | None = None  # the caption at strength -1; null: images is set
    neutral: str = ""  # the caption that is trained: what the attribute belongs to
    # Replace {thing} in captions, so that a slider for one attribute moves no other; empty: no replacement
    things: Items[Text] = ()
    eta: Positive = 1.0  # how far strength 1 moves, as a multiple of the difference between plus and minus
    strengths: Annotated[Items[float], Field(min_length=1)] = SIDES  # the trained strengths, one pass for each
    denoising_steps: NumSteps = 20  # denoising steps with which the base model makes the noisy latents
    guidance: NonNegative = 3.0  # guidance scale of these steps; 1: none
    resolution: Resolution | None = None  # pixels of a side; null: the model's own
    images: ImagePairsConfig | None = None  # null: plus and minus are set, and no images are needed

    @model_validator(mode="before")
    @classmethod
    def _is_one(cls, values: Any) -> Any:
        if isinstance(values, list | tuple):
            raise ValueError(
                "one adapter holds one slider: train each of them in a run of its own, and add their adapters when "
                "you generate, each with a strength of its own"
            )
        return values

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> "SliderConfig":
        problems = []
        if self.images is not None:
            defaults = type(self).model_fields  # a saved config names all keys
            without = [key for key in OF_CAPTIONS if getattr(self, key) != defaults[key].default]
            problems += [f"{key} has no effect with images: leave it out" for key in without]
        elif self.plus is None or self.minus is None:
            problems.append("give plus and minus, the captions of both sides, or images, the folders of both")
        elif self.plus == self.minus:
            problems.append("plus and minus are the same caption: nothing would move")
        captions = {"plus": self.plus, "minus": self.minus, "neutral": self.neutral}
        for key, caption in captions.items():
            if self.images is None and caption is not None and caption.count(THING) != bool(self.things):
                how = f"must contain {THING} once, for things" if self.things else f"contains {THING}: give things"
                problems.append(f"{key} {how}")
        if not (min(self.strengths) < 0 < max(self.strengths)) or 0.0 in self.strengths:
            problems.append("strengths needs one above 0 and one below, and none of 0, which is the base model")
        if len(set(self.strengths)) < len(self.strengths):
            problems.append("strengths names one twice")
        return raise_problems(self, problems)

    @property
    def mean_base_passes(self) -> float:
        """The passes of the base model for a batch, on average: for the noisy latents, and three for the target."""
        return (1 if self.guidance == 1 else 2) * (self.denoising_steps - 1) / 2 + 3

    def caption(self, key: Side, thing: str | None) -> str:
        """One of the captions, about one of `things`."""
        return getattr(self, key).replace(THING, thing or "")


STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)


class SliderSampleConfig(ContactSheetConfig):
    """The grid of a slider: a column for each strength, and a row for each prompt and seed."""

    prompts: Items[Text] = ()  # empty: the neutral caption, of the first three things
    strengths: Annotated[Items[float], Field(min_length=1)] = STRENGTHS  # 0: the base model
    seeds: Annotated[Items[Seed], Field(min_length=1)] = (0,)  # one row per prompt and seed

    @model_validator(mode="after")
    def _needs_no_references(self) -> "SliderSampleConfig":
        if self.images:
            raise ValueError("images has no effect: the grid of a slider is generated from prompts alone")
        return self


class TrainSliderConfig(PipelineConfig):
    command: ClassVar[str] = "train"
    changeable: ClassVar[tuple[str, ...]] = (
        *(key for key in CHANGEABLE if key != "train.gradients_at"),
        "adapter.strength",
        "sample",
    )
    pipeline: Literal["train_slider"]
    seed: Seed = 0  # seed of everything random in the run
    output: NewFolder | None = None  # the run directory, which must not exist yet; null: runs/<name>/<NNN>
    backend: Backend = "auto"  # implementation of the adapted layers, see dora_mm/backend.py
    model: ModelConfig
    adapter: ImageAdapterConfig
    slider: SliderConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    sample: SliderSampleConfig = SliderSampleConfig()

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strengths that are trained, of which each micro-batch has one."""
        return SIDES if self.slider.images else self.slider.strengths

    @property
    def train_by_strength(self) -> TrainConfig:
        """The `train` section whose micro-batches have one strength each: a backward pass of its own."""
        passes = self.train.gradient_accumulation_steps * len(self.strengths)
        return self.train.model_copy(update={"gradient_accumulation_steps": passes})

    @model_validator(mode="after")
    def _sections_agree(self) -> "TrainSliderConfig":
        problems = check_training(self.optimizer, self.schedule, self.train, self.model.dtype)
        problems += check_adapter(self.adapter, self.optimizer)
        if "full" in self.adapter.methods:
            problems.append("adapter.method full has no strength, which is what a slider moves")
        if self.adapter.trains_text_encoders:
            problems.append("adapter.parts: a slider is trained in the denoiser alone: leave out text encoders")
        if self.adapter.init_from is not None:
            problems.append("adapter.init_from: one adapter holds one slider, which starts from a fresh adapter")
        problems += [
            f"train.{key} is not for sliders, whose strength changes within a step: leave it out"
            for key in ("shard", "compile")
            if getattr(self.train, key)
        ]
        return raise_problems(self, problems)


class EvalSliderConfig(ScoredAdapterConfig):
    """Generates images at several strengths of a slider, and measures the attribute and everything else."""

    pipeline: Literal["eval_slider"]
    strengths: Annotated[Items[float], Field(min_length=2)] = STRENGTHS  # the scored strengths; 0: the base model
    things: Items[Text] = ()  # replace {thing} in the training's captions; empty: those of the training
    control: bool = True  # whether a random adapter of equal norm is scored as a control

    @model_validator(mode="after")
    def _strengths_differ(self) -> "EvalSliderConfig":
        if len(set(self.strengths)) < len(self.strengths):
            raise ValueError("strengths names one twice")
        return self
