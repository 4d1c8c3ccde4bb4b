"""dora-mm check: what this machine has, what is missing, and which recipes fit."""

import platform
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from dora_mm import __version__
from dora_mm.config.loader import read_document
from dora_mm.config.models import starts
from dora_mm.config.paths import resolve_path
from dora_mm.config.redacted import redacted
from dora_mm.utils import yaml12
from dora_mm.utils.circumstances import PACKAGES, VARIABLES, circumstances
from dora_mm.utils.requirements import installed, unmet_requirements
from dora_mm.utils.shell import fenced

EXTRAS = ("recipes", "eval", "optim", "track", "vl", "quant")
OPTIONAL = ("quant",)  # bases in 8 and 4 bits
SHOWN = ("diffusers", "transformers", "accelerate", "peft", "triton")
CUDA_BUILDS = "https://pytorch.org/get-started/locally"


def main(*, report: bool = False, config: str | None = None) -> None:
    """Prints the machine, the GPUs and the packages.

    Args:
        report: Prints them for a bug report instead, in Markdown, without paths and names.
        config: A config that the report shows; it need not be a valid one.

    Raises:
        ValueError: A config is given without a report, or cannot be read.
    """
    if config is not None and not report:
        raise ValueError("--config belongs to a report: dora-mm check --report --config CONFIG")
    if report:
        values = None if config is None else read_document(resolve_path(config, "--config")).value
        print("\n".join(report_lines(values)))
    else:
        print_machine()


def report_lines(config: object) -> Iterator[str]:
    """The lines of a bug report.

    Args:
        config: The values of a config; None: there is none.
    """
    import psutil
    import torch

    from dora_mm.preview.machine import gpus

    record = circumstances()
    yield f"### dora_mm {__version__}\n"
    yield f"- Python {record['python']}, {record['machine']}"
    yield f"- {record['processor']}; {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GB"
    for gpu in gpus():
        yield f"- GPU: {gpu.name}, {gpu.memory:.1f} GB, {gpu.precision}"
    build = torch.version.cuda or torch.version.hip or "none"
    yield f"- torch {torch.__version__}, built for CUDA or ROCm {build}, GPUs that it finds: {len(gpus())}"
    yield "- " + ", ".join(f"{name} {record[name]}" for name in PACKAGES[1:] if name != "torch" and record[name])
    for extra in EXTRAS:
        if problems := [f"{needed} ({problem})" for needed, problem in unmet_requirements(extra)]:
            yield f"- not there for {extra}: {', '.join(problems)}"
    if given := [name for name in VARIABLES if record[name] is not None]:
        yield f"- set: {', '.join(given)}"
    if config is not None:
        yield f"\n{fenced(yaml12.write(redacted(config)).rstrip(), 'yaml')}"


def print_machine() -> None:
    """Prints the machine, the GPUs and the packages, and the recipes that fit."""
    print(f"python    {platform.python_version()}, {platform.system()} {platform.machine()}", flush=True)
    import psutil
    import torch

    from dora_mm.preview.machine import gpus, largest_gpu

    memory, disk = psutil.virtual_memory().total / 2**30, shutil.disk_usage(Path.cwd()).free / 2**30
    print(f"machine   {psutil.cpu_count()} cores, {memory:.0f} GB of memory, {disk:.0f} GB free on this disk")
    for gpu in gpus():
        print(f"gpu       {gpu.name}, {gpu.memory:.1f} GB, {gpu.precision}")
    if not gpus():
        print(f"gpu       {without_gpu(torch.__version__)}")
    print(f"torch     {torch.__version__}")
    print(f"packages  {', '.join(f'{name} {installed(name)}' for name in SHOWN)}")
    for extra in EXTRAS:
        if problems := [f"{needed} ({problem})" for needed, problem in unmet_requirements(extra)]:
            what = "optional" if extra in OPTIONAL else "missing"
            print(f"{what:<9} {', '.join(problems)}: pip install 'dora_mm[{extra}]'")
    gpu = largest_gpu()
    width = max(map(len, starts()))
    for family, recipes in starts().items():
        print(f"recipe    {family:<{width}}  {recipe_line(recipes, gpu.memory if gpu else 0)}")


def without_gpu(torch_version: str) -> str:
    """The likely reason why there is no usable GPU."""
    if shutil.which("nvidia-smi") and "+cpu" in torch_version:
        return f"one that torch {torch_version} cannot use: install a build for it, {CUDA_BUILDS}"
    return "none: small models and images of a few steps only; for full size see docs/install.md"


def recipe_line(recipes: Mapping[int, str], memory: float) -> str:
    """The recipe that fits a GPU, or what it takes."""
    from dora_mm.preview.machine import SPARE

    sizes = [size for size in recipes if size and size <= memory + SPARE]
    if sizes:
        return f"{recipes[max(sizes)]} ({max(sizes)} GB)"
    small = f"; on a CPU {recipes[0]}" if 0 in recipes else ""
    return f"needs a GPU of some {min(size for size in recipes if size)} GB (an estimate){small}"
