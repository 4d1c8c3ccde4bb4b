"""The rows of a job: their columns, and how the values of each are written."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, ValidationError

from dora_mm.config.generation import NumSteps, PixelSize, Rescale, SchedulerName, as_references
from dora_mm.config.latest import numbered_adapters
from dora_mm.config.paths import find_path
from dora_mm.config.schema import NonNegative, Section, Seed, Text
from dora_mm.sampling.batch.columns import column_of, parse_scheduler
from dora_mm.sampling.strengths import HashableStrength, parse_strength, strength_text
from dora_mm.utils.messages import nearest

NO_ADAPTER = "none"
NAME = re.compile(r"(?![. -])[^\x00-\x1f<>:\"/\\|?*]{1,150}(?<![. ])(?<!\.jpg)(?<!\.jpeg)(?<!\.webp)")  # of any system
NOT_IN_NAMES = '<>:"/\\|?*'
MOST_SEEDS = 10_000  # of a row: a typing error should not fill the disk

ActiveAdapters = tuple[tuple[str, HashableStrength], ...]  # adapters by path, each with its strength


def parse_seeds(value: Any) -> Any:
    """Converts `7`, "7", "1-8", "1 5 9" and [1, 5, 9] to a tuple of seeds.

    Raises:
        ValueError: The text has another form, or its range is empty or very long.
    """
    if isinstance(value, int):
        return (value,)
    if not isinstance(value, str):
        return value
    seeds: list[int] = []
    for part in value.replace(",", " ").split():
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise ValueError(f"must be seeds such as 7, 1-8 or 1 5 9, got {value!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if not 0 <= last - first < MOST_SEEDS:
            raise ValueError(f"has the range {part}, which must go up and have at most {MOST_SEEDS} seeds")
        seeds += range(first, last + 1)
        if len(seeds) > MOST_SEEDS:
            raise ValueError(f"must have at most {MOST_SEEDS} seeds")
    return tuple(seeds)


def parse_number(value: Any) -> Any:
    """Takes the comma in `1,5` for the point that it is in many languages."""
    return value.replace(",", ".") if isinstance(value, str) and re.fullmatch(r"[+-]?\d+,\d+", value.strip()) else value


def check_file(name: str) -> str:
    """Checks that an image's file can have a name, which may end in .png.

    Raises:
        ValueError: It cannot.
    """
    stem = name.removesuffix(".png")
    if not NAME.fullmatch(stem):
        raise ValueError(f"must be a name without {NOT_IN_NAMES} and other endings than .png, got {name!r}")
    return stem


def check_folder(path: str) -> str:
    """Checks the names in a relative path.

    Raises:
        ValueError: It leaves the folder, or a system has no such name.
    """
    if not all(NAME.fullmatch(part) for part in path.split("/")):
        raise ValueError(f"must be names without {NOT_IN_NAMES}, with / between them, got {path!r}")
    return path


def parse_adapters(value: Any) -> Any:
    """Converts `path`, `path:0.7` and `a:0.7+b:unet.down=0.5,text_encoder=0` to adapters with their strengths.

    `none` is no adapter.     A path that exists is taken as it is, whatever characters it has.
    """
    if not isinstance(value, str):
        return value
    if value.strip() == NO_ADAPTER:
        return ()
    value = numbered_adapters(value)
    is_one = find_path(_with_strength(value)[0]) is not None
    parts = [value] if is_one else value.split("+")
    return tuple(_with_strength(part.strip()) for part in parts)


def _with_strength(text: str) -> tuple[str, HashableStrength]:
    path, colon, end = text.rpartition(":")
    strength = parse_strength(end) if colon and find_path(text) is None else None
    return (text, 1.0) if strength is None else (path, strength)


def adapters_text(adapters: ActiveAdapters) -> str | None:
    """The adapters as `parse_adapters` reads them; None where there are none."""
    return (
        "+".join(path if strength == 1 else f"{path}:{strength_text(strength)}" for path, strength in adapters) or None
    )


class PromptRow(Section):
    """A row of a prompts file. What it leaves out, or leaves empty, is as in the config."""

    model_config = ConfigDict(strict=False, str_strip_whitespace=True)

    prompt: Text
    negative_prompt: str | None = None
    seed: Annotated[tuple[Seed, ...], BeforeValidator(parse_seeds)] | None = None
    steps: NumSteps | None = None
    guidance: Annotated[NonNegative, BeforeValidator(parse_number)] | None = None
    guidance_rescale: Annotated[Rescale, BeforeValidator(parse_number)] | None = None
    width: PixelSize | None = None
    height: PixelSize | None = None
    scheduler: Annotated[SchedulerName, BeforeValidator(parse_scheduler)] | None = None
    adapter: Annotated[tuple[tuple[Text, HashableStrength], ...], BeforeValidator(parse_adapters)] | None = None
    strength: Annotated[float, BeforeValidator(parse_number)] | None = None
    images: Annotated[tuple[Text, ...], BeforeValidator(as_references)] | None = None
    file: Annotated[Text, AfterValidator(check_file)] | None = None
    folder: Annotated[Text, AfterValidator(check_folder)] | None = None


def parse_setting(column: str, value: Any) -> Any:
    """Reads one value of a column, such as of an axis of a grid.

    Raises:
        ValueError: The value cannot be used.
    """
    try:
        return getattr(PromptRow.model_validate({"prompt": "a", column: value}), column)
    except ValidationError as error:
        raise ValueError(problem_of_value(column, error.errors(include_url=False)[0])) from None


def problem_of_value(column: str, item: Any) -> str:
    if item["type"] == "extra_forbidden":
        return f"unknown column {about_unknown(column)}"
    if column == "prompt" and item["type"] in ("missing", "string_too_short"):
        return "has no prompt"
    message = str(item.get("ctx", {}).get("error") or item["msg"].replace("Input should be", "must be"))
    return f"{column} {message}" if "got" in message else f"{column} {message}, got {item['input']!r}"


def about_unknown(name: str) -> str:
    columns = list(PromptRow.model_fields)
    return f"{name!r}{nearest(column_of(name), columns) or ', the columns are ' + ', '.join(columns)}"
