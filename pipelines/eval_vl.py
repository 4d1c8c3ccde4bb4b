"""Scores a vision-language model, bare or with an adapter, on validation or test splits, and shows what it answers."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from dora_mm import formats
from dora_mm.adapting.files import digest_of_adapter, header_of, load_trained, seed_of
from dora_mm.backend import about_layers
from dora_mm.config.paths import resolve_path
from dora_mm.config.pipelines import SCHEMAS
from dora_mm.config.vl import EvalVLConfig, TrainVLConfig
from dora_mm.data.vl.answers import AnsweredRows, predictions_of
from dora_mm.data.vl.example import Predictions
from dora_mm.data.vl.splits import ValidationSet, open_validation, training_texts
from dora_mm.data.vl.trained_rows import rows_trained_on
from dora_mm.eval.statistics import LEAST_GROUPS
from dora_mm.eval.vl.boxes import with_grids
from dora_mm.eval.vl.confidence_intervals import answer_scores, gain_over_question_only, groups_of, points
from dora_mm.eval.vl.metrics import QUESTION_ONLY, QUESTION_ONLY_RULE, conclusion
from dora_mm.eval.vl.question_only import mean_accuracy, question_only_answers
from dora_mm.eval.vl.reports import write_answers, write_examples, write_report
from dora_mm.eval.vl.same_answers import share_of_others, share_of_same
from dora_mm.eval.vl.scores import VLScores
from dora_mm.models.vl.families import is_local, load_vl_model
from dora_mm.models.vl.vl_model import VLModel
from dora_mm.registries.suites import suite_file
from dora_mm.registries.vl_tasks import TASKS
from dora_mm.sampling.answers import (
    AnswersFolder,
    KeptAnswer,
    Twice,
    answer_all,
    answer_unbatched,
    by_circumstances,
    mixed_circumstances,
    read_answers,
)
from dora_mm.tasks.preferences import KeptReference, Preferences
from dora_mm.tasks.vl import answerers
from dora_mm.train.day import RunDay, dated, day_for, day_of_run, started_on
from dora_mm.train.resuming import started_config
from dora_mm.train.run import check_reopened, evaluation_run
from dora_mm.train.validation import main_values
from dora_mm.utils.atomic import write_text
from dora_mm.utils.circumstances import NOTHING, about_kept, circumstances
from dora_mm.utils.day import Day, today
from dora_mm.utils.devices import default_device
from dora_mm.utils.digest import files_digest
from dora_mm.utils.processes import divided, started_together
from dora_mm.utils.run_directory import CONFIG, INPUTS, RunDirectory

log = logging.getLogger(__name__)
ANSWERS = "answers"  # the folder of a run


def main(config: EvalVLConfig, *, resume: Path | None = None) -> None:
    """Answers the splits, scores the answers and prints the report. Pairs are answered by their margins.

    Writes to the run directory: the answers of each task in predictions_<task> (in the format of its evaluation
    server) and scored_<task>.jsonl (for `dora-mm score`), scores.json, report.md, with `examples` examples.html, and
    with `same_as` same_answers.json; and in answers/ those so far, from which the same evaluation goes on if `output`
    names it.

    Args:
        config: The config; without `adapter` the bare model is scored.
        resume: Unused: the same command goes on.

    Raises:
        ValueError: The adapter, the model, the vision tower or the data cannot be used, or the adapter was trained with
            another base model or vision tower. The run directory is created only after these checks. Or `output` is
            that of another evaluation.
    """
    folder = formats.adapter_folder(resolve_path(config.adapter, "adapter")) if config.adapter else None
    seed, processes = seed_of(folder) if folder else 0, started_together()
    mapped = partial(divided, processes)
    day = RunDay(*processes.from_main(day_for(config.model, config.output, day_of_adapter(folder) if folder else None)))
    model = load_vl_model(dated(config, day).model, config.vision, seed=seed, device=default_device())
    model.day.source = day.source
    model.check(task.task for task in config.data.all_tasks)
    with processes.main_first():  # it writes the tables that the others open
        splits = open_validation(config.data, config.decode, model)
    if processes.is_main and is_local(config.model, config.vision):  # before the weights are loaded
        check_reopened(config, inputs_of(config, model, splits, folder))
    trained_on = about_trained_rows(folder, config, splits) if folder and processes.is_main else {}
    earlier = earlier_answers(config, data_of(splits), splits) if config.same_as else {}
    bare = KeptReference()
    bare.compute(model, splits, config.decode.batch_size, on_bad_data=config.data.on_bad_data, mapped=mapped)
    if folder:
        load_trained(model, folder, backend=config.backend)
    answers = answerers(model, splits, config.decode, Preferences(model, config.preference, bare))
    inputs = inputs_of(config, model, splits, folder)
    with processes.run(evaluation_run(config, inputs | started_on(model.day))) as run:
        now = circumstances(about_layers(config.backend))
        kept = AnswersFolder(run.path / ANSWERS, model.content, processes, model.day, now)
        arguments = (answers, model.networks.values(), splits)
        answered = answer_all(*arguments, config.decode.batch_size, mapped=mapped, folder=kept)
        twice = answer_unbatched(*arguments, answered, mapped) if batches_decide(config) else {}
        if not processes.is_main:
            return
        answered = {name: with_grids(rows, model.box_grid) for name, rows in answered.items()}
        unbatched = report_single_process(twice, config.model.dtype)
        scores = report_all(config, run, answered, splits, inputs, unbatched, model.day.recorded or "", trained_on)
        if config.same_as:
            report_same(config.same_as, run, splits, earlier, model.day)
        rows = {name: predictions_of(answered[name]) for name in scores}
        num_groups = {name: len(set(groups_of(name, [row for row, _ in found]))) for name, found in rows.items()}
        print(f"\n{conclusion(scores, num_groups, adapted=folder is not None)}")


def day_of_adapter(folder: Path) -> RunDay:
    """The day that an adapter has learned rows of; today where its header has none."""
    if day := header_of(folder).get("day"):
        try:
            return RunDay(date.fromisoformat(day).isoformat(), "that of the adapter")
        except ValueError:
            raise ValueError(f"{folder} names a day in its header that is none: {day!r:.50}; set model.date") from None
    return RunDay(today(), "today, since the adapter names no day (model.date gives one)")


def batches_decide(config: EvalVLConfig) -> bool:
    """Whether a row's sampled answer may depend on its batch, which changes half-precision logits by more than ties."""
    decode = config.decode
    is_half = config.model.dtype != "float32"
    return is_half and decode.temperature > 0 and decode.answers == "generate" and decode.batch_size > 1


def report_single_process(twice: Mapping[str, Twice], dtype: str) -> dict[str, Any]:
    """Prints which share of answers are others where each row is answered alone; returns it, by task."""
    found: dict[str, Any] = {}
    for name, rows in twice.items():
        share, count = share_of_others(name, rows)
        found[name] = {**share.as_dict(), "rows": count}
        print(f"alone    {points(share)} % of {count:,} drawn answers of {name} are others without a batch ({dtype})")
    return found


def about_trained_rows(folder: Path, config: EvalVLConfig, splits: Mapping[str, ValidationSet]) -> dict[str, str]:
    """Logs, and returns by task, how many rows the run of an adapter was trained on.

    An adapter in no run directory says nothing of its data.
    """
    runs = [path for path in list(folder.absolute().parents)[:2] if (path / CONFIG).is_file()]  # runs/a/001/best/chat
    if not runs or not (runs[0] / INPUTS).is_file():
        return {}
    run, found = runs[0], {}
    try:
        training = started_config(run, SCHEMAS)
        if isinstance(training, TrainVLConfig):
            found = rows_trained_on(training.data, config.data, splits)
    except ValueError as error:  # its files are elsewhere now
        log.warning("Whether %s was trained on these rows is not known: %s", run, error)
    sentences = {
        name: f"{count:,} of {len(splits[name].table):,} rows were trained on by {run}: this is no score of held-out "
        f"rows; take the data section of its {CONFIG}"
        for name, count in found.items()
    }
    for name, sentence in sentences.items():
        log.warning("%s: %s", name, sentence)
    return sentences


def data_of(splits: Mapping[str, ValidationSet]) -> dict[str, str]:
    """Digests of the rows of each task."""
    return {f"the data of {name}": found.identity for name, found in splits.items()}


def earlier_answers(
    config: EvalVLConfig, data: Mapping[str, str], splits: Mapping[str, ValidationSet]
) -> Mapping[str, Sequence[KeptAnswer]]:
    """The answers of the evaluation that `same_as` names, by task.

    Raises:
        ValueError: It is no finished evaluation of the same rows with the same settings of answers.
    """
    run = RunDirectory(resolve_path(config.same_as or "", "same_as"))
    before = started_config(run.path, SCHEMAS)
    if not isinstance(before, EvalVLConfig):
        raise ValueError(f"same_as: {run.path} is a run of {before.pipeline}, not an evaluation of eval_vl")
    size = {"batch_size": config.decode.batch_size}  # which changes no answer
    if before.decode.model_copy(update=size) != config.decode:
        raise ValueError(f"same_as: {run.path} was answered with another decode section: take the same")
    if changed := run.changed_inputs(data):
        raise ValueError(f"same_as: {run.path} answered other rows than these, by {changed[0]}")
    answers = {name: read_answers(run.path / ANSWERS, name) for name in splits}
    if short := next((name for name, split in splits.items() if len(answers[name]) < len(split.table)), None):
        raise ValueError(f"same_as: {run.path} has no answers to all rows of {short}: let it finish first")
    return answers


def report_same(
    other: str,
    run: RunDirectory,
    splits: Mapping[str, ValidationSet],
    earlier: Mapping[str, Sequence[KeptAnswer]],
    day: Day,
) -> None:
    """Prints how many answers are those of another evaluation, and writes it to same_answers.json.

    If the rows have a day, it also reports where that of the other evaluation differs.

    Raises:
        ValueError: An image is another one now.
    """
    found: dict[str, Any] = {}
    for name, split in splits.items():
        answers = read_answers(run.path / ANSWERS, name)
        both = zip(answers, earlier[name], strict=True)
        rows = []
        for row, (ours, theirs) in enumerate(both):
            if ours.content != theirs.content:
                raise ValueError(f"same_as: the images of {name}, row {split.table[row].id}, are not those of {other}")
            if ours.answer is not None and theirs.answer is not None:
                rows.append((split.table[row], ours.answer.text, theirs.answer.text))
        share, count = share_of_same(name, rows)
        found[name] = {**share.as_dict(), "rows": count}
        print(f"same     {points(share)} % of {count:,} answers of {name} are those of {other}")
        now = answers[-1].circumstances if answers else NOTHING
        if message := about_kept(by_circumstances(earlier[name]), now, f"answers of {other}"):
            log.warning(message)
    if day.num_requests and day.date != (theirs := day_of_run(resolve_path(other, "same_as")).date):
        found["days"] = [day.date, theirs]
        print(f"same     the chat template asks for the day: rows have {day.date} here, and {theirs} in {other}")
    write_text(run.path / "same_answers.json", json.dumps({"same_as": other, **found}, indent=2) + "\n")


def inputs_of(
    config: EvalVLConfig, model: VLModel, splits: Mapping[str, ValidationSet], adapter: Path | None
) -> dict[str, Any]:
    """Digests of all that the config refers to, by a description of each."""
    inputs = data_of(splits) | model.identity.inputs
    inputs |= {f"the suite {name}": files_digest([file]) for name in splits if (file := suite_file(name))}
    return inputs | ({"the adapter": digest_of_adapter(adapter)} if adapter else {})


def report_all(
    config: EvalVLConfig,
    run: RunDirectory,
    answered: Mapping[str, AnsweredRows],
    splits: dict[str, ValidationSet],
    inputs: Mapping[str, Any],
    unbatched: Mapping[str, Any],
    day: str,
    trained_on: Mapping[str, str],
) -> dict[str, VLScores]:
    """Scores the answers, writes all files of the run directory, and prints the report; returns the scores by task.

    What `report_single_process` returns is a part of the settings, under `others_alone`. The day is that of `About`;
    `trained_on` is what `about_trained_rows` returns.
    """
    settings = {"decode": config.decode.model_dump(mode="json"), "model": config.model.model_dump(mode="json")}
    settings |= {"others_alone": unbatched} if unbatched else {}
    notes = {name: mixed_circumstances(run.path / ANSWERS, name) for name in answered}
    scores = write_answers(run.path, answered, settings, inputs, getattr(config.model, "prompts", {}), notes, day)
    scores = {
        name: with_question_only_accuracy(config, name, found, predictions_of(answered[name]))
        for name, found in scores.items()
    }
    for name in scores.keys() & trained_on.keys():
        scores[name] = replace(scores[name], notes=(*scores[name].notes, trained_on[name]))
    unscored = [name for name in answered if name not in scores]
    write_report(run.path, config.name, scores, unscored, main_values(scores))
    folders = {name: split.images for name, split in splits.items()}
    write_examples(run.path, config.name, answered, folders, config.examples)
    return scores


def with_question_only_accuracy(config: EvalVLConfig, name: str, scores: VLScores, rows: Predictions) -> VLScores:
    """Adds the question-only accuracy, of answers that are guessed from the training split without any image.

    A note has the paired difference with its interval. The scores of tasks without questions, or whose training split
    is not in the config, stay as they are.
    """
    (task,) = (task for task in config.data.all_tasks if task.task == name)
    if task.train is None or TASKS[name].kind == "captions" or TASKS[name].pairs:
        return scores
    training = training_texts(task, config.data).answered()
    if not len(training):
        return replace(scores, notes=(*scores.notes, f"no question-only accuracy: {task.train.title} has no answers"))
    examples = [example for example, _ in rows]
    guesses = list(zip(examples, question_only_answers(training, examples), strict=True))
    notes = list(scores.notes)
    ours, guessed = answer_scores(name, [rows]), answer_scores(name, [guesses])
    if ours and guessed and len(set(ours.groups)) >= LEAST_GROUPS:
        notes.append(gain_over_question_only("These answers", {name: ours}, {name: guessed}))
    guessed_score = 100 * float(guessed.values_QS.mean()) if guessed else mean_accuracy(guesses)
    metrics = {**scores.metrics, QUESTION_ONLY: guessed_score}
    rules = {**scores.rules, QUESTION_ONLY: f"{scores.main} of {QUESTION_ONLY_RULE}"}
    return replace(scores, metrics=metrics, notes=tuple(notes), rules=rules)
