"""The configs of campaigns, on images or on questions: comparisons of methods, and the search for a learning rate.

See config/schema.py for the rules.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from dora_mm.config.generation import ClassifiedStyle, ConceptChoice, ImageSamplingConfig, RoleConfig, check_templates
from dora_mm.config.schema import (
    Count,
    InputPath,
    Items,
    ModelPath,
    OutputFolder,
    PipelineConfig,
    Positive,
    Section,
    Seed,
    Text,
    raise_problems,
)
from dora_mm.config.vl import DecodeConfig, check_decoding
from dora_mm.config.vl_data import VLDataConfig, missing_splits
from dora_mm.registries.renamed import under_first_names

SET_FOR_EACH_TRAINING = ("seed", "output", "adapter.method", "adapter.rank", "optimizer.lr", "train.steps")


class CampaignConfig(PipelineConfig):
    """Many trainings of one config."""

    free_keys: ClassVar[tuple[str, ...]] = ("workers", "name", "rows")  # those that change no row

    output: OutputFolder  # the campaign's folder; one that exists is resumed
    base: InputPath  # the config that all trainings share: train_diffusion for images, train_vl for VL data
    # A CSV file with a row for each finished training, from which a campaign goes on without the rest of its folder, on
    # any machine; null: trainings.csv in output
    rows: Text | None = None
    workers: PositiveInt = 1  # trainings at a time; small models train faster two at a time than one with two threads

    @property
    def scored(self) -> dict[str, Any]:
        """The settings, other than the trainings, on which scores depend."""
        raise NotImplementedError


# --- comparisons -----------------------------------------------------------------------------------------------------


class LearningRates(Section):
    """The candidate learning rates of each method; at least three, so that every method gets a suitable one."""

    # of full fine-tuning; null: it is not compared
    full: Annotated[Items[Positive], Field(min_length=3)] | None = None
    lora: Annotated[Items[Positive], Field(min_length=3)]  # LoRA, at every rank
    dora: Annotated[Items[Positive], Field(min_length=3)]  # DoRA, at every rank

    @field_validator("full", "lora", "dora")
    @classmethod
    def _rates_are_distinct(cls, rates: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if rates is not None and len(set(rates)) < len(rates):
            raise ValueError("names a rate twice")
        return rates


class VariantConfig(Section):
    """LoRA or DoRA at one rank with other settings; its difference from the default settings is reported."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=40)]  # the name in tables and file names
    method: Literal["lora", "dora"] = "dora"  # the method of this variant
    rank: PositiveInt  # its rank, one of `ranks`
    overrides: Items[Text] = ()  # settings of base to change, as --set takes them, such as optimizer.b_lr_ratio=4.0
    magnitude_lr_ratio: Positive | None = None  # the magnitudes' rate as a multiple of the learning rate; null: base's

    @field_validator("overrides")
    @classmethod
    def _what_is_compared_stays(cls, overrides: tuple[str, ...]) -> tuple[str, ...]:
        for text in overrides:
            if (key := text.partition("=")[0].strip()) in SET_FOR_EACH_TRAINING:
                raise ValueError(f"{key} is set for each training: leave it out")
        return overrides

    @model_validator(mode="after")
    def _changes_something(self) -> "VariantConfig":
        problems = []
        if not self.overrides and self.magnitude_lr_ratio is None:
            problems.append(f"{self.name} changes nothing: give overrides or magnitude_lr_ratio")
        if self.magnitude_lr_ratio is not None and self.method == "lora":
            problems.append(f"{self.name}: lora has no magnitudes, so leave magnitude_lr_ratio out")
        return raise_problems(self, problems)


class CompareImagesConfig(Section):
    """Adapters of a style, scored by a classifier on things that they were not trained on."""

    classifier: InputPath  # the folder of a fitted classifier
    style: ClassifiedStyle  # the target style
    prompt: Text  # asks for the target style; {thing} is replaced by the concept
    flat_prompt: Text = "a flat icon of {thing}"  # asks for the style that the base model knows
    tune: ConceptChoice = ConceptChoice(role="tune", count=24, seeds=(0, 1))  # learning rates are chosen on these
    report: RoleConfig = RoleConfig()  # the reported scores; a training generates each of them once, with its own seed
    sampling: ImageSamplingConfig = ImageSamplingConfig()
    columns: PositiveInt = 8  # concepts shown in the contact sheet

    @model_validator(mode="after")
    def _keys_agree(self) -> "CompareImagesConfig":
        problems = check_templates(prompt=self.prompt, flat_prompt=self.flat_prompt)
        if self.tune.role == self.report.role:
            problems.append("tune.role and report.role must differ: rates must not be chosen on the reported concepts")
        return raise_problems(self, problems)


class CompareVLConfig(Section):
    """Tasks of base, scored on other rows; learning rates are chosen on the valid splits of base."""

    report: VLDataConfig  # the reported scores are on its valid splits
    features: Items[InputPath] = ()  # vision.features of the reported images; empty: those of base
    decode: DecodeConfig = DecodeConfig()

    @model_validator(mode="after")
    def _keys_agree(self) -> "CompareVLConfig":
        problems = missing_splits(self.report, "valid", "report") + check_decoding(self.decode, self.report)
        for task in self.report.all_tasks:
            if task.train is not None or task.batch_size is not None or task.weight != 1.0:
                key = self.report.key_of(task.task, "report")
                problems.append(f"{key} may only have valid: base configures its training")
        return raise_problems(self, problems)


class CompareConfig(CampaignConfig):
    """Compares the base model, full fine-tuning, LoRA, DoRA and DoRA at half rank, each at its best learning rate."""

    command: ClassVar[str] = "compare"
    free_keys: ClassVar[tuple[str, ...]] = (*CampaignConfig.free_keys, "images.columns")
    pipeline: Literal["compare"]
    steps: PositiveInt  # optimizer steps of every training
    ranks: Annotated[Items[PositiveInt], Field(min_length=1)] = (8,)  # of LoRA and DoRA
    half_ranks: bool = True  # DoRA is also trained at half of each rank but 1
    variants: Items[VariantConfig] = ()  # further adapters, with other settings
    learning_rates: LearningRates  # the candidates of each method
    # More candidates to try, a factor apart, while the best one is the lowest or the highest; with curves while one of
    # these is as good as the best
    extra_rates: Count = 1
    # How scores depend on the rate is reported: every training gets reported scores, and the neighbours of the best
    # rate are trained with all seeds, too
    curves: bool = False
    seeds: Annotated[Items[Seed], Field(min_length=2)] = (0, 1, 2)  # one training for each at the best rate
    # A rate is chosen by the mean over so many of the first seeds, which are trained at all rates
    rate_seeds: PositiveInt = 1
    images: CompareImagesConfig | None = None  # the compared scores, for images
    vl: CompareVLConfig | None = None  # the compared scores, for vision-language models

    @property
    def scored(self) -> dict[str, Any]:
        """The section of what is compared; keys that have their defaults do not count."""
        name, section = ("images", self.images) if self.images else ("vl", self.vl)
        assert section is not None
        values = section.model_dump(mode="json", exclude_defaults=True, exclude={"columns"})
        return under_first_names(values, self.pipeline, name)

    @model_validator(mode="after")
    def _keys_agree(self) -> "CompareConfig":
        named = {"ranks names a rank": self.ranks, "seeds names a seed": self.seeds}
        problems = [f"{what} twice" for what, values in named.items() if len(set(values)) < len(values)]
        if self.rate_seeds > len(self.seeds):
            problems.append(f"rate_seeds: there are only {len(self.seeds)} seeds")
        odd = [rank for rank in self.ranks if rank % 2 and rank > 1]
        if self.half_ranks and odd:
            problems.append(f"ranks: {odd[0]} has no half: take an even rank, or set half_ranks: false")
        names = [variant.name for variant in self.variants]
        problems += ["variants names a variant twice"] if len(set(names)) < len(names) else []
        problems += [
            f"variants: {variant.name} is of rank {variant.rank}, which ranks does not have"
            for variant in self.variants
            if variant.rank not in self.ranks
        ]
        if (self.images is None) == (self.vl is None):
            problems.append("give either images or vl: what is compared")
        return raise_problems(self, problems)


# --- the search for a learning rate ----------------------------------------------------------------------------------


class TuneConfig(CampaignConfig):
    """Finds the learning rate, and the rank where several are given, of the training that `base` configures."""

    command: ClassVar[str] = "tune"
    free_keys: ClassVar[tuple[str, ...]] = (*CampaignConfig.free_keys, "rates", "ranks", "extra_rates")

    pipeline: Literal["tune"]
    overrides: Items[Text] = ()  # settings of base to change, as --set takes them
    rates: Annotated[Items[Positive], Field(min_length=1)]  # the candidates for optimizer.lr, at every rank
    ranks: Items[PositiveInt] = ()  # the candidates for adapter.rank; empty: base's
    extra_rates: Count = 0  # more candidates, a factor apart, while the lowest or the highest rate is as good as any
    # score: likeness to the training images, or the score of the answers to the valid splits; held_out: the held-out
    # loss, which favours low rates in the middle of a schedule
    selection_metric: Literal["score", "held_out"] = "score"
    clip_model: ModelPath | None = None  # a folder or hub name of open_clip, for images; null: the embedded encoder

    @property
    def scored(self) -> dict[str, Any]:
        """The selection metric and its model."""
        values = {"selection_metric": self.selection_metric, "clip_model": self.clip_model}
        return under_first_names(values, self.pipeline)

    @model_validator(mode="after")
    def _can_choose(self) -> "TuneConfig":
        named = {"rates names a rate": self.rates, "ranks names a rank": self.ranks}
        problems = [f"{what} twice" for what, values in named.items() if len(set(values)) < len(values)]
        if len(self.rates) * max(1, len(self.ranks)) < 2:
            problems.append("one rate at one rank leaves nothing to choose: give several of either")
        if self.clip_model and self.selection_metric != "score":
            problems.append("clip_model has no effect: judge held_out looks at no images")
        return raise_problems(self, problems)
