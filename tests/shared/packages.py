"""Packages of others, as pip would have installed them."""

from collections.abc import Mapping
from pathlib import Path


def outside_package(folder: Path, files: Mapping[str, str], entry_points: Mapping[str, str]) -> Path:
    """Writes a package that adds to registries.

    Args:
        folder: What is to be on `sys.path`, or in PYTHONPATH.
        files: The text of each module, by its path in the folder.
        entry_points: The places `module:object` of what it adds, by `<kind>.<name>`.

    Returns:
        The folder.
    """
    lines = ["[dora_mm]", *(f"{name} = {place}" for name, place in entry_points.items())]
    metadata = {
        "entry_points.txt": "\n".join(lines) + "\n",
        "METADATA": "Metadata-Version: 2.1\nName: of-others\nVersion: 1\n",
    }
    for name, text in {**files, **{f"of_others-1.dist-info/{name}": text for name, text in metadata.items()}}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder
