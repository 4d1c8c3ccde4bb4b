"""Names of columns and schedulers in other programs: A1111, ComfyUI."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dora_mm.models.images.schedulers import SCHEDULERS
from dora_mm.utils.prompt_lines import IMAGE

ALIASES = {
    "text": "prompt",
    "positive": "prompt",
    "positive_prompt": "prompt",
    "negative": "negative_prompt",
    "neg_prompt": "negative_prompt",
    "seeds": "seed",
    "num_inference_steps": "steps",
    "sampling_steps": "steps",
    "cfg": "guidance",
    "cfg_scale": "guidance",
    "guidance_scale": "guidance",
    "cfg_rescale": "guidance_rescale",
    "sampler": "scheduler",
    "sampler_name": "scheduler",
    "sampling_method": "scheduler",
    "lora": "adapter",
    "lora_strength": "strength",
    "lora_weight": "strength",
    "file_name": "file",
    "filename": "file",
    "subfolder": "folder",
}
SIZE, SCHEDULE = "size", ("schedule_type", "noise_schedule")
OWN_SCHEDULES = {"DPM++ 2M": "Karras", "DPM++ 2M SDE": "Exponential"}  # of A1111's schedule type Automatic
SCHEDULE_SUFFIXES = ("", "automatic", "uniform", "normal")


def column_of(name: str) -> str:
    """Our name of a column: case, blanks and hyphens do not count, nor which program's name it is."""
    normalized = re.sub(r"[\s_-]+", "_", name.strip().lower())
    return ALIASES.get(normalized, normalized)


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A row by our columns: A1111's `Size` is a width and a height, and its `Schedule type` belongs to the sampler.

    Raises:
        ValueError: Two columns have one meaning, or a value cannot be read.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        column = column_of(name)
        if column in found:
            raise ValueError(f"{column} is given twice")
        found[column] = value
    if images := sorted(filter(IMAGE.fullmatch, found), key=lambda name: (len(name), name)):
        if "images" in found:
            raise ValueError(f"{images[0]} and images are given: keep one")
        found["images"] = [path for name in images if (path := found.pop(name))] or None
    if isinstance(size := found.pop(SIZE, None), str):
        match = re.fullmatch(r"\s*(\d+)\s*[xX]\s*(\d+)\s*", size)
        if match is None or {"width", "height"} & found.keys():
            raise ValueError(f"size must be such as 832x1216, without width and height, got {size!r}")
        found["width"], found["height"] = match[1], match[2]
    schedules = [found.pop(name) for name in SCHEDULE if name in found]
    if schedules:  # A1111 and Civitai name the spacing of the noise levels apart from the sampler since its version 1.9
        sampler, schedule = str(found.get("scheduler", "")), str(schedules[0])
        own = OWN_SCHEDULES.get(sampler) if schedule.lower() == "automatic" else None
        is_default = not own and schedule.lower() in SCHEDULE_SUFFIXES
        found["scheduler"] = sampler if is_default else f"{sampler} {own or schedule}"
    return found


def parse_scheduler(value: Any) -> Any:
    """A scheduler by our name or A1111's, in any case; any other value stays as it is."""
    if not isinstance(value, str):
        return value
    known = {entry.title.lower(): name for name, entry in SCHEDULERS.items()} | {name: name for name in SCHEDULERS}
    normalized = re.sub(r"\s+", " ", value.strip().lower())
    return known.get(normalized, known.get(normalized.removeprefix("k_"), value))
