"""The commands that a model is rehearsed with, in order."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.rehearsal.measuring import Measured, measured

ROOT = Path(__file__).resolve().parents[2]
SHOWN = ("bus", "crown", "dog", "sun")  # of samples/3d_icon
IMAGES, ROWS, PROMPTS = "pictures", "data.json", "one.txt"
ON_PROCESSOR = ("backend=torch",)  # by which the dry run counts what a processor takes
BEFORE, STEPS = "before the steps", "steps"
OPENED = b". After a stop: dora-mm train"


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        label: What it is called in tables.
        arguments: Of `dora-mm`.
        trains: It takes the steps that the dry run is about.
        killed: It is ended by SIGKILL once a checkpoint is there.
        writes: What it leaves that is removed at once, beside the model as large as that.
        is_forecast: It is the dry run of the training that follows.
    """

    label: str
    arguments: tuple[str, ...]
    trains: bool = False
    killed: bool = False
    writes: str | None = None
    is_forecast: bool = False


def prepare(folder: Path) -> None:
    """Copies images with captions, and writes rows of questions and a file of one prompt."""
    source, images = ROOT / "samples/3d_icon", folder / IMAGES
    images.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
    chosen = [row for row in rows if row["file_name"].partition(".")[0] in SHOWN]
    for row in chosen:
        shutil.copy(source / row["file_name"], images)
    (images / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    asked = {"from": "human", "value": "<image>\nWhat is it?"}
    conversations: list[Any] = [
        {"image": row["file_name"], "conversations": [asked, {"from": "gpt", "value": row["text"]}]} for row in chosen
    ]
    (folder / ROWS).write_text(json.dumps(conversations))
    (folder / PROMPTS).write_text(f"{chosen[0]['text']}\n")


def of_images(family: str, model: str, settings: Sequence[str], further: Mapping[str, Sequence[str]]) -> list[Stage]:
    """Those of an image model.

    Args:
        family: As `dora-mm new` calls it.
        model: The folder or file.
        settings: What the training is told beside what `new` has written.
        further: Trainings of one step beside it: what they are, and the settings that make them.
    """
    given, side = _set(*settings), next(each for each in settings if each.startswith("data.resolution")).split("=")[1]
    drawn = _set("adapter.path=runs/style/001", "steps=2", f"width={side}", f"height={side}")
    return [
        Stage("new", ("new", family, "style", "--images", IMAGES, "--model", model)),
        Stage("dry run as written", ("train", "style.yaml", "--dry-run")),
        *_training("style", given),
        Stage("sample, an image of 2 steps", ("sample", PROMPTS, *drawn)),
        Stage("convert", ("convert", "runs/style/001", "style.safetensors", "--to", "comfy", "--base", model)),
        Stage("verify", ("verify", "style.safetensors", "--base", model)),
        Stage("inspect", ("inspect", model)),
        Stage("inspect the adapter", ("inspect", "runs/style/001")),
        _merging(("convert", "runs/style/001"), ("--to", "merged", "--base", model), Path(model).suffix),
        *(
            Stage(f"train, {name}: 1 step", ("train", "style.yaml", *_set(*settings, *more, "train.steps=1")))
            for name, more in further.items()
        ),
    ]


def of_questions(settings: Sequence[str]) -> list[Stage]:
    """Those of a vision-language model in `model`."""
    run, asked = "runs/questions/001", ("ask", "model", f"{IMAGES}/bus.webp", "What is it?")
    return [
        Stage("new", ("new", "vlm", "questions", "--images", IMAGES, "--data", ROWS, "--model", "model")),
        *_training("questions", _set(*settings)),
        Stage("ask", (*asked, "--adapter", run, "--max-new-tokens", "4")),
        Stage("convert", ("convert", run, "peft", "--to", "peft")),
        Stage("verify", ("verify", "peft", "--tool", "peft", "--base", "model")),
        Stage("inspect", ("inspect", "model")),
        Stage("inspect the adapter", ("inspect", run)),
        _merging(("merge", "model", run)),
    ]


def _training(name: str, given: tuple[str, ...]) -> list[Stage]:
    file = f"{name}.yaml"
    return [
        Stage("dry run", ("train", file, "--dry-run", *given), is_forecast=True),
        Stage("train, killed after a step", ("train", file, *given), trains=True, killed=True),
        Stage("resume, the second step", ("train", "--resume", f"runs/{name}/001"), trains=True),
    ]


def _merging(before: tuple[str, ...], after: tuple[str, ...] = (), suffix: str = "") -> Stage:
    out = f"merged{suffix}"
    return Stage("merge", (*before, out, *after), writes=out)


def _set(*values: str) -> tuple[str, ...]:
    on_processor = () if torch.cuda.is_available() or any("adapter.path" in each for each in values) else ON_PROCESSOR
    return ("--set", *values, *on_processor)


def run_stage(stage: Stage, folder: Path) -> Measured:
    """Runs a command, and removes the large copies that it writes."""
    log = folder / "logs" / f"{stage.label.replace(' ', '_').replace(',', '').replace(':', '')}.txt"
    log.parent.mkdir(exist_ok=True)

    def phase() -> str:
        """The run directory is opened, which is said, for the first step."""
        return STEPS if OPENED in log.read_bytes() else BEFORE

    def should_stop() -> bool:
        return stage.killed and any(folder.glob("runs/*/*/checkpoints/step-*/*"))

    found = measured(stage.arguments, folder, log, phase=phase, should_stop=should_stop)
    for path in [folder / stage.writes] if stage.writes else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return found
