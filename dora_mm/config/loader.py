"""Reads a config file and its overrides into a schema, and reports all of its problems at once."""

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dora_mm.config.overridden import fit_warmup, value_at, warn_of_scaling
from dora_mm.config.paths import resolve_path
from dora_mm.config.pipelines import SCHEMAS
from dora_mm.config.report import Problem, describe, dotted_key, sections_at
from dora_mm.config.schema import PipelineConfig
from dora_mm.registries.renamed import migrated
from dora_mm.utils import yaml12
from dora_mm.utils.messages import first_line, nearest
from dora_mm.utils.shell import quoted
from dora_mm.utils.yaml12 import MISSING, KeyPath

OPTION = "--set"


class ConfigError(ValueError):
    """All problems of one config, one per line.

    Attributes:
        problems: The problems, in the order of the message.
    """

    def __init__(self, path: Path, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        lines = [str(problem) for problem in self.problems]
        file = "" if all(problem.where.startswith(OPTION) for problem in self.problems) else f"{path}: "
        if len(lines) == 1:
            super().__init__(file + lines[0])
        else:
            super().__init__("\n  ".join([f"{file}{len(lines)} problems", *lines]))


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
    from dora_mm.config.models import validated  # here, since not every command reads a config

    file = resolve_path(path)
    document = read_document(file)
    is_of_run = file.name == "config.yaml" and (file.parent / "inputs.json").is_file()  # its keys may have former names
    values: dict[str, Any] = migrated(document.value) if is_of_run else document.value
    origins: dict[KeyPath, str] = {key: f"line {line}" for key, line in document.lines.items()}
    problems = [Problem(origins[key], _dotted(key), "is given twice") for key in document.duplicates]
    chosen: list[KeyPath] = []
    before = copy.deepcopy(values)
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
        check_not_foreign(file)
        raise ConfigError(file, problems)
    _remove_replaced(values, schema, chosen)
    fit_warmup(values, before, chosen)
    try:
        config = validated(schema, values)
    except ValidationError as error:
        problems += describe(error, schema, origins)
    if problems:
        raise ConfigError(file, problems)
    warn_of_scaling(values, before, chosen)
    return config


def run_name(file: str | Path) -> str:
    """The name of the runs of a config or prompts file: that of the file, as far as a folder can have it."""
    return re.sub(r"[^\w.+-]+", "-", Path(file).stem).lstrip("-.+") or "run"


def dump_config(config: PipelineConfig) -> str:
    """The resolved config as YAML, including defaults; `load_config` reads it back to an equal config."""
    return yaml12.write(_without_tuples(config.model_dump()))


def differing_keys(one: PipelineConfig, other: PipelineConfig) -> list[str]:
    """The dotted keys (or whole sections, where one config has none) in which two configs differ."""
    if type(one) is not type(other):
        return ["pipeline"]
    return _differing(one.model_dump(), other.model_dump(), "")


def saved_values(run: Path) -> dict[str, Any]:
    """The values of the config that a run directory has, which names a recipe.

    Raises:
        ValueError: It cannot be read, or names none.
    """
    saved = run / "config.yaml"
    try:
        values = yaml12.read(saved.read_text(encoding="utf-8")).value
        if isinstance(values, dict) and values.get("pipeline") in list(SCHEMAS):
            return migrated(values)
        problem = "it names no pipeline"
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problem = first_line(error)
    raise ValueError(f"{saved} is not a config that a run has saved ({problem})")


def about_run(folder: Path) -> str:
    """A sentence about the use of a run directory that was given instead of a config or a job."""
    saved = folder / "config.yaml"
    try:
        values = saved_values(folder)
    except ValueError:
        return f"{folder} is a run directory, and its config.yaml cannot be read"
    command = SCHEMAS[values["pipeline"]].command
    if values["pipeline"] == "train_diffusion":
        use = f"dora-mm sample --set adapter.path={quoted(folder)} 'prompts=[...]' generates with its adapter, and "
        return f"{folder} is the run of a training: {use}dora-mm train --resume {quoted(folder)} goes on with it"
    if command == "train":
        return f"{folder} is the run of a training: dora-mm train --resume {quoted(folder)} goes on with it"
    if command in ("sample", "grid"):
        return f"{folder} is a run of dora-mm {command}: dora-mm {command} --resume {quoted(folder)} goes on with it"
    return f"{folder} is a run of dora-mm {command}, and its config is {saved}"


def read_document(file: Path) -> yaml12.Document:
    """Reads a config file, without a check of its keys and values.

    Raises:
        ConfigError: It is not valid YAML.
        ValueError: It is no text, or has no keys.
    """
    if (file / "config.yaml").is_file():
        raise ValueError(about_run(file))
    if not file.is_file():
        raise ValueError(f"{file} is a folder: name a config file in it")
    if file.suffix.lower() in (".toml", ".json", ".sh", ".bat"):
        check_not_foreign(file)
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


def check_not_foreign(file: Path) -> None:
    """Checks that a file is not a config of another trainer.

    Raises:
        ValueError: It is one; the message names the command that imports it.
    """
    from dora_mm.config.importing.foreign import TITLES, read_foreign  # of no use to a config of ours

    try:
        trainer = read_foreign(file).trainer
    except ValueError:
        return
    command = f"dora-mm import {quoted(file)}"
    raise ValueError(f"{file} is a config of {TITLES[trainer]}: {command} writes one of ours from it")


def _override(values: dict[str, Any], origins: dict[KeyPath, str], override: str) -> KeyPath | Problem:
    """Applies `key.sub=value` to `values`, records its origin in `origins`, and returns the path of the key."""
    origin = f"{OPTION} {override:.300}"
    dotted, equals, text = override.partition("=")
    if not equals or not all(dotted.split(".")):
        return Problem(origin, "", "must have the form key.sub=value")
    try:
        value = yaml12.read(text).value
    except yaml.YAMLError:
        return Problem(origin, dotted, f"{text[:300]!r} is not a YAML value: quote it")
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
        node = value_at(values, parents)
        for pair in [pair for section in sections_at(schema, parents) for pair in section.exclusive]:
            if isinstance(node, dict) and key in pair and node.get(key) is not None:
                other = next(name for name in pair if name != key)
                if not any((*parents, other)[: len(path)] == path for path in chosen):
                    node.pop(other, None)


def _step(node: Any, part: str) -> str | int | None:
    if isinstance(node, dict):
        return part
    if isinstance(node, list) and part in map(str, range(len(node))):
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


def _without_tuples(value: Any) -> Any:
    """Converts tuples to lists, which YAML writes without tags."""
    if isinstance(value, dict):
        return {key: _without_tuples(item) for key, item in value.items()}
    return [_without_tuples(item) for item in value] if isinstance(value, list | tuple) else value
