"""The files that a run reads, and where missing ones can be obtained."""

from pathlib import Path

from dora_mm.config.models import VisionConfig
from dora_mm.config.paths import find_path
from dora_mm.config.vl_data import VLDataConfig
from dora_mm.data.vl.readers import FILES, paths_under


def data_needed(data: VLDataConfig, vision: VisionConfig, model: str) -> str:
    """A text table of every file and folder that the config names: whether it exists, and where it is published.

    Args:
        data: The `data` section of a config.
        vision: The `vision` section of a config.
        model: The `model.path` of a config.
    """
    rows = [
        (
            f"{task.task} {split} {key}",
            path,
            "found" if find_path(path) else _missing(source.reader.published),
        )
        for task in data.all_tasks
        for split, source in task.sources.items()
        for key in (*FILES, "images")
        for path in paths_under(source, key)
    ]
    rows += [
        (
            "features",
            path,
            "found" if find_path(path) else "missing, make it with: dora-mm features, or use .h5 or .npz files",
        )
        for path in vision.features
    ]
    rows.append(("model", model, "found" if find_path(model) else "from the hub"))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(["files", *(f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)])


def _missing(published: str) -> str:
    return f"missing, get it from: {published}" if published else "missing: a file or folder of your own"


def found_features(vision: VisionConfig) -> list[Path]:
    """The paths of `vision.features` that exist."""
    return [path for name in vision.features if (path := find_path(name)) is not None]
