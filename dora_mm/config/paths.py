"""Finds the files, folders, models and adapters that configs and commands name, and checks those of a whole config."""

import os
import re
from collections.abc import Iterator
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from dora_mm.config.latest import LATEST
from dora_mm.config.schema import PathKind, PipelineConfig, Section
from dora_mm.utils.home import expanded
from dora_mm.utils.json_text import check_no_device
from dora_mm.utils.messages import nearest

PACKAGE = Path(__file__).resolve().parents[1]
_OF_ADAPTERS = {"adapter", "adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"}
_ADAPTER_KEY = re.compile(r'"[^"\\]*[._](lora_(A|B|up|down|mag)|hada_w1|lokr_w|dora_scale)[^"\\]*": ?\{ ?"dtype"')
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # owner/name
_LONGEST_START = 2**20  # bytes of a header: trainers write statistics of their captions before the first tensor
INDEX, CONFIG = "model_index.json", "config.json"  # of a pipeline of diffusers, of a network
INSTALLED = "package:"  # prefix of a path inside an installed Python package


def find_path(path: str | Path) -> Path | None:
    """Finds a path relative to the current directory, else to the packaged configs; None if it does not exist.

    `package:easy_vqa/data` is a folder in the installed Python package easy_vqa. A pattern with `*` exists if a file in
    the current directory fits it.
    """
    if str(path).startswith(INSTALLED):
        return _in_package(str(path).removeprefix(INSTALLED))
    try:
        wanted = expanded(path)
        if wanted.exists() or ("*" in str(path) and glob(str(wanted), recursive=True)):
            return wanted
        packaged = _packaged(wanted)
        return packaged if not wanted.is_absolute() and packaged.exists() else None
    except (OSError, ValueError):  # too long, or in a folder that may not be entered; or ~name of nobody
        return None


def resolve_path(path: str | Path, key: str | None = None) -> Path:
    """As `find_path`, but the path must exist.

    Args:
        path: The path to find.
        key: The config key that holds the path, for the error message.

    Raises:
        ValueError: The path does not exist, or is a pipe or a device.
    """
    found = find_path(path)
    if found is not None:
        check_no_device(found, key or "")
        return found
    prefix = f"{key}: " if key else ""
    expanded(path, prefix)  # there may be no home folder
    if str(path).startswith(INSTALLED):
        raise ValueError(f"{prefix}{path} does not exist: the package is not installed, or has no such file")
    if Path(path).parts[:1] == ("samples",) and not Path("samples").is_dir():
        other = ", or name yours: --set model.path=MODEL (a folder, a .safetensors checkpoint or a hub name)"
        raise ValueError(
            f"{prefix}{path} does not exist: samples/ is only part of a checkout of dora_mm, so run this from one"
            + (other if key == "model.path" else "")
        )
    if "://" in str(path):
        raise ValueError(f"{prefix}{path} is a URL: download the file, and name that")
    where = "" if Path(path).is_absolute() else f" in {Path.cwd()}"
    if where and Path(path).suffix == ".yaml":
        listed = "" if key else ", which dora-mm configs lists"
        where = f", neither{where} nor in the packaged configs{listed}"
    raise ValueError(f"{prefix}{path} does not exist{where}{_near(Path(path))}")


def check_exists(path: Path, key: str) -> None:
    """Checks that what a command reads exists in the current directory.

    Raises:
        ValueError: It does not.
    """
    if not path.exists():
        raise ValueError(f"{key}: {path} does not exist{_near(path)}")
    check_no_device(path, key)


def resolve_model(path: str, key: str = "model.path") -> str:
    """Resolves a model to the path of a local folder or file, or returns a hub name (`owner/name`) unchanged.

    Args:
        path: The path or hub name.
        key: The config key that holds it, for the error message.

    Raises:
        ValueError: It is not a hub name, and does not exist as a path; or it is an adapter.
    """
    found = find_path(path)
    if found is not None:
        if is_adapter(found):
            raise ValueError(f"{key}: {path} is an adapter (LoRA or DoRA), not a model: name the model that it is for")
        return str(found)
    hub_name = HUB_NAME.fullmatch(path) and not path.endswith((".safetensors", ".ckpt"))
    return path if hub_name and not path.startswith("samples/") else str(resolve_path(path, key))


def resolve_adapter(path: str | Path, key: str) -> Path:
    """As `resolve_path`, for an adapter file, its folder or a run directory.

    Raises:
        ValueError: The path does not exist, or is a folder that holds runs.
    """
    found = resolve_path(path, key)
    runs = sorted(file.parent for file in found.glob("*/config.yaml")) if found.is_dir() else []
    if runs and not (found / "config.yaml").is_file() and not is_adapter(found):
        raise ValueError(f"{key}: {path} is a folder of runs, not one of them, did you mean {str(runs[-1])!r}?")
    return found


def is_adapter(path: Path) -> bool:
    """Whether a file or folder is an adapter, by its files' names and the start of a file's header."""
    if path.is_dir():
        names = {entry.name for entry in path.iterdir()}
        return bool(names & _OF_ADAPTERS) and not names & {INDEX, CONFIG}
    if path.suffix != ".safetensors" or not path.is_file():  # a pipe would never end
        return False
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start = file.read(min(length, _LONGEST_START)).decode(errors="replace")
    return _ADAPTER_KEY.search(start) is not None


def packaged_configs() -> dict[str, Path]:
    """The packaged configs by the paths that commands take."""
    folder = _packaged(Path())
    return {f"configs/{file.relative_to(folder).as_posix()}": file for file in sorted(folder.glob("*/*.yaml"))}


def check_paths(config: PipelineConfig, *, new_run: bool) -> None:
    """Checks that the files and folders which a config reads exist, and that its output folder can be made.

    Args:
        config: The config; the types of its keys say which of them are paths.
        new_run: The output folder is made by this command: one that exists is then an error where the config says so.

    Raises:
        ValueError: A path cannot be used; the message names its key.
    """
    for problem in path_problems(config, new_run=new_run):
        raise ValueError(problem)


def path_problems(config: PipelineConfig, *, new_run: bool) -> Iterator[str]:
    """Why paths of a config cannot be used, a sentence each; see `check_paths`."""
    paths = list(paths_in(config))
    if getattr(config, "output", "") is None:
        paths.append(("the run directory", PathKind.FOLDER, f"runs/{config.name}"))
    for key, kind, path in paths:
        try:
            _check_path(key, kind, path, new_run=new_run)
        except ValueError as error:
            yield str(error)


def _check_path(key: str, kind: PathKind, path: str, *, new_run: bool) -> None:
    if kind is PathKind.INPUT:
        resolve_path(path, key)
    elif kind is PathKind.ADAPTER:
        resolve_adapter(path, key)
    elif kind is PathKind.MODEL:
        resolve_model(path, key)
    elif new_run:
        check_folder(path, key, must_be_new=kind is PathKind.NEW_FOLDER)


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
        folder = expanded(path, f"{key} ")
        exists = _exists(folder)
        parent = next(each for each in (folder, *folder.absolute().parents) if _exists(each))
    except OSError as error:
        raise ValueError(f"{key} {path} cannot be made: {error.strerror}") from None
    if folder.name == LATEST:
        raise ValueError(f"{key} {path}: {LATEST} means the last numbered run, and there is none: name another folder.")
    if exists and must_be_new:
        raise ValueError(
            f"{key} {path} exists already: choose another folder, or leave {key} out to get a numbered one."
        )
    if not parent.is_dir():
        raise ValueError(f"{key} {path} is inside a file, not a folder: choose another folder.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{key} {path} cannot be made: {parent} is not writable for you")


def _exists(path: Path) -> bool:
    """`path.exists()`, but a name that is too long is an error in each Python: 3.14 says that there is no such file."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def paths_in(section: Section, prefix: str = "") -> Iterator[tuple[str, PathKind, str]]:
    """The keys of a section that hold a path, with its kind and the path."""
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), f"{prefix}{name}"
        kind = path_kind(field)
        for path, item in _items(value, key):
            if isinstance(item, Section):
                yield from paths_in(item, f"{path}.")
            elif kind is not None and item is not None:
                yield path, kind, item


def path_kind(field: FieldInfo) -> PathKind | None:
    """The kind of path that a key of a section holds; None: it holds none."""
    marks = (*field.metadata, *_marks(field.annotation))
    return next((mark for mark in marks if isinstance(mark, PathKind)), None)


def _items(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """A value, or all in a tuple of values and tuples, each with its key."""
    if not isinstance(value, tuple):
        yield key, value
        return
    for position, item in enumerate(value):
        yield from _items(item, f"{key}[{position}]")


def _marks(annotation: Any) -> Iterator[Any]:
    """The metadata inside an annotation such as `InputPath | None` or `Items[InputPath]`."""
    yield from getattr(annotation, "__metadata__", ())
    for argument in get_args(annotation):
        yield from _marks(argument)


def _in_package(path: str) -> Path | None:
    name, _, inside = path.partition("/")
    spec = find_spec(name) if name.isidentifier() else None
    folders = (spec.submodule_search_locations if spec else None) or []
    return next((Path(folder) / inside for folder in folders if (Path(folder) / inside).exists()), None)


def _packaged(path: Path) -> Path:
    """The path of a packaged config for a relative path, with or without `configs/` in front."""
    configs = PACKAGE / "configs"
    if not configs.is_dir():  # in a checkout they are next to the package, in the wheel inside it
        configs = PACKAGE.parent / "configs"
    return configs.joinpath(*(part for part in path.parts if part not in ("configs", "..")))


def _near(path: Path) -> str:
    """A suggestion of an existing sibling with a name similar to a missing path; for a numbered run, the last run."""
    names = sorted(set(_sibling_names(path)))
    if not path.name.isdigit():
        return nearest(path.name, names)
    runs = [name for name in names if name.isdigit()]
    return f"; the last one in {path.parent} is {runs[-1]}" if runs else ""


def _sibling_names(path: Path) -> list[str]:
    folders = [path.parent, _packaged(path).parent] if not path.is_absolute() else [path.parent]
    try:
        return [entry.name for folder in folders if folder.is_dir() for entry in folder.iterdir()]
    except OSError:
        return []
