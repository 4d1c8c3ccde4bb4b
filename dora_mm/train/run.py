"""Run directories: runs/<name>/<NNN>, numbered, never overwritten."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dora_mm.io.atomic import write_text

REPORTED_PACKAGES = ("dora_mm", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy")


class RunDirectory:
    """One run's folder. Everything that the run writes lies in it."""

    def __init__(self, path: Path):
        self.path = path

    checkpoints = property(lambda self: self.path / "checkpoints")
    adapter = property(lambda self: self.path / "adapter")
    samples = property(lambda self: self.path / "samples")
    sheet = property(lambda self: self.path / "sheet.png")

    @classmethod
    def create(
        cls, name: str, config_text: str, output: str | None = None, root: Path = Path("runs")
    ) -> "RunDirectory":
        """A new folder with the resolved config and the versions in it: `output`, or the next number of `name`.

        Raises:
            ValueError: `output` exists, or lies below a file.
        """
        path = _claim(Path(output).expanduser()) if output is not None else _claim_number(root / name)
        write_text(path / "versions.json", json.dumps(versions(), indent=2) + "\n")
        write_text(path / "config.yaml", config_text)  # last: it is what makes the folder a run
        return cls(path)

    @classmethod
    def resume(cls, path: Path) -> "RunDirectory":
        """An existing run's folder.

        Raises:
            ValueError: there is no run in it.
        """
        if not (path / "config.yaml").is_file():
            raise ValueError(f"{path} is not a run directory: it holds no config.yaml.")
        return cls(path)

    def stage(self, name: str) -> "RunDirectory":
        """A folder inside it for one stage of a run that has several, with checkpoints and metrics of its own."""
        (self.path / name).mkdir(exist_ok=True)
        return RunDirectory(self.path / name)


def _claim(path: Path) -> Path:
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise ValueError(
            f"output {path} exists: name another folder, or leave output out for a numbered one."
        ) from None
    except NotADirectoryError:
        raise ValueError(f"output {path} lies below a file: name another folder.") from None
    return path


def _claim_number(parent: Path) -> Path:
    """Creating the folder is the claim: two runs that start together get two numbers."""
    parent.mkdir(parents=True, exist_ok=True)
    number = max((int(path.name) for path in parent.iterdir() if path.name.isdecimal()), default=0) + 1
    while True:
        path = parent / f"{number:03d}"
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1


def versions() -> dict[str, Any]:
    """What ran: the packages that decide the numbers, Python and the machine."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    for package in REPORTED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
