"""Scores a VL-BART, bare or with an adapter, on validation or test splits, and shows what it answers."""

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dora_mm import io
from dora_mm.config.loader import dump_config, resolve_path
from dora_mm.config.vl import VIDEO_TASKS, EvalVLConfig
from dora_mm.data.pixels import load_rgb
from dora_mm.data.tables import ExampleTable
from dora_mm.data.vl import Example
from dora_mm.eval.examples_page import PageSection, Shown, write_examples_page
from dora_mm.eval.question_only import question_only_accuracy
from dora_mm.eval.submissions import suffix, write_predictions
from dora_mm.eval.vl import QUESTION_TASKS, Rows, VLScores, report, score, score_row
from dora_mm.eval.vl_scores import is_answered
from dora_mm.io.atomic import write_text
from dora_mm.io.digest import module_digest
from dora_mm.models.vl_loading import load_vl_bart
from dora_mm.tasks.eyes import Eyes
from dora_mm.tasks.vl_bart import VLBartTask
from dora_mm.tasks.vl_sets import ValidationSet, open_texts, open_validation
from dora_mm.train.adapters import adapter_folder, check_identity, load_vl_adapters, seed_of
from dora_mm.train.run import RunDirectory
from dora_mm.train.validation import answer_all, answerers, main_values

log = logging.getLogger(__name__)


def main(config: EvalVLConfig, *, resume: Path | None = None) -> None:
    # Everything that can be wrong with the input is found before the run directory exists.
    folder = adapter_folder(resolve_path(config.adapter, "adapter")) if config.adapter else None
    metadata = io.read(folder)[1] if folder else {}
    seed = seed_of(folder, metadata) if folder else 0
    eyes: Any = Eyes(config.vision, seed=seed)
    splits = open_validation(config.data, config.decode, eyes)
    loaded, tokenizer = load_vl_bart(config.model, eyes.feature_dim, seed)
    model: Any = loaded
    if folder:
        check_identity(folder, metadata, {"base_digest": module_digest(model), "eyes_digest": eyes.identity})
        load_vl_adapters(folder, model, eyes.tower, config.backend)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    task = VLBartTask(model.to(device), tokenizer, eyes.to(device))
    answerers(task, splits, config.decode)
    run = RunDirectory.create(config.name, dump_config(config), config.output)
    answered = answer_all(task, splits, config.decode)
    for name, rows in answered.items():
        write_predictions(name, rows, run.path / f"predictions_{name}{suffix(name)}")
    # Karpathy's VQA has rows without any answer among others: they count as wrong, and a note says how many.
    scored = {name: rows for name, rows in answered.items() if any(is_answered(example) for example, _ in rows)}
    scores = {name: score(name, rows, vqa_mode=config.vqa_mode) for name, rows in scored.items()}
    scores = {name: beside_guessing(config, name, found, splits[name].table) for name, found in scores.items()}
    write_report(config, run, scores, [name for name in answered if name not in scored])
    write_page(config, run, answered, splits)


def beside_guessing(config: EvalVLConfig, name: str, scores: VLScores, table: ExampleTable) -> VLScores:
    """With what the questions alone give away, where the training split is named: answers are guessed from its."""
    (task,) = (task for task in config.data.tasks if task.task == name)
    if task.train is None or name not in QUESTION_TASKS:
        return scores
    known = open_texts(task.train, config.data).answered()
    if not len(known):
        return replace(scores, notes=(*scores.notes, f"no question-only accuracy: {task.train.file} has no answers"))
    guessed = question_only_accuracy(known, table)
    return replace(scores, metrics={**scores.metrics, "question-only accuracy": guessed})


def write_report(config: EvalVLConfig, run: RunDirectory, scores: dict[str, VLScores], unscored: list[str]) -> None:
    """scores.json and report.md, and the latter on the screen."""
    values: dict[str, Any] = {name: asdict(found) for name, found in scores.items()}
    write_text(run.path / "scores.json", json.dumps(values, indent=2) + "\n")
    overall = ", ".join(f"{name} {value:.2f}" for name, value in main_values(scores).items())
    texts = [f"# {config.name}\n\n{overall}", *(f"## {name}\n\n{report(found)}" for name, found in scores.items())]
    texts += [f"## {name}\n\nNo answers to compare with: predictions only." for name in unscored]
    write_text(run.path / "report.md", "\n\n".join(texts) + "\n")
    print("\n\n".join(texts[1:]))
    print(f"\nreport   {run.path / 'report.md'}")


def write_page(
    config: EvalVLConfig, run: RunDirectory, answered: dict[str, Rows], splits: dict[str, ValidationSet]
) -> None:
    """Examples of every task, evenly spread over the split."""
    if not config.examples:
        return
    sections = []
    for name, rows in answered.items():
        chosen = rows[:: max(1, len(rows) // config.examples)][: config.examples]
        shown = [
            Shown.of(
                example,
                prediction,
                score_row(name, example, prediction, vqa_mode=config.vqa_mode),
                pictures(name, example, splits[name].images),
            )
            for example, prediction in chosen
        ]
        sections.append(PageSection(name, shown))
    write_examples_page(run.path / "examples.html", config.name, sections)
    print(f"examples {run.path / 'examples.html'}")


def pictures(task: str, example: Example, folder: str | None) -> list[Any]:
    """The pictures of an example, none where only features are known."""
    if task in VIDEO_TASKS or folder is None:
        return []
    return [load_rgb(resolve_path(folder, "images") / name, "white") for name in example.images]
