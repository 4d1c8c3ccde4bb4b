"""Measures what conversions of a full-size adapter cost: processor seconds and memory of whole commands, in turn.

    python -m tests.benchmarks.bench_formats FOLDER [--trees before=PATH now=.] [--only NAMES] [--repeats 3]

FOLDER gets a UNet of SDXL with random float16 weights (5.1 GB), a DoRA of rank 16 on its 560 attention layers, and what
the commands write, up to 11 GB, which is removed again. Each command runs as a process of its own with one thread, from
each checkout in turn. `start` is Python with the library, `copy` a copy of the base. `formats.csv` gets medians.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from dora_mm.core.targets import match_modules
from dora_mm.targets.sdxl import UNET
from tests.benchmarks.results_table import write_times
from tests.shared.full_size import FULL_SIZE

RANK = 16
CONVERSIONS = ("diffusers", "kohya", "comfy", "diff", "merged")
COMMANDS = ("start", "copy", *CONVERSIONS, "extract")
COPY = "import sys; from pathlib import Path; from dora_mm.formats.files.tensor_file import copy_around; "
COPY += "copy_around(Path(sys.argv[1]), Path(sys.argv[2]), [])"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trees", nargs="+", default=["now=."])
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=COMMANDS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "xeon_2_cores")
    given = parser.parse_args()
    folder = given.folder.resolve()
    if not (folder / "adapter.safetensors").exists():
        make_files(folder)
        # Processes that are started count the memory of the one that starts them: this one begins anew, without weights
        os.execv(sys.executable, sys.orig_argv)
    rows = []
    for command in given.only:
        runs = {tree: [] for tree in given.trees}
        for _ in range(given.repeats):
            for tree in given.trees:
                runs[tree].append(measured(command, folder, Path(tree.partition("=")[2]).resolve()))
        rows += [row(command, tree.partition("=")[0], found) for tree, found in runs.items()]
        write_times(given.output, "formats", rows)


def make_files(folder: Path) -> None:
    """The base model as a folder of diffusers, and the adapter in diffusers' form."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**FULL_SIZE)
    generator = torch.Generator().manual_seed(0)
    weights, adapter = {}, {}
    for name, parameter in unet.state_dict().items():
        scale = 0.5 / max(1, parameter[0].numel()) ** 0.5
        weights[name] = torch.randn(parameter.shape, generator=generator).mul_(scale).half()
    for path in match_modules(unet, UNET.select()):
        W0 = weights[f"{path}.weight"].float()
        rows, columns = W0.shape
        gain = 1 + 0.05 * torch.randn(rows, generator=generator)
        adapter[f"unet.{path}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) / columns**0.5
        adapter[f"unet.{path}.lora_B.weight"] = 0.02 * torch.randn(rows, RANK, generator=generator)
        adapter[f"unet.{path}.lora_magnitude_vector"] = W0.norm(dim=1) * gain
    (folder / "base" / "unet").mkdir(parents=True)
    index = {"_class_name": "StableDiffusionXLPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (folder / "base" / "model_index.json").write_text(json.dumps(index))
    (folder / "base" / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    save_file(weights, folder / "base" / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    save_file(adapter, folder / "adapter.safetensors", {"format": "pt"})


def measured(command: str, folder: Path, tree: Path) -> dict[str, float]:
    """User and system seconds and the peak of memory in GB of a command that runs in a checkout."""
    base, out = folder / "base", folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    if command == "extract" and not (folder / "merged").exists():
        run(convert("merged", folder, folder / "merged"), tree)
    arguments = {
        "start": ["-c", "import torch, dora_mm.formats.commands.convert"],
        "copy": ["-c", COPY, str(base / "unet" / "diffusion_pytorch_model.safetensors"), str(out / "copy")],
        "extract": [
            "-m",
            "dora_mm",
            "extract",
            str(folder / "merged"),
            str(base),
            str(out / "new"),
            "--rank",
            str(RANK),
        ],
    }.get(command) or convert(command, folder, out / "new")
    found = run(arguments, tree)
    shutil.rmtree(out)
    print(command, tree.name, found, f"load {os.getloadavg()[0]:.1f}", flush=True)
    return found


def convert(to: str, folder: Path, out: Path) -> list[str]:
    """The arguments of a conversion."""
    source, base = str(folder / "adapter.safetensors"), str(folder / "base")
    return ["-m", "dora_mm", "convert", source, str(out), "--to", to, "--base", base]


def run(arguments: list[str], tree: Path) -> dict[str, float]:
    """What a Python process in a checkout uses."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONDONTWRITEBYTECODE"] = ""  # as installed: what Python compiles is kept
    process = subprocess.Popen([sys.executable, *arguments], cwd=tree, env=environment, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{arguments} failed")
    return {"user": used.ru_utime, "system": used.ru_stime, "gigabytes": used.ru_maxrss * 1024 / 1e9}


def row(command: str, tree: str, runs: list[dict[str, float]]) -> dict[str, object]:
    """A row of medians."""
    seconds = [run["user"] + run["system"] for run in runs]
    figures = {
        "seconds": statistics.median(seconds),
        "least": min(seconds),
        "largest": max(seconds),
        "of_it_system": statistics.median(run["system"] for run in runs),
        "gigabytes": max(run["gigabytes"] for run in runs),
    }
    rounded = {name: round(value, 2) for name, value in figures.items()}
    return {"command": command, "tree": tree, **rounded, "runs": len(runs)}


if __name__ == "__main__":
    main()
