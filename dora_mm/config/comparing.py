"""The config that compares methods of training, on pictures or on questions. See schema.py for the rules."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from dora_mm.config.pictures import ConceptChoice, DrawConfig, JudgedStyle, RoleConfig, check_templates
from dora_mm.config.schema import (
    Count,
    InputPath,
    Items,
    OutputFolder,
    PipelineConfig,
    Section,
    Seed,
    Text,
    raise_problems,
)
from dora_mm.config.training import LearningRates
from dora_mm.config.vl import DecodeConfig, check_decoding
from dora_mm.config.vl_data import VLDataConfig, missing_splits


class ComparePicturesConfig(Section):
    """Adapters of a style, scored by a judge on things that they were not trained on."""

    judge: InputPath  # the folder of a fitted judge
    style: JudgedStyle  # the target style
    prompt: Text  # asks for the target style; {thing} is replaced by the concept
    flat_prompt: Text = "a flat icon of {thing}"  # asks for the style that the base model knows
    tune: ConceptChoice = ConceptChoice(role="tune", count=24, seeds=(0, 1))  # learning rates are chosen on these
    report: RoleConfig = RoleConfig()  # the reported scores; a training draws each of them once, with its own seed
    draw: DrawConfig = DrawConfig()
    columns: PositiveInt = 8  # concepts shown in the sheet

    @model_validator(mode="after")
    def _keys_agree(self) -> "ComparePicturesConfig":
        problems = check_templates(prompt=self.prompt, flat_prompt=self.flat_prompt)
        if self.tune.role == self.report.role:
            problems.append("tune.role and report.role must differ: rates must not be chosen on the reported concepts")
        return raise_problems(self, problems)


class CompareQuestionsConfig(Section):
    """Tasks of base, scored on other rows; learning rates are chosen on the valid splits of base."""

    report: VLDataConfig  # the reported scores are on its valid splits
    features: Items[InputPath] = ()  # vision.features of the reported images; empty: those of base
    decode: DecodeConfig = DecodeConfig()

    @model_validator(mode="after")
    def _keys_agree(self) -> "CompareQuestionsConfig":
        problems = missing_splits(self.report, "valid", "report") + check_decoding(self.decode, self.report)
        for task in self.report.all_tasks:
            if task.train is not None or task.batch_size is not None or task.weight != 1.0:
                place = self.report.place(task.task, "report")
                problems.append(f"{place} may only have valid: base configures its training")
        return raise_problems(self, problems)


class CompareConfig(PipelineConfig):
    """Compares the base model, full fine-tuning, LoRA, DoRA and DoRA at half rank, each at its best learning rate."""

    command: ClassVar[str] = "eval"
    pipeline: Literal["compare"]
    output: OutputFolder  # the campaign's folder; one that exists is resumed
    base: InputPath  # the config that all trainings share: of train_diffusion for pictures, of train_vl for questions
    steps: PositiveInt  # optimizer steps of every training
    ranks: Annotated[Items[PositiveInt], Field(min_length=1)] = (8,)  # of LoRA and DoRA
    half_ranks: bool = True  # DoRA is also trained at half of each rank but 1
    learning_rates: LearningRates
    extra_rates: Count = 1  # more candidates to try, a factor apart, while the best one is the lowest or the highest
    seeds: Annotated[Items[Seed], Field(min_length=2)] = (0, 1, 2)  # a training each; the first also for rates
    workers: PositiveInt = 1  # trainings at a time; small models train faster two at a time than one with two threads
    pictures: ComparePicturesConfig | None = None  # what is compared: either these,
    questions: CompareQuestionsConfig | None = None  # or these

    @model_validator(mode="after")
    def _keys_agree(self) -> "CompareConfig":
        named = {"ranks names a rank": self.ranks, "seeds names a seed": self.seeds}
        problems = [f"{what} twice" for what, values in named.items() if len(set(values)) < len(values)]
        odd = [rank for rank in self.ranks if rank % 2 and rank > 1]
        if self.half_ranks and odd:
            problems.append(f"ranks: {odd[0]} has no half: take an even rank, or set half_ranks: false")
        if (self.pictures is None) == (self.questions is None):
            problems.append("give either pictures or questions: what is compared")
        return raise_problems(self, problems)
