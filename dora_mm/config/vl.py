"""The config schemas of the vision-language pipelines. See schema.py for the rules."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from dora_mm.config.adapter import EXTRA_WEIGHT_MODULES, VLAdapterConfig, check_adapter
from dora_mm.config.models import VisionConfig, VLModelConfig
from dora_mm.config.schema import (
    AdapterPath,
    Backend,
    ByShortName,
    Count,
    InputPath,
    Items,
    NewFolder,
    NonNegative,
    OutputFolder,
    PipelineConfig,
    Positive,
    Section,
    Seed,
    Text,
    raise_problems,
)
from dora_mm.config.streaming import StreamConfig, check_streaming
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
from dora_mm.config.vl_data import Split, VLDataConfig, missing_splits
from dora_mm.registries.vl_tasks import TASKS


class TextSamplingConfig(Section):
    """How tokens of answers are chosen, and where answers end."""

    max_new_tokens: PositiveInt | None = None  # longest answer in tokens; null: the task's own limit
    temperature: NonNegative = 0.0  # 0: greedy or beam search; above 0: sampling
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # nucleus sampling: the total probability of the tokens kept
    seed: Seed = 0  # seed of the sampling
    stop: Items[Text] = ()  # texts that end an answer, and are not part of it
    keep_thoughts: bool = False  # whether the model's reasoning counts as part of its answer

    @model_validator(mode="after")
    def _sampling_is_on(self) -> "TextSamplingConfig":
        sampling_keys = [key for key in ("top_p", "seed") if getattr(self, key) != type(self).model_fields[key].default]
        if sampling_keys and not self.temperature:
            raise ValueError(f"{sampling_keys[0]} has no effect with temperature 0, which draws nothing")
        return self


class DecodeConfig(TextSamplingConfig):
    batch_size: PositiveInt = 64  # examples per batch
    # trie, rank: only answers in the training data; rank, where rows have options in words: only these
    answers: Literal["generate", "trie", "rank"] = "generate"
    min_answer_count: PositiveInt = 1  # trie, rank: how often an answer must occur in the training data
    beams: PositiveInt = 5  # beam search of captions and options in words; other answers are decoded greedily

    def takes_candidates(self, task: str) -> bool:
        """Whether the answers of this task are chosen from a list of candidates."""
        return self.answers != "generate" and TASKS[task].takes_candidates


class EvaluateConfig(DecodeConfig, ValidationConfig):
    """Validation during training."""

    limit: PositiveInt | None = None  # number of rows of each task; null: all
    # What the best adapter is chosen by; null: the loss of conversations, where the metric is exact match of whole
    # sentences, and the metric of all other tasks
    best_by: Literal["metric", "loss"] | None = None
    base: bool = True  # whether the model is also scored before the first step


class PreferenceConfig(Section):
    """Preference training, DPO and its variants: `task: preference`."""

    # sigmoid: DPO; robust: where a known share of the pairs is the wrong way round; ipo: of means over tokens
    loss: Literal["sigmoid", "robust", "ipo"] = "sigmoid"
    beta: Positive = 0.1  # the higher, the closer the model stays to the one it starts from; of ipo it is tau
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0  # the share of pairs that are the wrong way round

    @model_validator(mode="after")
    def _smoothing_fits_the_loss(self) -> "PreferenceConfig":
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError("label_smoothing has no effect with loss ipo: leave it out")
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError("loss robust needs label_smoothing, without which it is sigmoid")
        return self


class VLTrainConfig(EpochTrainConfig, AdapterTrainConfig):
    """Length and batches of a training, in steps or epochs."""


class TrainVLConfig(PipelineConfig):
    command: ClassVar[str] = "train"
    changeable: ClassVar[tuple[str, ...]] = (
        *CHANGEABLE,
        "train.epochs",
        "data.on_bad_data",  # no finished step had a row at which the run would stop
        "data.tables",
        "evaluate.every",
        "evaluate.patience",
        "evaluate.per_example_every",
        "memory",
        "model.max_length",  # where it cuts no row in another way that was seen: see `RowCounts`
    )
    pipeline: Literal["train_vl"]
    seed: Seed = 0  # seed of everything random in the run
    output: NewFolder | None = None  # the run directory, which must not exist yet; null: runs/<name>/<NNN>
    backend: Backend = "auto"  # implementation of the adapted layers, see dora_mm/backend.py
    model: VLModelConfig
    vision: VisionConfig = VisionConfig()
    adapter: VLAdapterConfig
    data: VLDataConfig
    preference: PreferenceConfig = PreferenceConfig()
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    ema: EMAConfig | None = None  # exponential moving average of the weights, saved in adapter-ema/; null: none
    train: VLTrainConfig
    memory: StreamConfig = StreamConfig()  # frozen weights that stay in main memory until they are used
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> "TrainVLConfig":
        problems = check_training(self.optimizer, self.schedule, self.train, self.model.dtype, self.ema)
        problems += check_adapter(self.adapter, self.optimizer)
        problems += check_sharding(self.train, self.adapter.cache, self.model.quantization)
        problems += check_streaming(self.memory, self.train, {self.adapter.method}, self.adapter.cache)
        if self.adapter.method in EXTRA_WEIGHT_MODULES:
            problems += _check_extra_weights(self.adapter.method, self.train)
        if self.train.gradients_at and self.model.quantization:
            problems.append("train.gradients_at is not for model.quantization, whose layers have no whole weights")
        if self.train.shard and self.data.on_bad_data == "skip":
            problems.append("train.shard needs data.on_bad_data stop: a process without rows would not keep step")
        problems += check_visual_inputs(self.model, self.data, self.vision, ("train", "valid"))
        problems += unused_prompts(self.model, self.data)
        problems += check_decoding(self.evaluate, self.data, "evaluate")
        problems += check_preference(self.preference, self.data, self.model)
        problems += missing_splits(self.data, "train")
        has_valid = any(task.valid for task in self.data.all_tasks)
        problems += check_validation(self.evaluate, has_valid, "no task has a valid split")
        if self.evaluate.per_example_every is not None and not has_valid:
            problems.append("evaluate.per_example_every has no effect: no task has a valid split")
        trained = self.adapter.vision_parts
        if trained and self.vision.features:
            problems.append(
                f"adapter.parts: {trained[0]} trains the tower, but vision.features was computed before that"
            )
        return raise_problems(self, problems)


class EvalVLConfig(PipelineConfig):
    command: ClassVar[str] = "eval"
    pipeline: Literal["eval_vl"]
    output: OutputFolder | None = None  # the run directory; an interrupted one continues; null: runs/<name>/<NNN>
    backend: Backend = "auto"  # implementation of the adapted layers, see dora_mm/backend.py
    model: VLModelConfig
    vision: VisionConfig = VisionConfig()
    adapter: AdapterPath | None = None  # an adapter file, its folder or its run directory; null: the base model
    data: VLDataConfig
    preference: PreferenceConfig = PreferenceConfig()  # its beta scales the margins of pairs
    decode: DecodeConfig = DecodeConfig()
    examples: Count = 48  # examples of each task on the HTML page
    same_as: InputPath | None = None  # the run of an evaluation of the same rows: counts how many answers stay the same

    @model_validator(mode="after")
    def _sections_agree(self) -> "EvalVLConfig":
        problems = missing_splits(self.data, "valid")
        problems += check_visual_inputs(self.model, self.data, self.vision, ("valid",))
        problems += check_decoding(self.decode, self.data)
        problems += check_preference(self.preference, self.data, self.model)
        paired = [task.task for task in self.data.all_tasks if TASKS[task.task].pairs]
        if paired and self.adapter is None:
            problems.append(f"adapter is missing: {paired[0]} compares a model with the one that it was trained from")
        return raise_problems(self, problems + unused_prompts(self.model, self.data))


class ExtractFeaturesConfig(PipelineConfig):
    command: ClassVar[str] = "features"
    pipeline: Literal["extract_features"]
    output: OutputFolder  # the folder of features; those already in it are not computed again
    vision: VisionConfig
    images: Annotated[Items[InputPath], Field(min_length=1)]  # folders of images
    follow_links: bool = False  # as data.follow_links
    batch_size: PositiveInt = 32  # images per batch
    dtype: Annotated[Literal["float32", "float16"], ByShortName] = "float16"  # dtype of the saved features
    on_bad_data: Literal["stop", "skip"] = "stop"  # skip: bad images are left out, counted and listed


def _check_extra_weights(method: str, train: EpochTrainConfig) -> list[str]:
    """Finds settings that a method which changes no weight does not go with; one message per problem.

    Gradient checkpointing drops the cache that a prefix is in, and compiled blocks were not tried with one.
    """
    unfit = {"shard": train.shard}
    if method == "prefix":
        unfit |= {"gradient_checkpointing": train.gradient_checkpointing, "compile": train.compile}
    return [f"train.{key} is not for adapter.method {method}" for key, is_on in unfit.items() if is_on]


def check_decoding(decode: DecodeConfig, data: VLDataConfig, section: str = "decode") -> list[str]:
    """Finds settings of answers that have no effect with the tasks of `data`; one message for each."""
    problems, tasks, default = [], [task.task for task in data.all_tasks], DecodeConfig()
    if decode.temperature and decode.beams != default.beams:
        problems.append(f"{section}.beams has no effect with temperature, which draws single answers")
    elif decode.beams != default.beams and not any(TASKS[task].takes_beams for task in tasks):
        problems.append(f"{section}.beams has no effect: no task has captions or options in words")
    chosen = [TASKS[task].pairs or TASKS[task].chosen_from or decode.takes_candidates(task) for task in tasks]
    if decode.keep_thoughts and all(chosen):
        problems.append(f"{section}.keep_thoughts has no effect: no answers are generated")
    candidates = any(decode.takes_candidates(task) for task in tasks)
    if decode.min_answer_count != default.min_answer_count and not candidates:
        problems.append(f"{section}.min_answer_count has no effect: no answers are chosen from the training data")
    return problems


def check_preference(preference: PreferenceConfig, data: VLDataConfig, model: VLModelConfig) -> list[str]:
    """Finds settings of pairs of answers that have no effect, or that do not go with them; one message for each."""
    paired = [task.task for task in data.all_tasks if TASKS[task.task].pairs]
    if not paired:
        return [] if preference == PreferenceConfig() else ["preference has no effect: no task of data has pairs"]
    if getattr(model, "loss_over", "answers") != "answers":
        return [f"model.loss_over is not for {paired[0]}, whose loss compares answers: leave it out"]
    return []


def unused_prompts(model: VLModelConfig, data: VLDataConfig) -> list[str]:
    """Finds prompts of tasks that the data does not have; one message for each."""
    known = [task.task for task in data.all_tasks]
    unused = [task for task in model.prompts if task not in known]
    return [f"model.prompts: {task} has no effect, since data has no such task" for task in unused]


def check_visual_inputs(
    model: VLModelConfig, data: VLDataConfig, vision: VisionConfig, splits: tuple[Split, ...]
) -> list[str]:
    """Finds tasks that have neither images nor features in these splits; returns at most one message."""
    clips = [task.task for task in data.all_tasks if TASKS[task.task].clips]
    sources = [(task.task, task.source_of(split)) for task in data.all_tasks for split in splits]
    pictured = [(task, source) for task, source in sources if source and TASKS[task].images != 0]
    missing = [task for task, source in pictured if source.lacks_images]
    if model.own_tower:
        if vision != VisionConfig():
            return ["vision is for model.family vl_bart: the other models bring their own tower"]
        if clips:
            return [f"{data.key_of(clips[0])} has clips, which only model.family vl_bart reads"]
        return [f"{data.key_of(missing[0])} has a source without images"] if missing else []
    if clips and len(clips) < len(data.all_tasks):
        return ["data.tasks mixes image tasks and video tasks: a model handles only one kind"]
    if clips and not vision.features:
        return [f"vision.features is missing: {clips[0]} reads video clips as features"]
    if missing and not vision.features:
        return [f"{data.key_of(missing[0])} has a source without images, and vision.features is empty"]
    return []
