"""The configs that score pictures with the judge of styles. See schema.py for the rules."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from dora_mm.config.models import ModelConfig
from dora_mm.config.pictures import AdapterFile
from dora_mm.config.schema import (
    InputPath,
    Items,
    NewFolder,
    NonNegative,
    PipelineConfig,
    Section,
    Seed,
    Text,
    raise_problems,
)


class RoleConfig(Section):
    """Which of the judge's concepts are drawn."""

    role: Literal["report", "tune", "icon3d", "lego", "all"] = "report"  # report: in no training set
    # How many concepts, evenly spaced over the list; null: all of the role. At least three: a concept held out of three
    # leaves two, the fewest that have a covariance.
    count: Annotated[int, Field(ge=3)] | None = 40


class ConceptChoice(RoleConfig):
    """Which of the judge's concepts are drawn, and with which seeds."""

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


def check_templates(**templates: str) -> list[str]:
    """Finds prompts, given by their config keys, that lack {thing}; one message per problem."""
    return [f"{key} must contain {{thing}} once" for key, text in templates.items() if text.count("{thing}") != 1]
