"""docs/studies/gpu_tables.md, from the files of results; `python -m tests.documented.gpu_tables` writes it."""

import csv
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.gpu.published.experiments import IMAGES, METAMATH, Comparison

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "studies" / "gpu_tables.md"
RESULTS = ROOT / "tests" / "benchmarks" / "results"
PEFT = "https://github.com/huggingface/peft/blob/5d602fdbf/method_comparison"
AUTOMODEL = "https://github.com/NVIDIA-NeMo/Automodel/blob/36044ad3d/docs/performance-summary.mdx"
EMPTY = "not measured"
SHAPE = ("gpus", "gbs", "mbs", "lbs", "ga", "seq_length")
HEAD = f"""\
# GPU tables

[MetaMathQA](#metamathqa) · [Images](#images) · [Language models](#language-models) · [How to fill
them](#how-to-fill-them)

The tables that others publish, with their rows and ours. A row with "{EMPTY}" waits for a GPU. [What will be
measured](preregistration.md) was written down first. `python -m tests.documented.gpu_tables` writes this page from
`tests/benchmarks/results/`.

In the tables of PEFT, "fused" is PEFT's DoRA after `fuse_peft(model)`: the same settings, and one line more. The
seconds of a step are PEFT's `train time` of all its steps by their number: they leave out validation. The training's
seconds are its `train_time`, which has the preparation and the test in it. GB are 10^9 bytes.

## MetaMathQA

Llama-3.2-3B, q and v at rank 32, 5,000 steps of 4 rows, scored on GSM8K. The published rows are from an NVIDIA L40S,
in [PEFT's comparison]({PEFT}/MetaMathQA).

"""
IMAGES_HEAD = f"""
## Images

FLUX.2 klein base 4B, 11 kinds of layers at rank 64, 750 steps of 2 images of 512 px with gradient checkpointing, scored
by DINOv2. The published rows are from an NVIDIA L40S, in
[PEFT's comparison]({PEFT}/image-gen).

"""
AUTOMODEL_HEAD = f"""
## Language models

LoRA or DoRA on all linear layers of the blocks at rank 16, on full sequences, in the columns of NeMo AutoModel's
[performance summary]({AUTOMODEL}).
Its rows are of a DGX-H100 in BF16 with kernels of Transformer Engine and a dropout of 0.1; ours have neither. TFLOPs
are those of the model, by AutoModel's formula; adapters add none.

"""
TAIL = """
## How to fill them

```
python -m tests.benchmarks.gpu.published.inputs FOLDER   # models and data of PEFT's comparison, 30 GB
make gpu ONLY="images metamath" INPUTS=FOLDER            # hours: each training has its file when it is finished
make gpu ONLY=automodel                                  # random weights: 20 minutes, 80 GB of GPU memory
make gpu ONLY="images metamath automodel" DRY=1          # tiny models on a CPU
python -m tests.documented.gpu_tables
```

The same command continues with what has no result yet. Result files have the form of PEFT's, whose own
`method_comparison/processing.py` reads them; `package_info` names the release and commit of dora_mm, too. With the tiny
models on a CPU, losses, scores and counts equal those of PEFT's own scripts (at 5d602fdbf): of MetaMathQA in
every bit, of images within 5e-8.
"""
Row = list[str]


def page(results: Path = RESULTS) -> str:
    """The page."""
    tables = [peft_table(METAMATH, results), peft_table(IMAGES, results), automodel_table(results)]
    parts = zip((HEAD, IMAGES_HEAD, AUTOMODEL_HEAD), tables, strict=True)
    return "".join(head + table for head, table in parts) + TAIL


def markdown(columns: Row, rows: list[Row]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def peft_table(comparison: Comparison, results: Path) -> str:
    """The published results, and ours: of experiments that have none a row that says so."""
    columns = ["experiment", "seed", "GPU", "s per step", "training, s", "peak, GB", "file, MB"]
    columns += [comparison.score.replace("_", " "), comparison.lost, "PEFT", "torch", "from"]
    peers = sorted((RESULTS / "peers" / "peft" / comparison.task).glob("*.json"))
    rows = [peft_row(read(path), comparison, f"[PEFT]({PEFT}/{comparison.task}/results/{path.name})") for path in peers]
    for experiment in comparison.experiments:
        paths = sorted(results.glob(f"*/method_comparison/{comparison.task}/{experiment.name}*.json"))
        mine = [path for path in paths if path.stem.partition("-seed")[0] == experiment.name]
        rows += [peft_row(read(path), comparison, "dora_mm") for path in mine]
        shown = title(experiment.name)
        rows += [] if mine else [[shown, "", *[EMPTY] * (len(columns) - 3), "dora_mm"]]
    return markdown(columns, rows)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def title(name: str) -> str:
    """An experiment without the name of its model."""
    method = "DoRA" if "dora" in name else "LoRA"
    return f"{method}, fused" if "-fused" in name else method


def peft_row(result: dict[str, Any], comparison: Comparison, source: str) -> Row:
    """The cells of one result; where it did not end, what its status is."""
    run, train, meta = result["run_info"], result["train_info"], result["meta_info"]
    package, settings = meta["package_info"], run["train_config"]
    cells = [title(run["experiment_name"]), str(settings["seed"]), meta["system_info"]["accelerator"]]
    versions = [package["peft-version"], package["torch-version"], source]
    if train["status"] != "success":
        return [*cells, *[train["status"]] * 6, *versions]
    steps, last = [each["train time"] for each in train["metrics"] if "train time" in each], train["metrics"][-1]
    seconds = sum(steps) / len(steps) / settings["eval_steps"]
    sizes = [f"{train['accelerator_memory_max'] / 1e9:.1f}", f"{train['file_size'] / 1e6:.0f}"]
    scores = [f"{last[f'test {comparison.score}']:.3f}", f"{last[comparison.lost]:.3f}"]
    return [*cells, f"{seconds:.3f}", f"{train['train_time']:.0f}", *sizes, *scores, *versions]


def automodel_table(results: Path) -> str:
    """The published rows, and ours with the adapter of each."""
    columns = ["Model", "adapter", "#GPUs", "GBS", "MBS", "LBS", "GA", "Seq Length", "Kernel Optimizations"]
    columns += ["Time per Global Step (s)", "Model TFLOPs/sec/GPU", "Tokens/sec/GPU", "GPU", "from"]
    theirs = list(lines(RESULTS / "peers" / "automodel.csv"))
    ours = [
        row for path in sorted(results.glob("*/automodel.csv")) if path.parent.name != "peers" for row in lines(path)
    ]
    rows = [automodel_row(row, "LoRA", row["kernels"], "H100", "AutoModel") for row in theirs]
    rows += [automodel_row(row, row["contender"], row["backend"], row["card"], "dora_mm") for row in ours]
    measured = {(row["model"], row["contender"]) for row in ours}
    for row, adapter in itertools.product(
        theirs, ("PEFT LoRA", "PEFT DoRA", "PEFT DoRA, fused", "our LoRA", "our DoRA")
    ):
        if (row["model"], adapter) not in measured:
            rows.append([row["model"], adapter, *(row[key] for key in SHAPE), *[EMPTY] * 5, "dora_mm"])
    return markdown(columns, rows)


def lines(path: Path) -> Iterator[dict[str, str]]:
    with path.open(newline="") as file:
        yield from csv.DictReader(file)


def automodel_row(row: dict[str, str], adapter: str, kernels: str, gpu: str, source: str) -> Row:
    shape = [row[key] for key in SHAPE]
    seconds, tflops = f"{float(row['step_seconds']):.2f}", f"{float(row['tflops_per_gpu']):.0f}"
    tokens = f"{float(row['tokens_per_second_per_gpu']):,.0f}"
    return [row["model"], adapter, *shape, kernels, seconds, tflops, tokens, gpu, source]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
