"""The configs that score pictures with the judge of styles. See schema.py for the rules."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from dora_mm.config.models import ModelConfig
from dora_mm.config.pictures import AdapterFile
from dora_mm.config.schema import (
    Count,
    InputPath,
    Items,
    NewFolder,
    NonNegative,
    OutputFolder,
    PipelineConfig,
    Section,
    Seed,
    Text,
    raise_problems,
)
from dora_mm.config.training import LearningRates


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


class EvalDiffusionConfig(PipelineConfig):
    command: ClassVar[str] = "eval"
    pipeline: Literal["eval_diffusion"]
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
    def _prompts_name_the_thing(self) -> "EvalDiffusionConfig":
        problems = check_templates(prompt=self.prompt, flat_prompt=self.flat_prompt)
        return raise_problems(self, problems + (check_templates(**{"clip.text": self.clip.text}) if self.clip else []))


class CompareImagesConfig(PipelineConfig):
    """Compares the base model, full fine-tuning, LoRA, DoRA and DoRA at half rank, each at its best learning rate."""

    command: ClassVar[str] = "eval"
    pipeline: Literal["compare_sdxl"]
    output: OutputFolder  # the campaign's folder; one that exists is resumed
    base: InputPath  # a config of train_diffusion, with the settings that all trainings share
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
    def _sections_agree(self) -> "CompareImagesConfig":
        problems = check_templates(prompt=self.prompt, flat_prompt=self.flat_prompt)
        if self.tune.role == self.report.role:
            problems.append("tune.role and report.role must differ: rates must not be chosen on the reported concepts")
        if len(self.report.seeds) < 2:
            problems.append("report.seeds needs at least two seeds: each is a training, and one has no variance")
        return raise_problems(self, problems)


def check_templates(**templates: str) -> list[str]:
    """Finds prompts, given by their config keys, that lack {thing}; one message per problem."""
    return [f"{key} must contain {{thing}} once" for key, text in templates.items() if text.count("{thing}") != 1]
