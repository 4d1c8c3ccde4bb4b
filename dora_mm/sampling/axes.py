"""The axes of a grid: what each value of a setting changes in an image."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dora_mm.config.generation import Axis, GridConfig
from dora_mm.sampling.batch.prompt_row import adapters_text, parse_adapters, parse_setting

WITHOUT = "no adapter"
OF_ADAPTERS = ("strength", "adapter", "checkpoint")  # axes along which there is an image without adapter

Cell = tuple[str, Mapping[str, Any]]  # a label, and the fields of an `ImageRequest` that it sets


def cells_of(axis: Axis | None, checkpoints: Mapping[str, str]) -> list[Cell]:
    """The values of an axis, each with its label and the fields of an `ImageRequest` that it sets.

    Args:
        axis: The axis; None has one value, which sets nothing.
        checkpoints: The folders of a run's checkpoints by their steps.

    Raises:
        ValueError: A value does not fit the axis.
    """
    if axis is None:
        return [("", {})]
    values = list(axis.values) or list(checkpoints)
    return [_cell(axis.name, value, checkpoints) for value in values]


def with_base_model(config: GridConfig, rows: list[Cell], columns: list[Cell]) -> tuple[list[Cell], list[Cell]]:
    """Adds the images without adapter: a first row or column, of the axis that is about adapters.

    Without such an axis it is a column with the first column's settings.
    """
    is_row = config.rows is not None and config.rows.name in OF_ADAPTERS and config.columns.name not in OF_ADAPTERS
    if is_row:
        return [(WITHOUT, {"strength": 0.0}), *rows], columns
    label, first = columns[0]
    if config.columns.name in OF_ADAPTERS:
        return rows, [(WITHOUT, {"strength": 0.0}), *columns]
    return rows, [(f"{WITHOUT}, {label}", {**first, "strength": 0.0}), *columns]


def _cell(name: str, value: Any, checkpoints: Mapping[str, str]) -> Cell:
    if name == "size":
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", str(value).strip())
        if match is None:
            raise ValueError(f"size must be such as 1024 or 832x1216, got {value!r}")
        width, height = parse_setting("width", match[1]), parse_setting("height", match[2] or match[1])
        return f"{width} x {height}", {"width": width, "height": height}
    if name == "checkpoint":
        if str(value) not in checkpoints:
            raise ValueError(f"the run has no checkpoint of step {value}, only {', '.join(checkpoints) or 'none'}")
        return f"step {value}", {"adapters": parse_adapters(checkpoints[str(value)])}
    if name == "adapter":
        adapters = parse_setting(name, value)
        return adapters_text(adapters) or WITHOUT, {"adapters": adapters}
    parsed = parse_setting(name, value)
    if name == "seed":
        (parsed,) = parsed if len(parsed) == 1 else (None,)
        if parsed is None:
            raise ValueError(f"seed must be one seed per value, got {value!r}")
    label = str(parsed) if name in ("prompt", "scheduler") else f"{name} {value}"
    return label, {name: parsed}
