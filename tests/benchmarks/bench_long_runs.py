"""Measures the memory and the open files of trainings of thousands of steps, on tiny models with random weights.

    python -m tests.benchmarks.bench_long_runs [--steps 2000] [--only pictures|vl_bart|vlm] [--output FILE]

Each training is a process of its own, with checkpoints, validations and sheets on the way, which is looked at while it
runs: the resident memory, and the number of open files, at tenths of its steps.
"""

import argparse
import csv
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

ROOT = Path(__file__).parents[2]


class Look(NamedTuple):
    """A training at a step: its resident memory, and how many files it has open."""

    training: str
    step: int
    megabytes: int
    open_files: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--only", nargs="*", choices=TRAININGS)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    looks = []
    for name in given.only or TRAININGS:
        with tempfile.TemporaryDirectory() as folder:
            for look in watched(name, given.steps, Path(folder)):
                print(*look, flush=True)
                looks.append(look)
    if given.output:
        with given.output.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([Look._fields, *looks])


def watched(name: str, steps: int, folder: Path) -> Iterator[Look]:
    """Runs a training of so many steps, and looks at it behind each tenth of them.

    Args:
        name: One of TRAININGS.
        steps: Its steps.
        folder: An empty folder for what it reads and writes.

    Raises:
        RuntimeError: It fails.
    """
    tenth = max(steps // 10, 1)
    config = {
        "output": str(folder / "run"),
        "optimizer": {"lr": 1e-3},
        "train": {"steps": steps, "batch_size": 1, "checkpoint_every": tenth, "log_every": 1},
        "evaluate": {"every": tenth},
    }
    (folder / "config.yaml").write_text(json.dumps({**config, **TRAININGS[name](folder)}))
    command = [sys.executable, "-m", "dora_mm", "train", str(folder / "config.yaml")]
    with (folder / "said").open("w") as said:
        process = psutil.Popen(command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=said, stderr=said)
        due = tenth
        while process.poll() is None:
            time.sleep(0.05)
            if (step := last_step(folder / "run" / "metrics.jsonl")) >= due:
                due = (step // tenth + 1) * tenth
                try:
                    yield Look(name, step, process.memory_info().rss >> 20, process.num_fds())
                except psutil.Error:  # it has ended since
                    break
    if process.wait():
        raise RuntimeError((folder / "said").read_text())


def last_step(file: Path) -> int:
    """The step of the last whole row of a log."""
    if not file.exists():
        return 0
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - 4096))
        lines = [line for line in opened.read().split(b"\n")[:-1] if line.startswith(b"{") and line.endswith(b"}")]
    return max((json.loads(line).get("step", 0) for line in lines), default=0)


def images(folder: Path) -> dict[str, Any]:
    from dora_mm.models.images.sdxl.random_weights import build_tiny_sdxl
    from tests.conftest import SIZES
    from tests.shared.data.images_made import write_images

    build_tiny_sdxl(**SIZES).pipeline().save_pretrained(folder / "model")
    (folder / "pictures").mkdir()
    write_images(folder / "pictures")
    return {
        "pipeline": "train_diffusion",
        "model": {"path": str(folder / "model")},
        "adapter": {"rank": 4},
        "data": {"folder": str(folder / "pictures"), "resolution": 64, "valid": {"share": 0.4}},
        "sample": {"prompts": ["a bus"], "steps": 1},
    }


def vl_bart(folder: Path) -> dict[str, Any]:
    from tests.shared.data.vlm_rows import write_images, write_questions
    from tests.shared.vl.small_towers import DIM, small_tower
    from tests.shared.vl.small_vl_bart import vl_bart as model_and_data

    (folder / "data").mkdir()
    questions = write_questions(folder / "data", write_images(folder / "data"))
    found = model_and_data(folder, DIM, small_tower(folder), questions)
    data = found["data"] | {"tables": str(folder / "tables")}
    data["tasks"] = [{**task, "valid": questions["valid"]} for task in data["tasks"]]
    return {"pipeline": "train_vl", "adapter": {"rank": 4}, **found, "data": data}


def vlm(folder: Path) -> dict[str, Any]:
    from tests.shared.data.vlm_rows import write_images, write_questions
    from tests.shared.vl import tiny_vlm as tiny

    (folder / "data").mkdir()
    questions = write_questions(folder / "data", write_images(folder / "data"))
    model = tiny.build("qwen2_5_vl", folder / "model")
    data = {**questions, "tables": str(folder / "tables")}
    return {"pipeline": "train_vl", "model": {"path": str(model)}, "adapter": {"rank": 4}, "data": data}


TRAININGS: dict[str, Callable[[Path], dict[str, Any]]] = {"pictures": images, "vl_bart": vl_bart, "vlm": vlm}

if __name__ == "__main__":
    main()
