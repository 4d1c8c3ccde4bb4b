"""Checks of a config before its command runs: the paths that it names, and what a resumed run may change of it.

They need no torch: a mistake is found before the packages are imported that would only then miss a file.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from dora_mm.config.loader import differing_keys, resolve_model, resolve_path
from dora_mm.config.schema import PathKind, PipelineConfig, Section


def check_paths(config: PipelineConfig, *, new_run: bool) -> None:
    """Checks that the files and folders which a config reads exist, and that its output folder can be made.

    Args:
        config: The config; the types of its keys say which of them are paths.
        new_run: The output folder is made by this command: one that exists is then an error where the config says so.

    Raises:
        ValueError: A path cannot be used; the message names its key.
    """
    for key, kind, path in paths_in(config):
        if kind is PathKind.INPUT:
            resolve_path(path, key)
        elif kind is PathKind.MODEL:
            resolve_model(path, key)
        elif new_run:
            check_folder(path, key, must_be_new=kind is PathKind.NEW_FOLDER)
    if new_run and getattr(config, "output", "") is None:
        check_folder(f"runs/{config.name}", "the run directory", must_be_new=False)


def check_folder(path: str, key: str, *, must_be_new: bool) -> None:
    """Checks that a folder can be made.

    Args:
        path: The folder.
        key: The config key that holds it, for the error message.
        must_be_new: One that exists is an error.

    Raises:
        ValueError: It exists although it must not, a part of its path is a file, too long or not writable.
    """
    try:
        folder = Path(path).expanduser()
        exists = folder.exists()
        parent = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    except OSError as error:
        raise ValueError(f"{key} {path} cannot be made: {error.strerror}") from None
    except RuntimeError:
        raise ValueError(f"{key} {path} cannot be made: there is no user {Path(path).parts[0][1:]}") from None
    if exists and must_be_new:
        raise ValueError(
            f"{key} {path} exists already: choose another folder, or leave {key} out to get a numbered one."
        )
    if not parent.is_dir():
        raise ValueError(f"{key} {path} is inside a file, not a folder: choose another folder.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{key} {path} cannot be made: {parent} is not writable for you")


def paths_in(section: Section, prefix: str = "") -> Iterator[tuple[str, PathKind, str]]:
    """The keys of a section that hold a path, with its kind and the path."""
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), f"{prefix}{name}"
        kind = next((mark for mark in (*field.metadata, *_marks(field.annotation)) if isinstance(mark, PathKind)), None)
        for position, item in enumerate(value if isinstance(value, tuple) else (value,)):
            place = f"{key}[{position}]" if isinstance(value, tuple) else key
            if isinstance(item, Section):
                yield from paths_in(item, f"{place}.")
            elif kind is not None and item is not None:
                yield place, kind, item


def _marks(annotation: Any) -> Iterator[Any]:
    """The metadata inside an annotation such as `InputPath | None` or `Items[InputPath]`."""
    yield from getattr(annotation, "__metadata__", ())
    for argument in get_args(annotation):
        yield from _marks(argument)


# --- resumed runs ----------------------------------------------------------------------------------------------------

REASONS = {  # why the other keys and sections may not change
    "pipeline": "the run belongs to one recipe",
    "name": "it names the folder of a new run, and this run stays where it is",
    "output": "it names the folder of a new run, and this run stays where it is",
    "seed": "order and noise of the finished steps came from the old one",
    "backend": "the finished steps were computed by the old one, and the other one rounds differently",
    "model": "the checkpoints belong to the old model",
    "vision": "the checkpoints belong to the old vision tower",
    "adapter": "the checkpoints hold an adapter with the old settings",
    "data": "the finished steps were computed on the old data",
    "loss": "the finished steps minimized the old loss",
    "optimizer": "the finished steps were computed with the old value",
    "schedule": "the finished steps were computed with the old learning rates",
    "train": "the finished steps were computed with the old value",
    "evaluate": "the scores so far, and with them the best adapter, were computed with the old value",
}


def changed_values(before: PipelineConfig, after: PipelineConfig) -> dict[str, tuple[Any, Any]]:
    """The old and the new value of each dotted key (or section) in which two configs differ."""
    return {key: (_value(before, key), _value(after, key)) for key in differing_keys(before, after)}


def check_changes(run: Path, before: PipelineConfig, after: PipelineConfig) -> None:
    """Checks that a run can go on with another config: its finished steps would have been the same.

    Args:
        run: The run directory, for the message.
        before: The config that the run was started with.
        after: The config that it is resumed with.

    Raises:
        ValueError: A key differs that may not; the message has a sentence for each.
    """
    changeable = before.changeable
    if changeable is None:
        return
    changed = changed_values(before, after).items()
    refused = {key: v for key, v in changed if not any(f"{key}.".startswith(f"{name}.") for name in changeable)}
    if not refused:
        return
    sentences = [
        f"{key} cannot change from {old!r} to {new!r}: {REASONS[key.partition('.')[0]]}"
        for key, (old, new) in refused.items()
    ]
    allowed = f"--resume may change {', '.join(changeable)}" if changeable else "--resume changes no key"
    advice = f"{allowed}; for anything else start a new run"
    if len(sentences) == 1:
        raise ValueError(f"--resume {run}: {sentences[0]} ({advice})")
    raise ValueError("\n  ".join([f"--resume {run}: {len(sentences)} keys cannot change ({advice})", *sentences]))


def nearest_run(path: Path) -> str:
    """The text ", did you mean ...?" with the run directory around a path or the last one in it; empty if none is."""
    inside = sorted(file.parent for file in path.glob("*/config.yaml")) if path.is_dir() else []
    around = [folder for folder in path.parents if (folder / "config.yaml").is_file()]
    found = [*around[:1], *inside[-1:]]
    return f", did you mean {str(found[0])!r}?" if found else ""


def _value(config: PipelineConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part, None)
    return value
