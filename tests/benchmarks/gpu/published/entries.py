"""The two comparisons of PEFT as entries of `make gpu`: a result file for each adapter and seed."""

import datetime
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import set_seed

from dora_mm import fuse_peft
from tests.benchmarks.gpu.published.experiments import IMAGES, METAMATH, SEEDS, Comparison, Experiment, name_of
from tests.benchmarks.gpu.published.image_gen import ImageGeneration
from tests.benchmarks.gpu.published.inputs import COMMAND, DATA, Inputs
from tests.benchmarks.gpu.published.metamath import MetaMath
from tests.benchmarks.gpu.published.record import published, result, save
from tests.benchmarks.gpu.published.tiny import TINY_SETTINGS, tiny_inputs
from tests.benchmarks.gpu.published.training import Memory, train
from tests.benchmarks.gpu.run import Run

BUILDERS = {"MetaMathQA": MetaMath, "image-gen": ImageGeneration}


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
        settings = published(comparison.task, comparison.experiments[0].name)["run_info"]["train_config"]
        models = [settings[key] for key in ("model_id", "dino_model_id") if key in settings]
        if missing := inputs.missing(*models, *comparison.files):
            where = f"INPUTS={run.inputs} lacks" if run.inputs else "INPUTS names no folder with"
            run.leave_out(f"all of {run.name}: {where} {', '.join(missing)}; `{COMMAND}` downloads them")
            return
        for seed in SEEDS[: 1 if run.dry else None]:
            for experiment in comparison.experiments:
                if not run.is_cut(name_of(experiment.name, seed)):
                    one(run, comparison, inputs, experiment, seed)


def one(run: Run, comparison: Comparison, inputs: Inputs, experiment: Experiment, seed: int) -> None:
    """Trains one adapter with one seed, and writes its result."""
    name = name_of(experiment.name, seed)
    path = run.folder / "method_comparison" / comparison.task / f"{name}.json"
    if path.exists() and '"status": "success"' in path.read_text():
        print(f"{name}: {path} has its result already", flush=True)
        return
    with run.trying("our DoRA" if experiment.is_fused else "PEFT", name):
        save(path, measured(run, comparison, inputs, experiment, seed))


def measured(run: Run, comparison: Comparison, inputs: Inputs, experiment: Experiment, seed: int) -> dict[str, Any]:
    """The result of one training."""
    print(f"\n{name_of(experiment.name, seed)}", flush=True)
    start, created = time.perf_counter(), datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat()
    info = published(comparison.task, experiment.settings_of)["run_info"]
    settings = info["train_config"] | {"seed": seed} | (TINY_SETTINGS[comparison.task] if run.dry else {})
    set_seed(seed)
    memory = Memory(run.device)
    task = BUILDERS[comparison.task](inputs, run.device, settings, info["peft_config"])
    if experiment.is_fused:
        print(fuse_peft(task.model), flush=True)
    trained = train(run, task, settings, memory)
    trained.file_size = file_size(task.model)
    trained.total_time = time.perf_counter() - start
    found = {name: inputs.revision(DATA[name]) for name in comparison.data}
    about = {"model_info": inputs.revision(settings["model_id"])}
    about["dataset_info"] = found if len(found) > 1 else found[comparison.data[0]]
    task.config.base_model_name_or_path = info["peft_config"]["base_model_name_or_path"]  # not where it lies here
    name = name_of(experiment.name, seed).replace("--", "/", 1)
    return result(name, created, settings, task.config, trained, about)


def file_size(model: Any) -> int:
    """The size of the adapter's file, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return os.stat(Path(folder) / SAFETENSORS_WEIGHTS_NAME).st_size
