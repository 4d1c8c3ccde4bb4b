"""dora-mm check: what this machine has, what is missing, and which recipes fit."""

import platform
import shutil
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from dora_mm.config.models import starts

NEEDED = ""  # the extra of what every command needs
EXTRAS = (NEEDED, "eval", "optim", "track", "vl", "quant")
OPTIONAL = ("quant",)  # bases in 8 and 4 bits
SHOWN = ("diffusers", "transformers", "accelerate", "peft", "triton")
CUDA_BUILDS = "https://pytorch.org/get-started/locally"


def main() -> None:
    """Prints the machine, the GPUs and the packages.

    Raises:
        ValueError: A package is missing or too old without which no command runs.
    """
    print(f"python    {platform.python_version()}, {platform.system()} {platform.machine()}", flush=True)
    wrong = dict(unmet_requirements())
    if "torch" in wrong:
        raise ValueError(f"{wrong['torch'][1]}: see docs/install.md")

    import psutil
    import torch

    from dora_mm.preview.machine import cards, largest_card

    memory, disk = psutil.virtual_memory().total / 2**30, shutil.disk_usage(Path.cwd()).free / 2**30
    print(f"machine   {psutil.cpu_count()} cores, {memory:.0f} GB of memory, {disk:.0f} GB free on this disk")
    for card in cards():
        print(f"gpu       {card.name}, {card.memory:.1f} GB, {card.precision}")
    if not cards():
        print(f"gpu       {without_card(torch.__version__)}")
    print(f"torch     {torch.__version__}")
    print(f"packages  {', '.join(f'{name} {installed(name)}' for name in SHOWN)}")
    print_missing(wrong)
    card = largest_card()
    for family, recipes in starts().items():
        print(f"recipe    {family:<8} {recipe_line(recipes, card.memory if card else 0)}")
    if needed := [problem for extra, problem in wrong.values() if extra == NEEDED]:
        raise ValueError(f"{'; '.join(needed)}: pip install --upgrade dora_mm")


def print_missing(wrong: Mapping[str, tuple[str, str]]) -> None:
    """A line for each extra of which packages are missing."""
    for extra in EXTRAS[1:]:
        problems = [problem for found, problem in wrong.values() if found == extra]
        if problems:
            what = "optional" if extra in OPTIONAL else "missing"
            print(f"{what:<9} {', '.join(problems)}: pip install 'dora_mm[{extra}]'")


def without_card(torch_version: str) -> str:
    """Why there is no GPU, as far as it can be told."""
    if shutil.which("nvidia-smi") and "+cpu" in torch_version:
        return f"one that torch {torch_version} cannot use: install a build for it, {CUDA_BUILDS}"
    return "none: small models and pictures of a few steps only; for full size see docs/install.md"


def unmet_requirements() -> Iterator[tuple[str, tuple[str, str]]]:
    """The packages that are missing or too old, each with its first extra and the problem."""
    try:
        requirements = [Requirement(text) for text in metadata.requires("dora_mm") or ()]
    except metadata.PackageNotFoundError:
        return  # run from the source tree, without an installation
    seen = set()
    for extra in EXTRAS:
        for needed in requirements:
            applies = needed.marker is None or needed.marker.evaluate({"extra": extra})
            if needed.name in seen or not applies or needed.name == "dora_mm":
                continue
            seen.add(needed.name)
            found = installed(needed.name)
            if found is None:
                yield needed.name, (extra, f"{needed.name} is not installed")
            elif not needed.specifier.contains(found, prereleases=True):
                yield needed.name, (extra, f"{needed.name} {found} is not {needed.specifier}")


def installed(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def recipe_line(recipes: Mapping[int, str], memory: float) -> str:
    """The recipe that fits a card, or what it takes."""
    from dora_mm.preview.machine import SPARE

    sizes = [size for size in recipes if size and size <= memory + SPARE]
    if sizes:
        return f"{recipes[max(sizes)]} ({max(sizes)} GB)"
    small = f"; on a processor {recipes[0]}" if 0 in recipes else ""
    return f"needs a card of {min(size for size in recipes if size)} GB{small}"
