"""Reads config files and command lines of other trainers, and recognizes whose they are."""

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from shlex import split
from types import MappingProxyType
from typing import Any

import yaml

from dora_mm.config.importing import kohya_gui
from dora_mm.utils import yaml12
from dora_mm.utils.messages import first_line
from dora_mm.utils.shell import quoted

LARGEST = 2**22  # bytes of a config
SCRIPT = re.compile(r"(\w*train_network\.py|\bswift\s+(?:sft|rlhf|pt)\b|llamafactory-cli\s+train|axolotl\s+train)")
CONTINUED = re.compile(r"[\\^`]\s*\n")  # of lines, in sh, cmd and PowerShell
TITLES = {
    "kohya": "kohya's scripts",
    "ai-toolkit": "ai-toolkit",
    "onetrainer": "OneTrainer",
    "llama-factory": "LLaMA-Factory",
    "ms-swift": "ms-swift",
    "axolotl": "axolotl",
}


class Foreign:
    """The keys of another trainer's config, of which those that were taken are known.

    Attributes:
        trainer: A key of `TITLES`.
        folder: Relative paths of the config are relative to it, where they are not to the current directory.
        script: The script of a command line; empty if there is none.
        given: The names of all its keys, those of files that it names included.
        names: The names of keys in the file, by ours for them, where these differ.
        left: The keys that nobody has taken, with their values.
        dropped: The keys that have no effect on the training here, with their values.
    """

    def __init__(
        self,
        trainer: str,
        values: Mapping[str, Any],
        folder: Path,
        script: str = "",
        names: Mapping[str, str] = MappingProxyType({}),
    ):
        self.trainer, self.folder, self.script, self.names = trainer, folder, script, names
        self.given = set(values)
        self.left = dict(values)
        self.dropped: dict[str, Any] = {}

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key, which counts as read; the default where it is not given, null or empty."""
        value = self.left.pop(key, None)
        return default if value is None or value == "" else value

    def drop(self, *keys: str) -> None:
        """Takes keys that are not needed here; those that are given are reported so."""
        for key in keys:
            if (value := self.take(key)) not in (None, False, [], {}):
                self.dropped[key] = value

    def flag(self, key: str, default: bool = False) -> bool:
        """As `take`, of a key that is true or false; text of command lines counts, too."""
        value = self.take(key, default)
        return value.lower() in ("true", "1", "yes") if isinstance(value, str) else bool(value)

    def file(self, path: str) -> Path:
        """A path of the config: relative to the current directory, or to the config's folder."""
        given = Path(path).expanduser()
        return given if given.exists() or given.is_absolute() else self.folder / given


def read_foreign(path: Path) -> Foreign:
    """Reads a file of another trainer.

    Raises:
        ValueError: It cannot be read, is a config of dora_mm, or of no known trainer.
    """
    text = _text(path)
    suffix = path.suffix.lower()
    if suffix == ".toml":
        return Foreign("kohya", _kohya_values(_parsed(path, text, tomllib.loads)), path.parent)
    if suffix == ".json":
        return _recognized(path, _parsed(path, text, json.loads))
    if suffix in (".yaml", ".yml"):
        return _recognized(path, _parsed(path, text, lambda given: yaml12.read(given).value))
    if match := SCRIPT.search(text):
        return _command_line(path, text, match)
    raise ValueError(
        f"{path} is no config that dora-mm import knows: it reads kohya's TOML or command line, configs of ai-toolkit, "
        "OneTrainer, LLaMA-Factory, ms-swift and axolotl, and command lines of ms-swift"
    )


def _text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"FILE: {path} does not exist, or is a folder")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} has more than {LARGEST // 2**20} MiB: it is no config")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8") from None


def _parsed(path: Path, text: str, parse: Any) -> dict[str, Any]:
    try:
        values = parse(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # the errors of TOML and JSON are ValueErrors
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} has no keys")
    return values


def _recognized(path: Path, values: dict[str, Any]) -> Foreign:
    """The trainer of a file of keys, by keys that only it has."""
    if "pipeline" in values:
        raise ValueError(f"{path} is a config of dora_mm already: dora-mm train {quoted(path)}")
    if isinstance(values.get("config"), dict) and isinstance(values["config"].get("process"), list):
        return Foreign("ai-toolkit", values, path.parent)
    if "training_method" in values or "concept_file_name" in values or "concepts" in values:
        return Foreign("onetrainer", values, path.parent)
    if "base_model" in values and "datasets" in values:
        return Foreign("axolotl", values, path.parent)
    if "model_name_or_path" in values:
        return Foreign("llama-factory", values, path.parent)
    if kohya_gui.is_of_gui(values):
        typed = {key: _scalar(value) if isinstance(value, str) else value for key, value in values.items()}
        flags, script = kohya_gui.flags_of(typed)
        flags |= _flags(split(str(values.get("additional_parameters") or "")))
        return Foreign("kohya", flags, path.parent, script, kohya_gui.NAMES)
    if "pretrained_model_name_or_path" in values or "network_dim" in values:
        return Foreign("kohya", values, path.parent)
    if "model" in values and "dataset" in values:
        return Foreign("ms-swift", values, path.parent)
    raise ValueError(f"{path} has the keys {', '.join(list(values)[:8])}: of no trainer that dora-mm import knows")


def _kohya_values(values: dict[str, Any]) -> dict[str, Any]:
    """The keys of a TOML of kohya's, whose sections mean nothing but for `general` and `datasets`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= value if isinstance(value, dict) and key != "general" else {key: value}
    return flat


def _command_line(path: Path, text: str, match: re.Match[str]) -> Foreign:
    """The flags behind the script of a command line, as keys."""
    try:
        words = split(CONTINUED.sub(" ", text[match.end() :]), comments=True)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as a command line: {error}") from None
    script = match.group(0)
    if script.startswith(("llamafactory", "axolotl")):
        return read_foreign(_in_folder_of(path, next((word for word in words if word.endswith((".yaml", ".yml"))), "")))
    values = _flags(words)
    if script.startswith("swift"):
        before = dict(re.findall(r"\b(MAX_PIXELS|FPS_MAX_FRAMES)=(\d+)", text[: match.start()]))
        values |= {key.lower(): int(value) for key, value in before.items()}
        return Foreign("ms-swift", {**values, "rlhf": "rlhf" in script}, path.parent)
    if config := values.pop("config_file", None):
        file = _in_folder_of(path, config)
        values = {**read_foreign(file).left, **values}
    return Foreign("kohya", values, path.parent, script)


def _in_folder_of(path: Path, name: str) -> Path:
    return Path(name) if Path(name).exists() else path.parent / name


def _flags(words: list[str]) -> dict[str, Any]:
    """The values of `--flag value`, `--flag=value` and `--flag`; several values are a list."""
    values: dict[str, Any] = {}
    name = ""
    for word in words:
        if re.match(r"--?[A-Za-z]", word):
            name, equals, value = word.lstrip("-").partition("=")
            name = name.replace("-", "_")
            values[name] = _scalar(value) if equals else True
        elif word in ("&&", ";", "|", "&"):
            break
        elif name:
            known = values[name]
            values[name] = _scalar(word) if known is True else [*(known if isinstance(known, list) else [known]), word]
    return values


def _scalar(text: str) -> Any:
    """A word as a number or a truth value where it is one."""
    try:
        value = yaml12.read(text).value
    except yaml.YAMLError:
        return text
    return value if isinstance(value, int | float) else text
