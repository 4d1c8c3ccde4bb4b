"""Suites: tasks in YAML files, which name readers, a metric, a prompt and limits, so that one more needs no code."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from dora_mm.registries.readers import READERS
from dora_mm.registries.registry import Registry
from dora_mm.registries.scorers import SCORERS
from dora_mm.registries.vl_task import VLTask
from dora_mm.utils.messages import nearest

FOLDER = Path(__file__).parent / "suites"
SUFFIX = ".yaml"
ANY = "any"  # of `images`: a row may have any number
NEEDED = {"title": str, "readers": list, "metric": str, "prompt": str}
OPTIONAL = {"plain": str, "max_answer": int, "images": (int, str), "row_mean": bool, "letters": bool}


class TaskRegistry(Registry[VLTask]):
    """The tasks: of records, of suites by the names of their files, and of any suite by the path of its file."""

    def __getitem__(self, name: str) -> VLTask:
        """A task.

        Raises:
            KeyError: There is none of this name.
            ValueError: The file of a suite cannot be read.
        """
        path = suite_file(name)
        return super().__getitem__(name) if path is None or name in self._records else read_suite(path)

    def __contains__(self, name: object) -> bool:
        return (isinstance(name, str) and suite_file(name) is not None) or super().__contains__(name)

    def __iter__(self):
        return iter(dict.fromkeys((*self._records, *packaged_suites(), *super().__iter__())))

    def check(self, name: str) -> str:
        """Returns a name.

        Raises:
            ValueError: There is no task of this name, or the file of a suite cannot be read.
        """
        found = super().check(name)
        self[found]
        return found


@cache
def packaged_suites() -> tuple[str, ...]:
    """The names of the suites that come with the package."""
    return tuple(sorted(path.stem for path in FOLDER.glob(f"*{SUFFIX}")))


def suite_titles() -> dict[str, str]:
    """The title of each suite of the package, which is the first line of its file, with its formats."""
    texts = {name: (FOLDER / f"{name}{SUFFIX}").read_text(encoding="utf-8") for name in packaged_suites()}
    titles = {name: text.split("\n", 1)[0].removeprefix("# ") for name, text in texts.items()}
    formats = {name: text.partition("\nreaders: [")[2].partition("]")[0] for name, text in texts.items()}
    return {name: f"{title} ({formats[name]})" for name, title in titles.items()}


def suite_file(name: str) -> Path | None:
    """The file of a suite: one of the package by its name, or any by its path; None if the name is of none."""
    if name in packaged_suites():
        return FOLDER / f"{name}{SUFFIX}"
    return Path(name) if name.endswith(SUFFIX) and Path(name).is_file() else None


def file_stem(task: str) -> str:
    """The name of a task in names of files: of a suite's file what it is called without its folder and suffix."""
    return Path(task).stem if task.endswith(SUFFIX) else task


@cache
def read_suite(path: Path) -> VLTask:
    """The task of a suite's file.

    Raises:
        ValueError: The file is not YAML, or a key of it is unknown, missing or of another type.
    """
    import yaml  # here, since help imports nothing of others

    from dora_mm.utils import yaml12

    try:
        found = yaml12.read(path.read_text(encoding="utf-8")).value
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML ({str(error).splitlines()[0]})") from None
    return _task(path, _checked(path, found))


def _checked(path: Path, found: Any) -> Mapping[str, Any]:
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a suite: it has the keys {', '.join(NEEDED)}")
    kinds = NEEDED | OPTIONAL
    for key, value in found.items():
        if key not in kinds:
            raise ValueError(f"{path}: a suite has no key {key}{nearest(str(key), kinds)}")
        if not isinstance(value, kinds[key]) or (isinstance(value, bool) and kinds[key] is not bool):
            raise ValueError(f"{path}: {key} has the wrong type: {value!r}")
    if missing := [key for key in NEEDED if key not in found]:
        raise ValueError(f"{path}: {missing[0]} is missing")
    if not found["readers"] or any(not isinstance(reader, str) for reader in found["readers"]):
        raise ValueError(f"{path}: readers is no list of names: {found['readers']!r:.100}")
    try:
        for reader in found["readers"]:
            READERS.check(reader)
        SCORERS.check(found["metric"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return found


def _task(path: Path, found: Mapping[str, Any]) -> VLTask:
    images = found.get("images", 1)
    if isinstance(images, str) and images != ANY:
        raise ValueError(f"{path}: images is a number, or {ANY}")
    if "{text}" not in found["prompt"]:
        raise ValueError(f"{path}: prompt has no {{text}}, which the question takes the place of")
    return VLTask(
        title=found["title"],
        formats=tuple(found["readers"]),
        scorer=found["metric"],
        submission="answers",
        images=None if images == ANY else int(images),
        prompt=found["prompt"],
        fallback=found.get("plain"),
        max_answer=found.get("max_answer", 16),
        row_mean=found.get("row_mean", False),
        lettered=found.get("letters", False),
    )
