"""Checks the paths that a config names, before the packages are imported that would only then miss them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from dora_mm.config.loader import resolve_adapter, resolve_model, resolve_path
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
        elif kind is PathKind.ADAPTER:
            resolve_adapter(path, key)
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
