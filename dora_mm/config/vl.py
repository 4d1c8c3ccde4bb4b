"""What a config of the vision-language pipelines may say. The rules are those of schema.py."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from dora_mm.config.schema import (
    AnyAdapterConfig,
    Backend,
    Count,
    EpochTrainConfig,
    Items,
    LearningRates,
    OptimizerConfig,
    PipelineConfig,
    Positive,
    ScheduleConfig,
    Section,
    Seed,
    Text,
    check_adapter,
    check_training,
    raise_problems,
)

VLTask = Literal["vqa", "gqa", "nlvr2", "caption", "tvqa", "how2qa", "tvc", "yc2c"]
VIDEO_TASKS = ("tvqa", "how2qa", "tvc", "yc2c")

FORMATS: dict[str, tuple[str, ...]] = {  # of data files, and the tasks that they are for
    "vqa_v2": ("vqa",),
    "vqa_karpathy": ("vqa",),
    "easy_vqa": ("vqa",),
    "gqa": ("gqa",),
    "gqa_vlt5": ("gqa",),
    "nlvr2": ("nlvr2",),
    "nlvr2_vlt5": ("nlvr2",),
    "coco_captions": ("caption",),
    "coco_karpathy": ("caption",),
    "video_qa": ("tvqa", "how2qa"),
    "video_captions": ("tvc", "yc2c"),
}


class SourceConfig(Section):
    """One split of a data set, in a form in which it is published (facts of each are in dora_mm/data)."""

    format: Literal[
        "vqa_v2",
        "vqa_karpathy",
        "easy_vqa",
        "gqa",
        "gqa_vlt5",
        "nlvr2",
        "nlvr2_vlt5",
        "coco_captions",
        "coco_karpathy",
        "video_qa",
        "video_captions",
    ]
    file: Text  # the questions, sentences or captions
    annotations: Text | None = None  # vqa_v2: the answers; None: a test split, which has none
    images: Text | None = None  # the folder of the pictures; None: features alone
    subtitles: Text | None = None  # video: JSONL
    split: Text | None = None  # coco_karpathy: train (with restval), val or test
    skip: Count = 0  # rows that are left out at the start
    limit: PositiveInt | None = None  # only so many rows

    @model_validator(mode="after")
    def _keys_fit_the_format(self) -> "SourceConfig":
        allowed = {
            "annotations": ("vqa_v2",),
            "subtitles": ("video_qa", "video_captions"),
            "split": ("coco_karpathy",),
        }
        problems = [
            f"{key} is for {' and '.join(formats)}, not for {self.format}"
            for key, formats in allowed.items()
            if getattr(self, key) is not None and self.format not in formats
        ]
        if self.format == "coco_karpathy" and self.split is None:
            problems.append("split is missing: coco_karpathy holds all splits in one file")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class VLTaskConfig(Section):
    task: VLTask
    train: SourceConfig | None = None
    valid: SourceConfig | None = None
    batch_size: PositiveInt | None = None  # None: train.batch_size
    weight: Positive = 1.0  # how often its batches come, times the number of its batches

    @model_validator(mode="after")
    def _formats_are_of_the_task(self) -> "VLTaskConfig":
        problems = [
            f"{name}.format {source.format} is for {' and '.join(FORMATS[source.format])}, not for {self.task}"
            for name, source in (("train", self.train), ("valid", self.valid))
            if source is not None and self.task not in FORMATS[source.format]
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self


class VisionConfig(Section):
    """The frozen vision: which tower, and where its features lie if they are computed already."""

    tower: Text = "RN101"  # of open_clip; timm/<name> of timm
    pretrained: Text | None = "openai"  # a tag of the tower's library, or a local file; None: random weights
    layers: Items[Text] = ()  # modules whose maps are taken, joined on the coarsest grid; none: the last map or tokens
    features: Items[Text] = ()  # folders of dora-mm features, .h5 files or folders of .npz; none: computed on the fly


class VLModelConfig(Section):
    """A folder that save_pretrained wrote (ours, or BART's), or a hub name."""

    path: Text = "facebook/bart-base"
    random: bool = False  # only the config is read from `path`: weights are drawn from the seed
    # What a bare BART becomes, image where left out; a saved VL-BART must be of this kind where it is given.
    visual: Literal["image", "video"] | None = None
    feature_dim: PositiveInt | None = None  # channels of the visual features; None: as many as vision gives


VLPart = Literal["text.qv", "text.ko", "text.mlp", "cross.qv", "cross.ko"]
Trained = Literal["visual_embedding", "biases", "norms", "embeddings"]


class VLAdapterConfig(AnyAdapterConfig):
    parts: Annotated[Items[VLPart], Field(min_length=1)] = ("text.qv", "cross.qv")
    vision_parts: Items[Literal["attn", "ff"]] = ()  # of the tower, which then runs within every step
    extra_trainable: Items[Trained] = ("visual_embedding", "biases", "norms")  # beside the adapters


class VLDataConfig(Section):
    tasks: Annotated[Items[VLTaskConfig], Field(min_length=1)]  # trained jointly, one task to a batch
    on_bad_data: Literal["stop", "skip"] = "stop"  # skip: left out, counted and named
    tables: Text = "build/tables"  # where the files are kept as tables that are read from disk, by content

    @model_validator(mode="after")
    def _tasks_are_distinct(self) -> "VLDataConfig":
        names = [task.task for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError("tasks names a task twice")
        return self


class DecodeConfig(Section):
    batch_size: PositiveInt = 64
    answers: Literal["generate", "trie", "rank"] = "generate"  # trie, rank: only answers that occur in training
    min_answer_count: PositiveInt = 1  # trie, rank: how often an answer must occur there
    beams: PositiveInt = 5  # of captions; answers are decoded greedily

    def takes_candidates(self, task: str) -> bool:
        """Whether answers to this task are chosen from a list."""
        return self.answers != "generate" and task in ("vqa", "gqa", "tvqa", "how2qa")


class EvaluateConfig(DecodeConfig):
    """Scores on the validation splits while training."""

    every: Count = 0  # steps; 0: only at the end
    limit: PositiveInt | None = None  # rows of each task


class TrainVLBartConfig(PipelineConfig):
    command: ClassVar[str] = "train"
    pipeline: Literal["train_vl_bart"]
    seed: Seed = 0
    output: Text | None = None  # the run directory, refused if it exists; None: runs/<name>/<NNN>
    backend: Backend = "auto"
    model: VLModelConfig
    vision: VisionConfig = VisionConfig()
    adapter: VLAdapterConfig
    data: VLDataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    train: EpochTrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> "TrainVLBartConfig":
        problems = check_vl_training(self.optimizer, self.schedule, self.train)
        problems += check_adapter(self.adapter, self.optimizer)
        problems += check_sight(self.data, self.vision, ("train", "valid"))
        problems += [f"data.tasks: {task.task} has no train" for task in self.data.tasks if task.train is None]
        if self.evaluate.every and not any(task.valid for task in self.data.tasks):
            problems.append("evaluate.every has nothing to score: no task has a valid split")
        if self.adapter.vision_parts and self.vision.features:
            problems.append("adapter.vision_parts trains the tower, and vision.features takes what it said before")
        return raise_problems(self, problems)


class EvalVLConfig(PipelineConfig):
    command: ClassVar[str] = "eval"
    pipeline: Literal["eval_vl"]
    output: Text | None = None
    backend: Backend = "auto"
    model: VLModelConfig
    vision: VisionConfig = VisionConfig()
    adapter: Text | None = None  # an adapter file, its folder or its run; None: the bare model
    data: VLDataConfig
    decode: DecodeConfig = DecodeConfig()
    vqa_mode: Literal["official", "lavis"] = "official"  # how answers are compared: the official script's way or LAVIS'
    examples: Count = 48  # on the page of examples, of each task

    @model_validator(mode="after")
    def _sections_agree(self) -> "EvalVLConfig":
        problems = [f"data.tasks: {task.task} has no valid" for task in self.data.tasks if task.valid is None]
        return raise_problems(self, problems + check_sight(self.data, self.vision, ("valid",)))


class CompareVLConfig(PipelineConfig):
    """The bare model, full fine-tuning, LoRA, DoRA, and DoRA at half the rank, each at its own best learning rate."""

    command: ClassVar[str] = "eval"
    pipeline: Literal["compare_vl"]
    output: Text  # the campaign's folder; one that exists is gone on with
    base: Text  # the config of a train_vl_bart run: what all runs have in common; on its valid splits rates are chosen
    steps: PositiveInt = 600  # of every training
    rank: Annotated[int, Field(ge=2, multiple_of=2)] = 8  # of LoRA and DoRA; DoRA also at its half
    learning_rates: LearningRates
    extra_rates: Count = 1  # further candidates, a factor apart, while the best one is the lowest or the highest
    seeds: Annotated[Items[Seed], Field(min_length=2)] = (0, 1, 2)  # a training each; rates are chosen with the first
    workers: PositiveInt = 1  # trainings at a time; small models train two at a time faster than one with two threads
    report: VLDataConfig  # the scores are of its valid splits
    features: Items[Text] = ()  # of the reported pictures, where they lie elsewhere; none: the base's vision.features
    decode: DecodeConfig = DecodeConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> "CompareVLConfig":
        problems = ["seeds names a seed twice"] if len(set(self.seeds)) < len(self.seeds) else []
        for task in self.report.tasks:
            if task.valid is None:
                problems.append(f"report.tasks: {task.task} has no valid")
            if task.train is not None or task.batch_size is not None or task.weight != 1.0:
                problems.append(f"report.tasks: {task.task} takes valid alone: how it is trained stands in base")
        return raise_problems(self, problems)


class ExtractFeaturesConfig(PipelineConfig):
    command: ClassVar[str] = "features"
    pipeline: Literal["extract_features"]
    output: Text  # the folder of features; what is in it already is not computed again
    vision: VisionConfig
    images: Annotated[Items[Text], Field(min_length=1)]  # folders of pictures
    batch_size: PositiveInt = 32
    dtype: Literal["float32", "float16"] = "float16"
    on_bad_data: Literal["stop", "skip"] = "stop"


def check_vl_training(optimizer: OptimizerConfig, schedule: ScheduleConfig, train: EpochTrainConfig) -> list[str]:
    """What contradicts itself, as sentences that name the keys."""
    problems = []
    if (train.steps is None) == (train.epochs is None):
        problems.append("give either train.steps or train.epochs")
    known = train if train.steps is not None else train.model_copy(update={"steps": schedule.warmup_steps + 1})
    return problems + check_training(optimizer, schedule, known)


def check_sight(data: VLDataConfig, vision: VisionConfig, splits: tuple[str, ...]) -> list[str]:
    """Tasks whose pictures, in these splits, nobody can see."""
    clips = [task.task for task in data.tasks if task.task in VIDEO_TASKS]
    if clips and len(clips) < len(data.tasks):
        return ["data.tasks holds tasks of pictures and of clips: a model reads one kind"]
    if clips and not vision.features:
        return [f"vision.features is missing: {clips[0]} reads clips as features"]
    sources = [(task.task, getattr(task, split)) for task in data.tasks for split in splits]
    blind = [name for name, source in sources if source and source.images is None]
    if blind and not vision.features:
        return [f"data.tasks: {blind[0]} has a source without images, and there are no vision.features"]
    return []
