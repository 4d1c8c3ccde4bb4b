"""Compares the bare model, full fine-tuning, LoRA and DoRA (also at half the rank) on vision-language tasks, jointly.

Every method gets its own learning rate: all candidates are trained once and judged on the base config's validation
splits, by the geometric mean of the tasks' metrics; the best one is trained once per seed and scored on the reported
splits, of which no picture was trained or tuned on. The training that won counts as the first of these and may be a
lucky one. Every finished training and its answers are files in `output`, so a campaign that was cut off goes on.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any, get_args

from dora_mm import formats
from dora_mm.config.loader import dump_config, load_config, resolve_path
from dora_mm.config.vl import CompareVLConfig, Trained, TrainVLBartConfig, VLDataConfig, VLPart
from dora_mm.data.vl.example import Example, Predictions, stem
from dora_mm.data.vl.splits import ValidationSet, open_texts, open_validation
from dora_mm.data.vl.tables import open_table
from dora_mm.eval.comparison import Variant, table_rows, variants
from dora_mm.eval.vl.comparison import (
    HEADINGS,
    AnswerScores,
    VLResult,
    answer_scores,
    counted,
    gain_over_question_only,
    group_of,
    intervals,
    vl_contrasts_table,
    vl_results_csv,
    vl_results_table,
)
from dora_mm.eval.vl.metrics import CAPTION_TASKS, QUESTION_TASKS
from dora_mm.eval.vl.question_only import question_only_answers
from dora_mm.models.vl_bart.adapters import check_identity, load_adapters
from dora_mm.models.vl_bart.loading import load_vl_bart
from dora_mm.sampling.answers import answer_all, answerers
from dora_mm.tasks.vision import VisionEncoder
from dora_mm.tasks.vl_bart import VLBartTask
from dora_mm.train.campaign import Chosen, Training, Trainings, open_campaign, rates_of
from dora_mm.train.validation import overall
from dora_mm.utils.atomic import write_text
from dora_mm.utils.devices import default_device
from dora_mm.utils.digest import module_digest

log = logging.getLogger(__name__)
BARE, QUESTION_ONLY = "untrained base", "questions alone"
FREE_KEYS = ("workers", "name")  # these change no number


def main(config: CompareVLConfig, *, resume: Path | None = None) -> None:
    campaign = Campaign(config)
    bare = campaign.scores([campaign.answers("bare")])
    chosen = campaign.trainings.choose_rates(
        rates_of(config.learning_rates, variants([config.rank])),
        campaign.tuned,
        seed=config.seeds[0],
        extra_rates=config.extra_rates,
    )
    reported = {
        variant: [Training(variant, found.rate, seed) for seed in config.seeds] for variant, found in chosen.items()
    }
    campaign.trainings.train(training for trainings in reported.values() for training in trainings)
    scores = {
        variant: campaign.scores([campaign.answers(training.name, training) for training in trainings])
        for variant, trainings in reported.items()
    }
    write_report(campaign, bare, scores, chosen)


class Campaign:
    """The folder of a comparison: what has been trained and answered in it, and how to add to it."""

    def __init__(self, config: CompareVLConfig):
        self.config = config
        self.base = load_base(config)
        self.device = default_device()
        self.data = reported_data(config, self.base)
        self.vision = self.load_vision(config.seeds[0])  # they keep the tokens of pictures that all trainings are shown
        self.sets = open_validation(self.data, config.decode, self.vision, answered=True)
        check_reported(config, self.base, self.sets)
        self.folder = open_campaign(config, config.output, self.inputs(), FREE_KEYS)
        self.trainings = Trainings(self.folder, config.base, config.workers, partial(overrides, config, self.base))

    def load_vision(self, seed: int) -> VisionEncoder:
        wanted = self.base.vision
        if self.config.features:
            wanted = wanted.model_copy(update={"features": self.config.features})
        return VisionEncoder(wanted, seed=seed).to(self.device)

    def load_task(self, seed: int) -> tuple[VLBartTask, dict[str, str]]:
        """The bare model with its vision, and the identities of both, as a training with this seed has them."""
        vision = self.base.vision
        own_vision = self.base.adapter.vision_parts or (vision.pretrained is None and not vision.features)
        vision = self.load_vision(seed) if own_vision else self.vision
        model: Any
        model, tokenizer = load_vl_bart(self.base.model, vision.feature_dim, seed)
        identity = {"base_digest": module_digest(model), "vision_digest": vision.identity}
        return VLBartTask(model.to(self.device), tokenizer, vision), identity

    def inputs(self) -> dict[str, str]:
        """The identity of what the config names: the base config, the model, the vision, and all rows."""
        task, identity = self.load_task(self.config.seeds[0])
        answerers(task, self.sets, self.config.decode)  # what is wrong with them is found before the folder exists
        rows = {
            f"the {split} of {task.task}": open_texts(source, self.base.data).identity
            for task in self.base.data.tasks
            for split, source in (("train", task.train), ("valid", task.valid))
            if source is not None
        }
        reported = {f"the reported split of {name}": found.table.identity for name, found in self.sets.items()}
        known = {"the model": identity["base_digest"], "the vision tower": identity["vision_digest"]}
        return {"base": dump_config(self.base), **known, **rows, **reported}

    def tuned(self, training: Training) -> float:
        """How good a rate is: the tasks' main metrics on the validation splits, together."""
        summary = self.trainings.summary(training)
        values = {task.task: summary[task.task] for task in self.base.data.tasks if task.task in summary}
        if not values:
            raise ValueError(f"{training.name}: no task could be scored on its valid split, so no rate can be chosen")
        return overall(values)

    def answers(self, name: str, training: Training | None = None) -> dict[str, Predictions]:
        """To the reported splits, by task: of one training or of the bare model; given, unless that is done."""
        path = self.folder / "answers" / f"{name}.json"
        if not path.is_file():
            log.info("Answers of %s:", name)
            found = self.answer(training)
            said = {task: [prediction for _, prediction in rows] for task, rows in found.items()}
            write_text(path, json.dumps(said) + "\n")
        said = json.loads(path.read_text(encoding="utf-8"))
        return {task: list(zip(rows, said[task], strict=True)) for task, rows in self.examples.items()}

    @cached_property
    def examples(self) -> dict[str, list[Example]]:
        return {name: list(found.table) for name, found in self.sets.items()}

    def answer(self, training: Training | None) -> dict[str, Predictions]:
        task, identity = self.load_task(training.seed if training else self.config.seeds[0])
        if training:
            folder = self.trainings.adapter(training)
            check_identity(folder, formats.read(folder)[1], identity)
            load_adapters(folder, task.model, task.vision.tower, self.base.backend)
        return answer_all(task, self.sets, self.config.decode)

    def question_only(self) -> dict[str, AnswerScores]:
        """What the questions alone suggest, by task; captions have none."""
        found = {}
        for task in self.data.tasks:
            if task.task in QUESTION_TASKS and task.train is not None:
                rows = self.examples[task.task]
                answers = question_only_answers(open_texts(task.train, self.base.data), rows)
                found[task.task] = [list(zip(rows, answers, strict=True))]
        return {name: scores for name, rows in found.items() if (scores := answer_scores(name, rows))}

    @staticmethod
    def scores(answered: Sequence[Mapping[str, Predictions]]) -> dict[str, AnswerScores]:
        """By task, of one method's trainings; without those of captions where these cannot be scored."""
        found = {task: answer_scores(task, [rows[task] for rows in answered]) for task in answered[0]}
        return {task: scores for task, scores in found.items() if scores}


# --- what is trained, and what is reported ---------------------------------------------------------------------------


def load_base(config: CompareVLConfig) -> TrainVLBartConfig:
    """The base config, of which everything that contradicts a comparison is found before a folder exists."""
    base = load_config(config.base)
    if not isinstance(base, TrainVLBartConfig):
        raise ValueError(f"base: {config.base} is a config of {base.pipeline}, not of train_vl_bart")
    if base.adapter.init_from is not None:
        raise ValueError(f"base: {config.base} goes on from an adapter, which other methods could not: drop init_from")
    if missing := [task.task for task in base.data.tasks if task.valid is None]:
        raise ValueError(f"base: {config.base} has no valid for {', '.join(missing)}, by which rates are chosen")
    trained, reported = ({task.task for task in data.tasks} for data in (base.data, config.report))
    if trained != reported:
        raise ValueError(f"report.tasks: must be those of {config.base}: {', '.join(sorted(trained))}")
    if config.features and base.adapter.vision_parts:
        raise ValueError(f"features: {config.base} adapts the vision tower, which must look at the pictures itself")
    for variant in variants([config.rank]):
        load_config(config.base, overrides(config, base, Training(variant, 1e-3, 0)))
    return base


def overrides(config: CompareVLConfig, base: TrainVLBartConfig, training: Training) -> list[str]:
    """What a training has in place of the base config's values; every update is scaled as the base's is."""
    variant, adapter = training.variant, base.adapter
    rank = variant.rank or 1  # full fine-tuning reads none
    whole = [
        f"adapter.parts=[{', '.join(get_args(VLPart))}]",
        f"adapter.extra_trainable=[{', '.join(get_args(Trained))}]",
        "adapter.dropout=0.0",  # of A's input
    ]
    return [
        f"seed={training.seed}",
        f"adapter.method={variant.method}",
        f"adapter.rank={rank}",
        f"adapter.alpha={rank * adapter.alpha / adapter.rank!r}",
        f"optimizer.lr={training.rate!r}",
        "optimizer.magnitude_lr=null",
        f"train.steps={config.steps}",
        "train.epochs=null",
        "train.checkpoint_every=0",
        "evaluate.every=0",
        *(whole if variant.method == "full" else []),
    ]


def reported_data(config: CompareVLConfig, base: TrainVLBartConfig) -> VLDataConfig:
    """With each task's train split, from which `decode.answers` and guesses take their answers."""
    train = {task.task: task.train for task in base.data.tasks}
    tasks = tuple(task.model_copy(update={"train": train[task.task]}) for task in config.report.tasks)
    return config.report.model_copy(update={"tasks": tasks})


def check_reported(config: CompareVLConfig, base: TrainVLBartConfig, sets: Mapping[str, ValidationSet]) -> None:
    """Raises ValueError where a reported split (by task) has no spread, or pictures that are trained or tuned on, be it
    for another task."""
    for name, found in sets.items():
        if len({group_of(name, example) for example in found.table}) < 2:
            raise ValueError(f"report.tasks: {name} is about one picture, and intervals need two or more")
    for task in base.data.tasks:
        for split, source in (("train", task.train), ("valid", task.valid)):
            assert source is not None
            table = open_table(source, Path(base.data.tables), on_bad_data=base.data.on_bad_data)
            used = ValidationSet(table, source.images)
            for name, found in sets.items():
                if shared := sorted(shared_pictures(found, used)):
                    raise ValueError(
                        f"report.tasks: {len(shared)} pictures of {name} are also in the {split} of {task.task} in "
                        f"{config.base} (one is {shared[0]}): report others, with skip and limit if need be"
                    )


def shared_pictures(one: ValidationSet, other: ValidationSet) -> set[str]:
    """Those that two splits have in common: equal names, unless both say where, and these are different files."""
    if one.images is None or other.images is None:
        return {stem(name) for name in one.table.images()} & {stem(name) for name in other.table.images()}
    paths = [
        {str(resolve_path(split.images or "", "images").resolve() / name) for name in split.table.images()}
        for split in (one, other)
    ]
    return paths[0] & paths[1]


# --- what comes out --------------------------------------------------------------------------------------------------


def write_report(
    campaign: Campaign,
    bare: Mapping[str, AnswerScores],
    scores: Mapping[Variant, Mapping[str, AnswerScores]],
    chosen: Mapping[Variant, Chosen],
) -> None:
    """table.md and results.csv."""
    config, question_only = campaign.config, campaign.question_only()
    results = [VLResult(BARE, intervals(bare))]
    if question_only:
        results.append(
            VLResult(
                QUESTION_ONLY,
                {task: found for task, found in intervals(question_only).items() if task in question_only},
            )
        )
    for label, variant in table_rows([config.rank]):
        results.append(result(campaign, label, variant, scores[variant], chosen[variant]))
    dora = Variant("dora", config.rank)
    texts = [
        vl_results_table(results),
        about(campaign, scores[dora]),
        *([gain_over_question_only(str(dora), scores[dora], question_only)] if question_only else []),
        vl_contrasts_table(config.rank, scores),
    ]
    write_text(campaign.folder / "table.md", "\n\n".join(texts) + "\n")
    write_text(campaign.folder / "results.csv", vl_results_csv(results))
    print("\n\n".join(texts))
    print(f"\ntable    {campaign.folder / 'table.md'}")


def result(
    campaign: Campaign, label: str, variant: Variant, scores: Mapping[str, AnswerScores], chosen: Chosen
) -> VLResult:
    """Time and memory: the median of the trainings."""
    found = [campaign.trainings.summary(Training(variant, chosen.rate, seed)) for seed in campaign.config.seeds]
    return VLResult(
        label,
        intervals(scores),
        found[0]["parameters"],
        found[0]["trainable_share"],
        str(chosen),
        median(one["seconds_per_step"] for one in found),
        median(one["peak_memory_mb"] for one in found),
    )


def about(campaign: Campaign, scores: Mapping[str, AnswerScores]) -> str:
    """What the table is of, and how its intervals are meant."""
    config = campaign.config
    together = "all questions about a picture count together"
    if "nlvr2" in scores:
        together += ", and all sentences of a set of NLVR2"
    notes = [
        f"{len(config.seeds)} trainings of {config.steps} steps each, {config.workers} at a time. "
        f"Reported: {counted(scores)}.",
        f"In brackets: 95 % intervals over trainings and over what was asked about; {together}.",
        "Full fine-tuning trains every weight of the language model. Learning rates: each method's best on the "
        "validation splits, by the geometric mean of the metrics; *: the lowest or highest tried. Memory: the most "
        "that a training held, in 2^20 bytes.",
    ]
    if set(scores) & set(CAPTION_TASKS):
        notes.append(
            "CIDEr is the mean of each caption's own CIDEr-D, so it has its interval in the same way; how rare a word "
            "is follows from the references of the split, which are the same for all."
        )
    if missing := [HEADINGS[task] for task in campaign.sets if task not in scores]:
        notes.append(
            f"Not scored: {', '.join(missing)}. The tokenizer of caption metrics, a Java program, cannot run here."
        )
    return "\n\n".join(notes)
