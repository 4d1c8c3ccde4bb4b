"""Jobs of pictures: a file with a row per prompt and a column per setting, and the pictures that follow from it."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, PositiveInt, ValidationError

from dora_mm.config.loader import find_path
from dora_mm.config.pictures import PicturesConfig, PixelSize, SchedulerName
from dora_mm.config.report import nearest
from dora_mm.config.schema import NonNegative, Section, Seed, Text
from dora_mm.sampling.strengths import HashableStrength, as_strength, is_zero, parse_strength, scaled, strength_text

SUFFIXES = (".csv", ".tsv", ".jsonl", ".txt")
DELIMITERS = ",;\t|"
NO_ADAPTER = "none"
MOST_SEEDS = 10_000  # of a range: a typing error should not fill the disk

Weights = tuple[tuple[str, HashableStrength], ...]  # adapters by path, each with its strength


@dataclass(frozen=True)
class Picture:
    """All that a picture is drawn with, besides the model.

    Attributes:
        row: The number of its row in the job, from 1.
        prompt: The prompt.
        negative_prompt: None is what the model takes without one, "" the encoded empty text.
        seed: The seed of its noise.
        steps: The number of denoising steps.
        guidance: The scale of classifier-free guidance.
        width: In pixels; None is the model's own.
        height: In pixels; None is the model's own.
        scheduler: The name of the scheduler; None is the model's own.
        adapters: The adapters by path, each with its strength.
        strength: The strength of all of them, by which theirs are multiplied; 0 is the base model.
    """

    row: int
    prompt: str
    negative_prompt: str | None
    seed: int
    steps: int
    guidance: float
    width: int | None
    height: int | None
    scheduler: str | None
    adapters: Weights
    strength: float

    @property
    def weights(self) -> Weights:
        """The adapters at their final strengths; empty for the base model."""
        final = ((path, scaled(strength, self.strength)) for path, strength in self.adapters)
        return tuple((path, strength) for path, strength in final if not is_zero(strength))

    @property
    def settings(self) -> dict[str, Any]:
        """What all pictures of a batch share besides the weights, as `PictureSampler.draw` takes it."""
        return {name: getattr(self, name) for name in ("steps", "guidance", "width", "height", "scheduler")}


# --- reading a job file ----------------------------------------------------------------------------------------------


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
    return tuple(seeds)


def parse_adapters(value: Any) -> Any:
    """Converts `path`, `path:0.7` and `a:0.7+b:unet.down=0.5,text_encoder=0` to adapters with their strengths.

    `none` is no adapter.     A path that exists is taken as it is, whatever characters it has.
    """
    if not isinstance(value, str):
        return value
    if value.strip() == NO_ADAPTER:
        return ()
    is_one = find_path(_with_strength(value)[0]) is not None
    parts = [value] if is_one else value.split("+")
    return tuple(_with_strength(part.strip()) for part in parts)


def _with_strength(text: str) -> tuple[str, HashableStrength]:
    path, colon, end = text.rpartition(":")
    strength = parse_strength(end) if colon and find_path(text) is None else None
    return (text, 1.0) if strength is None else (path, strength)


def adapters_text(adapters: Weights) -> str | None:
    """The adapters as `parse_adapters` reads them; None where there are none."""
    return (
        "+".join(path if strength == 1 else f"{path}:{strength_text(strength)}" for path, strength in adapters) or None
    )


class JobRow(Section):
    """A row of a job file. What it leaves out, or leaves empty, is as in the config."""

    model_config = ConfigDict(strict=False, str_strip_whitespace=True)

    prompt: Text
    negative_prompt: str | None = None
    seed: Annotated[tuple[Seed, ...], BeforeValidator(parse_seeds)] | None = None
    steps: PositiveInt | None = None
    guidance: NonNegative | None = None
    width: PixelSize | None = None
    height: PixelSize | None = None
    scheduler: SchedulerName | None = None
    adapter: Annotated[tuple[tuple[Text, HashableStrength], ...], BeforeValidator(parse_adapters)] | None = None
    strength: float | None = None


def read_job(path: Path) -> list[JobRow]:
    """Reads a job file.

    Args:
        path: A .txt file with a prompt per line (lines that begin with # are comments); a .csv or .tsv file whose first
            line names its columns; or a .jsonl file with an object per line. In UTF-8.

    Raises:
        ValueError: Lists all problems of the file: it has another suffix, is not UTF-8 or has no rows; a column is
            unknown; a row has no prompt, or a value that cannot be used.
    """
    if (path / "config.yaml").is_file():
        raise ValueError(f"{path} is a run directory: dora-mm sample --resume {path} goes on with it")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} must end in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ValueError(f"{path} is a folder: name a job file in it")
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without the byte order mark that Excel writes
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start} cannot be read") from None
    read = {".txt": _text_rows, ".jsonl": _json_rows}.get(path.suffix.lower(), _table_rows)
    problems: list[str] = []
    rows = [_row(values, line, problems) for line, values in read(path, text, problems)]
    if problems:
        head = problems[0] if len(problems) == 1 else f"{len(problems)} problems"
        raise ValueError("\n  ".join([f"{path}: {head}", *(problems if len(problems) > 1 else ())]))
    if not rows:
        raise ValueError(f"{path} has no prompts")
    return [row for row in rows if row is not None]


NumberedLines = Iterable[tuple[int, Mapping[str, Any]]]  # the number of each line, and what it says by column


def _text_rows(path: Path, text: str, problems: list[str]) -> NumberedLines:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, {"prompt": line}


def _json_rows(path: Path, text: str, problems: list[str]) -> NumberedLines:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            problems.append(f"line {number} is not valid JSON ({getattr(error, 'msg', 'too deep')})")
            continue
        if isinstance(values, dict):
            yield number, values
        else:
            problems.append(f'line {number} is not a JSON object such as {{"prompt": ...}}')


def _table_rows(path: Path, text: str, problems: list[str]) -> NumberedLines:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                if unknown := [name for name in header if name not in JobRow.model_fields]:
                    problems += [f"line 1: unknown column {_unknown(name)}" for name in unknown]
                    return
                if len(set(header)) < len(header):
                    problems.append("line 1 names a column twice")
                    return
            elif len(cells) > len(header):
                problems.append(
                    f"line {reader.line_num} has {len(cells)} cells for {len(header)} columns: put quotation marks "
                    f"around text with {'a tab' if delimiter == chr(9) else delimiter}"
                )
            else:
                yield reader.line_num, {name: cell for name, cell in zip(header, cells, strict=False) if cell.strip()}
    except csv.Error as error:
        problems.append(f"line {reader.line_num} cannot be read: {error}")


def _delimiter(text: str) -> str:
    """The delimiter by which most names of the first line are those of columns."""
    first = next((line for line in text.split("\n") if line.strip()), "")

    def known(delimiter: str) -> int:
        return sum(cell.strip(' "\r') in JobRow.model_fields for cell in first.split(delimiter))

    return max(DELIMITERS, key=known)


def _row(values: Mapping[str, Any], line: int, problems: list[str]) -> JobRow | None:
    try:
        return JobRow.model_validate(dict(values))
    except ValidationError as error:
        for item in error.errors(include_url=False):
            column = str(item["loc"][0])
            problems.append(f"line {line}: {_problem(column, item)}")
    return None


def parse_setting(column: str, value: Any) -> Any:
    """Reads one value of a column, such as of an axis of a grid.

    Raises:
        ValueError: The value cannot be used.
    """
    try:
        return getattr(JobRow.model_validate({"prompt": "a", column: value}), column)
    except ValidationError as error:
        raise ValueError(_problem(column, error.errors(include_url=False)[0])) from None


def _problem(column: str, item: Any) -> str:
    if item["type"] == "extra_forbidden":
        return f"unknown column {_unknown(column)}"
    if column == "prompt" and item["type"] in ("missing", "string_too_short"):
        return "has no prompt"
    message = str(item.get("ctx", {}).get("error") or item["msg"].replace("Input should be", "must be"))
    return f"{column} {message}" if "got" in message else f"{column} {message}, got {item['input']!r}"


def _unknown(name: str) -> str:
    columns = list(JobRow.model_fields)
    return f"{name!r}{nearest(name, columns) or ', the columns are ' + ', '.join(columns)}"


# --- the pictures of a job, their files and batches ------------------------------------------------------------------


def template(config: PicturesConfig, *, prompt: str = "", seed: int = 0) -> Picture:
    """A picture with the settings of a config, which rows of a job and axes of a grid replace."""
    adapters: Weights = ((config.adapter.path, as_strength(config.adapter.strength)),) if config.adapter else ()
    settings = config.model_dump(include={"negative_prompt", "steps", "guidance", "width", "height", "scheduler"})
    return Picture(row=0, prompt=prompt, seed=seed, adapters=adapters, strength=1.0, **settings)


def expand(
    rows: Sequence[JobRow], template: Picture, seeds: Sequence[int], strengths: Sequence[float]
) -> list[Picture]:
    """Lists the pictures of a job.

    Args:
        rows: The rows.
        template: Has the settings that the rows leave out.
        seeds: The seeds of each row that has none.
        strengths: The strengths of each row that has none.

    Returns:
        The pictures by row, seed and strength.
    """
    pictures = []
    for number, row in enumerate(rows, 1):
        given = {name: value for name, value in row if value is not None}
        row_seeds = given.pop("seed", seeds)
        row_strengths = (given.pop("strength"),) if "strength" in given else strengths
        given["adapters"] = given.pop("adapter", template.adapters)
        pictures += [
            replace(template, row=number, seed=seed, strength=strength, **given)
            for seed in dict.fromkeys(row_seeds)
            for strength in dict.fromkeys(row_strengths)
        ]
    return pictures


def file_names(pictures: Sequence[Picture]) -> list[str]:
    """The name of each picture's file: `0001-seed7.png`, with its strength where its row has several."""
    strengths: dict[int, set[float]] = {}
    for picture in pictures:
        strengths.setdefault(picture.row, set()).add(picture.strength)
    names = []
    for picture in pictures:
        strength = f"-strength{picture.strength:.12g}" if len(strengths[picture.row]) > 1 else ""
        names.append(f"{picture.row:04d}-seed{picture.seed}{strength}.png")
    return names


def batches(pictures: Sequence[Picture], size: int, length: Callable[[Picture], int]) -> list[list[int]]:
    """Groups pictures into batches, which depend on nothing but the job.

    Pictures of a batch share their weights, size and settings, and the length of their encoded prompts: one that is
    padded draws another picture. Batches with the same weights follow each other.

    Args:
        pictures: The pictures.
        size: The largest number of pictures in a batch.
        length: The length of the longer one of a picture's prompts, as the model sees it.

    Returns:
        The indices of the pictures of each batch.
    """
    groups: dict[Hashable, dict[Hashable, list[int]]] = {}
    for index, picture in enumerate(pictures):
        key = *picture.settings.values(), length(picture)
        groups.setdefault(picture.weights, {}).setdefault(key, []).append(index)
    return [
        group[start : start + size]
        for same_weights in groups.values()
        for group in same_weights.values()
        for start in range(0, len(group), size)
    ]
