"""Reads a config file and its overrides into a schema, and reports all of its problems at once."""

import re
from collections.abc import Iterable, Mapping, Sequence
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dora_mm.config.pipelines import SCHEMAS
from dora_mm.config.report import Problem, describe, dotted_key, nearest, sections_at
from dora_mm.config.schema import PipelineConfig
from dora_mm.utils import yaml12
from dora_mm.utils.yaml12 import MISSING, KeyPath

PACKAGE = Path(__file__).resolve().parents[1]
_OF_ADAPTERS = {"adapter", "adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"}
_ADAPTER_KEY = re.compile(r'"[^"\\]*[._](lora_(A|B|up|down|mag)|hada_w1|lokr_w|dora_scale)[^"\\]*": ?\{ ?"dtype"')
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # owner/name
_LONGEST_START = 2**20  # bytes of a header: trainers write statistics of their captions before the first tensor
INSTALLED = "package:"  # prefix of a path inside an installed Python package


class ConfigError(ValueError):
    """All problems of one config, one per line.

    Attributes:
        problems: The problems, in the order of the message.
    """

    def __init__(self, path: Path, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        lines = [str(problem) for problem in self.problems]
        if len(lines) == 1:
            super().__init__(f"{path}: {lines[0]}")
        else:
            super().__init__("\n  ".join([f"{path}: {len(lines)} problems", *lines]))


def load_config(
    path: str | Path, overrides: Sequence[str] = (), schemas: Mapping[str, type[PipelineConfig]] = SCHEMAS
) -> PipelineConfig:
    """Loads a config with its overrides.

    Args:
        path: The config file, relative to the current directory or to the packaged configs.
        overrides: Texts of the form `key.sub=value`, with the value in YAML; they replace values of the file.
        schemas: The schemas to choose from, by the value of the config's `pipeline` key.

    Returns:
        An instance of the schema.

    Raises:
        ConfigError: The file or an override has unknown keys, or values of the wrong type or range; lists all of them.
        ValueError: The file does not exist or is not a config.
    """
    file = resolve_path(path)
    document = _read(file)
    values: dict[str, Any] = document.value
    origins: dict[KeyPath, str] = {key: f"line {line}" for key, line in document.lines.items()}
    problems = [Problem(origins[key], _dotted(key), "is given twice") for key in document.duplicates]
    chosen: list[KeyPath] = []
    for override in overrides:
        found = _override(values, origins, override)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            chosen.append(found)
    values.setdefault("name", run_name(file))

    name = values.get("pipeline")
    schema = schemas.get(name) if isinstance(name, str) else None
    if schema is None:
        problems.append(_unknown_pipeline(values, origins, schemas))
        raise ConfigError(file, problems)
    _remove_replaced(values, schema, chosen)
    try:
        config = schema.model_validate(values)
    except ValidationError as error:
        problems += describe(error, schema, origins)
    if problems:
        raise ConfigError(file, problems)
    return config


def run_name(file: str | Path) -> str:
    """The name of the runs of a config or job file: that of the file, as far as a folder can have it."""
    return re.sub(r"[^\w.+-]+", "-", Path(file).stem).lstrip("-.+") or "run"


def dump_config(config: PipelineConfig) -> str:
    """The resolved config as YAML, including defaults; `load_config` reads it back to an equal config."""
    return yaml12.write(_plain(config.model_dump()))


def differing_keys(one: PipelineConfig, other: PipelineConfig) -> list[str]:
    """The dotted keys (or whole sections, where one config has none) in which two configs differ."""
    if type(one) is not type(other):
        return ["pipeline"]
    return _differing(one.model_dump(), other.model_dump(), "")


def find_path(path: str | Path) -> Path | None:
    """Finds a path relative to the current directory, else to the packaged configs; None if it does not exist.

    `package:easy_vqa/data` is a folder in the installed Python package easy_vqa. A pattern with `*` exists if a file in
    the current directory fits it.
    """
    if str(path).startswith(INSTALLED):
        return _in_package(str(path).removeprefix(INSTALLED))
    try:
        wanted = Path(path).expanduser()
        if wanted.exists() or ("*" in str(path) and glob(str(wanted), recursive=True)):
            return wanted
        packaged = _packaged(wanted)
        return packaged if not wanted.is_absolute() and packaged.exists() else None
    except (OSError, RuntimeError):  # too long, or in a folder that may not be entered; or ~name of nobody
        return None


def resolve_path(path: str | Path, key: str | None = None) -> Path:
    """As `find_path`, but the path must exist.

    Args:
        path: The path to find.
        key: The config key that holds the path, for the error message.

    Raises:
        ValueError: The path does not exist.
    """
    found = find_path(path)
    if found is not None:
        return found
    prefix = f"{key}: " if key else ""
    if str(path).startswith(INSTALLED):
        raise ValueError(f"{prefix}{path} does not exist: the package is not installed, or has no such file")
    if Path(path).parts[:1] == ("samples",) and not Path("samples").is_dir():
        other = ", or name yours: --set model.path=MODEL (a folder, a .safetensors checkpoint or a hub name)"
        raise ValueError(
            f"{prefix}{path} does not exist: samples/ is only part of a checkout of dora_mm, so run this from one"
            + (other if key == "model.path" else "")
        )
    close = nearest(Path(path).name, _sibling_names(Path(path)))
    listed = "" if key else ", which dora-mm configs lists"
    raise ValueError(
        f"{prefix}{path} does not exist, neither in {Path.cwd()} nor in the packaged configs{listed}{close}"
    )


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


def packaged_configs() -> dict[str, Path]:
    """The packaged configs by the paths that commands take."""
    folder = _packaged(Path())
    return {f"configs/{file.relative_to(folder).as_posix()}": file for file in sorted(folder.glob("*/*.yaml"))}


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
        return bool(names & _OF_ADAPTERS) and not names & {"model_index.json", "config.json"}
    if path.suffix != ".safetensors" or not path.is_file():  # a pipe would never end
        return False
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start = file.read(min(length, _LONGEST_START)).decode(errors="replace")
    return _ADAPTER_KEY.search(start) is not None


def _in_package(path: str) -> Path | None:
    name, _, inside = path.partition("/")
    spec = find_spec(name) if name.isidentifier() else None
    folders = (spec.submodule_search_locations if spec else None) or []
    return next((Path(folder) / inside for folder in folders if (Path(folder) / inside).exists()), None)


def _packaged(path: Path) -> Path:
    """Where a relative path would be among the packaged configs, with or without `configs/` in front."""
    configs = PACKAGE / "configs"
    if not configs.is_dir():  # in a checkout they are next to the package, in the wheel inside it
        configs = PACKAGE.parent / "configs"
    return configs.joinpath(*(part for part in path.parts if part not in ("configs", "..")))


def _sibling_names(path: Path) -> list[str]:
    folders = [path.parent, _packaged(path).parent] if not path.is_absolute() else [path.parent]
    try:
        return [entry.name for folder in folders if folder.is_dir() for entry in folder.iterdir()]
    except OSError:
        return []


def _read(file: Path) -> yaml12.Document:
    if (file / "config.yaml").is_file():
        raise ValueError(f"{file} is a run directory: dora-mm train --resume {file} goes on with a training")
    if not file.is_file():
        raise ValueError(f"{file} is a folder: name a config file in it")
    try:
        document = yaml12.read(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not a config: it is not a text file in UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else ""
        raise ConfigError(
            file, [Problem(where, "", f"not valid YAML: {getattr(error, 'problem', None) or error}")]
        ) from None
    if not isinstance(document.value, dict):
        raise ValueError(f"{file} has no keys: a config starts with `pipeline: <name>`")
    return document


def _override(values: dict[str, Any], origins: dict[KeyPath, str], override: str) -> KeyPath | Problem:
    """Applies `key.sub=value` to `values`, records its origin in `origins`, and returns the path of the key."""
    origin = f"--set {override}"
    dotted, equals, text = override.partition("=")
    if not equals or not all(dotted.split(".")):
        return Problem(origin, "", "must have the form key.sub=value")
    try:
        value = yaml12.read(text).value
    except yaml.YAMLError:
        return Problem(origin, dotted, f"{text!r} is not a YAML value: quote it")
    *parents, last = dotted.split(".")
    node: Any = values
    path: KeyPath = ()
    for part in parents:
        step = _step(node, part)
        if step is None:
            return Problem(origin, dotted, f"{_dotted(path)} has no key {part!r}")
        if isinstance(node, dict) and node.get(step) is None:
            node[step] = {}
        node, path = node[step], (*path, step)
    step = _step(node, last)
    if step is None:
        return Problem(origin, dotted, f"{_dotted(path)} has no key {last!r}")
    node[step] = value
    for known in [known for known in origins if known[: len(path) + 1] == (*path, step)]:
        del origins[known]
    origins[(*path, step)] = origin
    return (*path, step)


def _remove_replaced(values: dict[str, Any], schema: type[PipelineConfig], chosen: Sequence[KeyPath]) -> None:
    """Removes the keys of the file that exclude the key of an override, which then is the only one given."""
    for *parents, key in chosen:
        node = _value_at(values, parents)
        for pair in [pair for section in sections_at(schema, parents) for pair in section.exclusive]:
            if isinstance(node, dict) and key in pair and node.get(key) is not None:
                other = next(name for name in pair if name != key)
                if not any((*parents, other)[: len(path)] == path for path in chosen):
                    node.pop(other, None)


def _value_at(values: Any, path: Iterable[str | int]) -> Any:
    """The value at a key path; None where a later override has replaced what it was in."""
    for part in path:
        if isinstance(values, dict):
            values = values.get(part)
        else:
            values = values[part] if isinstance(part, int) and isinstance(values, list) else None
    return values


def _step(node: Any, part: str) -> str | int | None:
    if isinstance(node, dict):
        return part
    if isinstance(node, list) and part.isdigit() and int(part) < len(node):
        return int(part)
    return None


def _unknown_pipeline(values: dict[str, Any], origins: dict[KeyPath, str], schemas: Mapping[str, Any]) -> Problem:
    name, known = values.get("pipeline"), ", ".join(schemas)
    if name is None:
        return Problem("", "pipeline", f"is missing; it must name a recipe: {known}")
    message = f"unknown recipe {name!r}{nearest(str(name), schemas)}; choose from {known}"
    return Problem(origins.get(("pipeline",), ""), "pipeline", message)


def _differing(one: dict[str, Any], other: dict[str, Any], prefix: str) -> list[str]:
    keys = []
    for key in {**one, **other}:  # a section that is of another class there has other keys
        value, theirs = one.get(key, MISSING), other.get(key, MISSING)
        if isinstance(value, dict) and isinstance(theirs, dict):
            keys += _differing(value, theirs, f"{prefix}{key}.")
        elif value != theirs:
            keys.append(prefix + key)
    return keys


def _dotted(path: KeyPath) -> str:
    return dotted_key(path) or "the config"


def _plain(value: Any) -> Any:
    """Converts tuples to lists, which YAML writes without tags."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
