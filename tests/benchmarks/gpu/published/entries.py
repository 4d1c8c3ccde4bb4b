"""The two comparisons of PEFT as entries of `make gpu`: a result file for each adapter and seed."""

import datetime
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import set_seed

from dora_mm import fuse_peft
from tests.benchmarks.gpu.published.image_gen import ImageGeneration
from tests.benchmarks.gpu.published.inputs import COMMAND, DATA, Inputs
from tests.benchmarks.gpu.published.metamath import MetaMath
from tests.benchmarks.gpu.published.record import published, result, save
from tests.benchmarks.gpu.published.tiny import TINY_SETTINGS, tiny_inputs
from tests.benchmarks.gpu.published.training import Memory, train
from tests.benchmarks.gpu.run import Run

SEEDS = (0, 1, 2)  # the first is PEFT's own


@dataclass(frozen=True)
class Comparison:
    """One of PEFT's comparisons.

    Attributes:
        task: Its name there, and of the folder of results.
        build: Makes the model with its rows.
        files: What it reads, besides its models.
        data: The data sets that a result names, by PEFT's names for them.
        lora: The published experiment with LoRA.
        dora: The one with DoRA.
    """

    task: str
    build: Callable[..., Any]
    files: tuple[str, ...]
    data: tuple[str, ...]
    lora: str
    dora: str

    def experiments(self) -> list[tuple[str, str, bool]]:
        """The name of each experiment, the published one whose settings it has, and whether its layers are fused."""
        fused = f"{self.dora.removesuffix('-dora')}-dora-fused" if self.dora.endswith("-dora") else f"{self.dora}-fused"
        return [(self.dora, self.dora, False), (fused, self.dora, True), (self.lora, self.lora, False)]


METAMATH = Comparison(
    "MetaMathQA",
    MetaMath,
    ("metamathqa.jsonl", "gsm8k_valid.jsonl", "gsm8k_test.jsonl", "wiki.jsonl"),
    ("metamath", "gsm8k"),
    "lora--llama-3.2-3B-rank32",
    "lora--llama-3.2-3B-rank32-dora",
)
IMAGES = Comparison(
    "image-gen", ImageGeneration, ("cats",), ("cats",), "lora--flux2-klein-rank64", "dora--flux2-klein-rank64"
)


def run_metamath(run: Run) -> None:
    """Trains Llama-3.2-3B on MetaMathQA: q and v at rank 32, 5,000 steps."""
    compare(run, METAMATH)


def run_images(run: Run) -> None:
    """Trains FLUX.2 klein base 4B on 14 images of 512 px: rank 64, 750 steps."""
    compare(run, IMAGES)


def compare(run: Run, comparison: Comparison) -> None:
    """Trains what has no result yet, all adapters with one seed before any has the next."""
    with tempfile.TemporaryDirectory() as temporary:
        inputs = tiny_inputs(Path(temporary)) if run.dry else Inputs(run.inputs or Path())
        settings = published(comparison.task, comparison.lora)["run_info"]["train_config"]
        models = [settings[key] for key in ("model_id", "dino_model_id") if key in settings]
        if missing := inputs.missing(*models, *comparison.files):
            where = f"INPUTS={run.inputs} lacks" if run.inputs else "INPUTS names no folder with"
            run.leave_out(f"all of {run.name}: {where} {', '.join(missing)}; `{COMMAND}` downloads them")
            return
        for seed in SEEDS[: 1 if run.dry else None]:
            for experiment in comparison.experiments():
                if not run.is_cut(name_of(experiment[0], seed)):
                    one(run, comparison, inputs, experiment, seed)


def one(run: Run, comparison: Comparison, inputs: Inputs, experiment: tuple[str, str, bool], seed: int) -> None:
    """Trains one adapter with one seed, and writes its result."""
    name = name_of(experiment[0], seed)
    path = run.folder / "method_comparison" / comparison.task / f"{name}.json"
    if path.exists() and '"status": "success"' in path.read_text():
        print(f"{name}: {path} has its result already", flush=True)
        return
    with run.trying("our DoRA" if experiment[2] else "PEFT", name):
        save(path, measured(run, comparison, inputs, experiment, seed))


def measured(
    run: Run, comparison: Comparison, inputs: Inputs, experiment: tuple[str, str, bool], seed: int
) -> dict[str, Any]:
    """The result of one training."""
    print(f"\n{name_of(experiment[0], seed)}", flush=True)
    start, created = time.perf_counter(), datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat()
    info = published(comparison.task, experiment[1])["run_info"]
    settings = info["train_config"] | {"seed": seed} | (TINY_SETTINGS[comparison.task] if run.dry else {})
    set_seed(seed)
    memory = Memory(run.device)
    task = comparison.build(inputs, run.device, settings, info["peft_config"])
    if experiment[2]:
        print(fuse_peft(task.model), flush=True)
    trained = train(run, task, settings, memory)
    trained.file_size = file_size(task.model)
    trained.total_time = time.perf_counter() - start
    found = {name: inputs.revision(DATA[name]) for name in comparison.data}
    about = {"model_info": inputs.revision(settings["model_id"])}
    about["dataset_info"] = found if len(found) > 1 else found[comparison.data[0]]
    task.config.base_model_name_or_path = info["peft_config"]["base_model_name_or_path"]  # not where it lies here
    name = name_of(experiment[0], seed).replace("--", "/", 1)
    return result(name, created, settings, task.config, trained, about)


def name_of(experiment: str, seed: int) -> str:
    return f"{experiment}-seed{seed}" if seed else experiment


def file_size(model: Any) -> int:
    """The size of the adapter's file, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return os.stat(Path(folder) / SAFETENSORS_WEIGHTS_NAME).st_size
