"""What campaigns read: a small VL-BART, features, and questions; and their trainings as forks of the campaign."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dora_mm.cli import main as dora_mm_main
from dora_mm.models.vl.vl_bart.loading import from_bart, save_vl_bart
from dora_mm.studies.campaigns import subprocesses, trainings
from tests.shared.data.vl_files import vqa_annotation, vqa_question, vqa_v2
from tests.shared.vl.small_vl_bart import DIM, small_bart, small_tokenizer

SPLITS = {"train": (42, 43), "valid": (44,), "report": (45, 46)}  # the numbers of their images
CAMPAIGN = (  # results.csv and table.md have the seconds of trainings
    r"versions\.json|metrics|summary|events\.out|checkpoint\.json|state\.safetensors|\.html$|\.svg$|\.png$|logs/"
    r"|trainings\.csv|tables/|results\.csv|table\.md"
)
BASE = {
    "pipeline": "train_vl",
    "model": {"family": "vl_bart", "path": "bart"},
    "vision": {"features": ["features"]},
    "adapter": {"rank": 2},
    "data": {"tables": "tables"},
    "optimizer": {"lr": 0.01},
    "train": {"steps": 2, "batch_size": 2, "checkpoint_every": 1, "log_every": 1},
}
COMPARE = {
    "pipeline": "compare",
    "output": "out/compare",
    "base": "base.yaml",
    "steps": 2,
    "ranks": [1],
    "half_ranks": False,
    "learning_rates": {method: [0.01, 0.02, 0.04] for method in ("full", "lora", "dora")},
    "extra_rates": 0,
    "seeds": [0, 1],
    "workers": 1,
}


def prepare_campaigns() -> None:
    """Writes to the current directory."""
    save_vl_bart(from_bart(small_bart(), len(small_tokenizer()), DIM, "image"), small_tokenizer(), Path("bart"))
    Path("features").mkdir()
    numbers = np.random.default_rng(0)
    for image in (image for images in SPLITS.values() for image in images):
        values = numbers.normal(size=(4, DIM)).astype(np.float32)
        np.savez(f"features/COCO_val2014_{image:012d}.npz", features=values)
    sources = {name: _source(name, images) for name, images in SPLITS.items()}
    task = {"task": "vqa", "train": sources["train"], "valid": sources["valid"]}
    base = BASE | {"data": {"tables": "tables", "tasks": [task]}}
    report = {"report": {"tables": "tables", "tasks": [{"task": "vqa", "valid": sources["report"]}]}}
    for name, values in {"base": base, "compare": COMPARE | {"vl": report}}.items():
        Path(f"{name}.yaml").write_text(json.dumps(values))
    answers = [{"id": str(number), "prediction": "a dog"} for number in range(3)]
    rows = [
        {"questionId": number, "question": "What is it?", "image": f"{number}.png", "answers": ["a dog", "dog"]}
        for number in range(3)
    ]
    Path("answers.json").write_text(json.dumps(answers))
    Path("docvqa.json").write_text(json.dumps({"dataset_name": "it", "dataset_version": "1.0", "data": rows}))


def _source(name: str, images: tuple[int, ...]) -> dict[str, Any]:
    folder = Path("questions") / name
    folder.mkdir(parents=True)
    rows = [2 * (image - 42) + which for image in images for which in (0, 1)]
    source = vqa_v2(folder, [vqa_question(row) for row in rows], [vqa_annotation(row) for row in rows])
    return {"format": "vqa_v2", "file": source.file, "annotations": source.annotations}


# --- trainings --------------------------------------------------------------------------------------------------------


class Forked:
    """A process as `subprocess.Popen` has one."""

    def __init__(self, pid: int):
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if found else None
        return self.returncode

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def start_forked(name: str, arguments: list[str], log_file: Path, threads: int) -> subprocesses.TrainingProcess:
    """Starts a training as `subprocesses.start_process` does, which is disturbed like the campaign."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    output = log_file.open("w", encoding="utf-8")
    if not (child := os.fork()):
        code = 1
        try:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            torch.set_num_threads(threads)
            code = dora_mm_main(arguments)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)
    output.close()
    return subprocesses.TrainingProcess(name, Forked(child), log_file)  # pyright: ignore[reportArgumentType]


trainings.start_process = start_forked  # a new interpreter takes seconds for its imports
subprocesses.POLL_SECONDS = 0.01
