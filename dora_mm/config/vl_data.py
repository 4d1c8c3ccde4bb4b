"""The config sections that name the data of the vision-language pipelines. See schema.py for the rules."""

from collections.abc import Callable, Mapping
from glob import has_magic
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Discriminator, Field, PositiveInt, Tag, field_validator, model_validator

from dora_mm.config.paths import find_path
from dora_mm.config.schema import Count, InputPath, Items, Positive, Section, Text, name_in, raise_problems
from dora_mm.registries.readers import READERS, Key, Learned, Reader
from dora_mm.registries.suites import file_stem
from dora_mm.registries.vl_tasks import TASKS, tasks_of

COLUMNAR = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")  # first bytes of Parquet and Arrow
ColumnName = Literal[
    "id",
    "messages",
    "conversations",
    "texts",
    "prompt",
    "completion",
    "query",
    "response",
    "chosen",
    "rejected",
    "rejected_response",
    "rejected_messages",
    "instruction",
    "input",
    "output",
    "history",
    "system",
    "image",
    "images",
    "video",
    "videos",
    "text",
    "caption",
    "tools",
    "objects",
]
TaskName = Annotated[str, name_in(TASKS)]


class SourceConfig(Section):
    """One split of a data set, in a format in which it is published, or of conversations (docs/vl.md lists all)."""

    exclusive: ClassVar[tuple[tuple[str, str], ...]] = (("file", "share"),)  # the share of `HeldOutConfig`

    format: Annotated[str, name_in(READERS)]  # how rows are written: chat, or as the official files of a benchmark
    # The questions, sentences, captions or conversations; chat, captions: also a folder, a pattern, or a list of these
    file: InputPath | Items[InputPath]
    # The official file of answers; null: vqa_v2: a test split, which has none; vqa_karpathy: scored by labels alone
    annotations: InputPath | None = None
    # The folder of images; null: only features are used, or rows have or fully name them (chat, preferences, captions,
    # choices, Parquet of the hub)
    images: InputPath | None = None
    subtitles: InputPath | None = None  # video formats only: a JSONL file; null: no subtitles
    # coco_karpathy: train (includes restval), val or test; choices, answers, scienceqa: a value of the column split,
    # null: all rows; of a folder or a pattern (chat, preferences, captions, Parquet of the hub), by its files' names;
    # null: it has but one
    split: Text | None = None
    columns: dict[ColumnName, Text] = Field(default_factory=dict)  # chat, preferences, captions: by our names
    # Which of a row's answers is trained on; all count for the score. sampled: one at each step, by its score;
    # null: first where all count the same (docvqa, chartqa, ...), else sampled
    answers: Learned | None = None
    weight: Positive = 1.0  # sampling weight among several sources; 2: its rows occur twice in an epoch
    skip: Count = 0  # number of rows to skip at the start
    limit: PositiveInt | None = None  # number of rows to use after those; null: all

    @field_validator("file", mode="before")
    @classmethod
    def _is_a_path_or_several(cls, given: Any) -> Any:
        paths = given if isinstance(given, list | tuple) else [given]
        if not paths or not all(isinstance(path, str) and path for path in paths):
            raise ValueError(f"must be a path, or a list of paths, got {given!r}")
        return given

    @property
    def files(self) -> tuple[str, ...]:
        """The paths under `file`, which are several only of formats that say so."""
        return self.file if isinstance(self.file, tuple) else (self.file,)

    @property
    def path(self) -> Path:
        """The first of `files`, which is the only one of most formats."""
        return Path(self.files[0])

    @property
    def reader(self) -> Reader:
        """The record of its format."""
        return READERS[self.format]

    @property
    def learned(self) -> Learned:
        """Which of a row's answers is trained on."""
        return self.answers or self.reader.learned

    @property
    def lacks_images(self) -> bool:
        """Whether its rows have images, but neither themselves nor in a folder: by the first bytes of its files."""
        kind = self.reader.images if self.images is None else "none"
        return kind == "named" or (kind == "either" and not any(map(_may_have_images, self.files)))

    @property
    def title(self) -> str:
        """`files` for messages."""
        return self.files[0] + (f" and {len(self.files) - 1} more" if len(self.files) > 1 else "")

    @model_validator(mode="after")
    def _keys_fit_the_format(self) -> "SourceConfig":
        reader = self.reader
        no_images = self.images and reader.images == "none"
        problems = [f"images has no effect: rows of {self.format} are texts"] if no_images else []
        problems += [
            f"{key} is only for format {self._formats(lambda other, key=key: key in other.keys)}"
            for key in get_args(Key)
            if getattr(self, key) and key not in reader.keys
        ]
        problems += [f"{key} is missing: {why}" for key, why in reader.needs.items() if getattr(self, key) is None]
        if isinstance(self.file, tuple) and not reader.several:
            problems.append(f"a list of files is only for format {self._formats(lambda other: other.several)}")
        return raise_problems(self, problems)

    def _formats(self, can: Callable[[Reader], bool]) -> str:
        """The formats that can do something, which the format of this source cannot."""
        *others, last = (name for name, reader in READERS.items() if can(reader))
        return f"{', '.join(others)}{' and ' if others else ''}{last}, not for {self.format}"


def _may_have_images(name: str) -> bool:
    """Whether a path is Parquet or Arrow, a folder or a pattern; of a file that is not there its name tells."""
    path = find_path(name)
    if path is None or not path.is_file():
        return path is not None or has_magic(name) or name.endswith((".parquet", ".arrow"))
    with path.open("rb") as file:
        return file.read(8).startswith(COLUMNAR)


class HeldOutConfig(Section):
    """Rows of the training split that are not trained on, by whole images: the choice depends on the rows alone."""

    share: Annotated[float, Field(gt=0, lt=1)]  # of the training split's rows
    limit: PositiveInt | None = None  # the highest number of these rows; null: no limit

    @model_validator(mode="before")
    @classmethod
    def _has_no_file(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "share" in value and (of_a_source := _source_keys(value)):
            raise ValueError(
                f"has share, which is of the training split, and so no {of_a_source[0]}: a split with its own file is "
                "given as a whole, as in valid={format: chat, file: valid.json, images: folder}"
            )
        return value


class _ChosenByShare:
    """Chooses the class of a validation split, as `SectionChoice` does; with keys of neither, it is held-out rows."""

    key = "share"

    def tag_of(self, value: Any) -> str:
        if not isinstance(value, Mapping):
            return "held out" if isinstance(value, HeldOutConfig) else "source"
        return "held out" if self.key in value or not _source_keys(value) else "source"


def _source_keys(value: Mapping[str, Any]) -> list[str]:
    """The keys that only a source has."""
    return [key for key in SourceConfig.model_fields if key in value and key not in HeldOutConfig.model_fields]


ValidConfig = Annotated[
    Annotated[SourceConfig, Tag("source")] | Annotated[HeldOutConfig, Tag("held out")],
    Discriminator(_ChosenByShare().tag_of),
]
Split = Literal["train", "valid"]
SPLITS: tuple[Split, ...] = ("train", "valid")


class VLTaskConfig(Section):
    task: TaskName  # the task of these rows
    train: SourceConfig | None = None  # the training split; null: none
    more: Items[SourceConfig] = ()  # further sources of the training split, whose rows are mixed with those of train
    valid: ValidConfig | None = None  # the validation split: a source, or a share of the training split; null: none
    batch_size: PositiveInt | None = None  # examples per micro-batch; null: train.batch_size
    weight: Positive = 1.0  # sampling weight of the task, multiplied by the number of its batches

    @model_validator(mode="after")
    def _formats_are_of_the_task(self) -> "VLTaskConfig":
        return raise_problems(self, check_splits(self.task, self.train, self.valid, self.more))

    @property
    def sources(self) -> dict[str, SourceConfig]:
        """The sources that are named, by their keys; held-out rows are of the training split's."""
        splits: dict[str, SourceConfig | HeldOutConfig | None] = {"train": self.train, "valid": self.valid}
        splits |= {f"more[{number}]": source for number, source in enumerate(self.more)}
        return {split: source for split, source in splits.items() if isinstance(source, SourceConfig)}

    @property
    def trained(self) -> tuple[SourceConfig, ...]:
        """The sources of the training split."""
        return () if self.train is None else (self.train, *self.more)

    def source_of(self, split: Split) -> SourceConfig | None:
        """The source that has the rows of a split, which of held-out rows is `train`; None: there is no such split."""
        return self.train if split == "train" or isinstance(self.valid, HeldOutConfig) else self.valid


class VLDataConfig(Section):
    """One task (`train`, `valid` and its name), or a list of tasks that are trained jointly."""

    task: TaskName = "chat"  # the task of train and valid
    train: SourceConfig | None = None  # the training split; null: none
    more: Items[SourceConfig] = ()  # further sources of the training split, whose rows are mixed with those of train
    valid: ValidConfig | None = None  # the validation split: a source, or a share of the training split; null: none
    tasks: Items[VLTaskConfig] = ()  # instead of train and valid; a batch is from one task
    group_by_length: bool = False  # batches have rows of similar length, with less padding
    on_bad_data: Literal["stop", "skip"] = "stop"  # skip: bad rows are left out, counted and listed
    # Whether links that lead out of a folder of images or data files are followed; those of the hub's cache always are
    follow_links: bool = False
    # Whether rows may name any image on this machine by its absolute path, and not only those in the folder of images
    absolute_paths: bool = False
    tables: Text = "build/tables"  # a cache folder of the files as tables on disk, named by their content

    @model_validator(mode="after")
    def _one_form_is_given(self) -> "VLDataConfig":
        names = [file_stem(task.task) for task in self.tasks]
        short = [key for key in ("train", "more", "valid") if getattr(self, key)]
        problems = check_splits(self.task, self.train, self.valid, self.more)
        if len(set(names)) < len(names):
            problems.append("tasks names a task twice")
        if self.tasks and short:
            problems.append(f"give either {' and '.join(short)}, or tasks")
        if self.tasks and self.task != "chat":
            problems.append("task has no effect beside tasks, each of which has its own")
        if not self.tasks and not short:
            problems.append("has no data: give train or valid, or a list of tasks")
        return raise_problems(self, problems)

    @property
    def all_tasks(self) -> tuple[VLTaskConfig, ...]:
        """The tasks, in whichever form they are given."""
        return self.tasks or (VLTaskConfig(task=self.task, train=self.train, more=self.more, valid=self.valid),)

    def with_tasks(self, tasks: tuple[VLTaskConfig, ...]) -> "VLDataConfig":
        """These settings with other tasks."""
        return self.model_copy(update={"tasks": tasks, "task": "chat", "train": None, "more": (), "valid": None})

    def key_of(self, task: str, section: str = "data") -> str:
        """How the config names a task, for messages: "data.tasks: vqa", or "data" for the only one."""
        return f"{section}.tasks: {task}" if self.tasks else section


def check_splits(
    task: str,
    train: SourceConfig | None,
    valid: SourceConfig | HeldOutConfig | None,
    more: tuple[SourceConfig, ...] = (),
) -> list[str]:
    """Finds splits that the task cannot have; one message per problem, each naming the key."""
    named = {"train": train, "valid": valid} | {f"more[{number}]": source for number, source in enumerate(more)}
    sources = {name: source for name, source in named.items() if isinstance(source, SourceConfig)}
    problems = [
        f"{name}.format {source.format} is only for {' and '.join(tasks_of(source.format))}, not for {task}"
        for name, source in sources.items()
        if source.format not in TASKS[task].formats
    ]
    if train is None and isinstance(valid, HeldOutConfig):
        problems.append("valid.share is a share of train, which is missing: name the format and file of valid")
    if more and train is None:
        problems.append("more is beside train, which is missing")
    if "valid" in sources and sources["valid"].answers:
        problems.append("valid.answers has no effect: all answers count for the score")
    weighted = [name for name, source in sources.items() if source.weight != 1 and (name == "valid" or not more)]
    problems += [f"{name}.weight has no effect: it is for several sources of a training split" for name in weighted]
    return problems


def missing_splits(data: VLDataConfig, split: Split, section: str = "data") -> list[str]:
    """Finds tasks without this split; one message per problem, each naming the key as the config has it."""
    missing = [task.task for task in data.all_tasks if getattr(task, split) is None]
    return [f"{data.key_of(task, section)} has no {split} split" for task in missing]
