"""What a documented command gets appended by `--set`, so that it takes seconds: fewer steps and rows, smaller sizes."""

from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dora_mm.config import dump_config, load_config
from dora_mm.config.schema import PipelineConfig
from dora_mm.models.quantization import QUANTIZATIONS
from tests.documented.data import NUM_ROWS

STEPS = 2
ROWS = NUM_ROWS // 2  # of a split
HIGHEST = {  # of a key, in whatever section it is
    "rate_seeds": 1,
    "steps": STEPS,
    "denoising_steps": STEPS,
    "checkpoint_every": 1,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "resolution": 64,
    "extra_rates": 0,
}
LOWEST_COUNT = 3  # of concepts, and of learning rates
SIDE = 64  # pixels of an image


def cuts(config: PipelineConfig, is_ours: Callable[[str], bool]) -> list[str]:
    """Overrides for a config.

    Args:
        config: The config, with the overrides of the documented command.
        is_ours: Whether a data file is one that the test has made.
    """
    values = config.model_dump()
    found = dict(_cut(values, "", is_ours, several="compare" in config.pipeline))
    if "train" in values and values["train"].get("epochs") is not None:
        found |= {"train.epochs": None, "train.steps": STEPS}
    if isinstance(base := values.get("base"), str):
        found["base"] = _cut_base(base, is_ours)
    return [f"{key}={'null' if value is None else value}" for key, value in found.items()]


def _cut(
    values: Mapping[str, Any], prefix: str, is_ours: Callable[[str], bool], *, several: bool
) -> Iterator[tuple[str, Any]]:
    """The keys to change in a section, with their new values; comparisons need several seeds."""
    if "format" in values and "file" in values:
        yield f"{prefix}limit", min(values["limit"] or ROWS, ROWS)
        if is_ours(values["file"]) and values["skip"]:
            yield f"{prefix}skip", min(values["skip"], ROWS)
        return
    for key, value in values.items():
        name = prefix + key
        if key == "variants":
            yield name, []
        elif prefix == "learning_rates." and value:
            yield name, list(value[:LOWEST_COUNT])
        elif isinstance(value, Mapping):
            yield from _cut(value, f"{name}.", is_ours, several=several)
        elif isinstance(value, tuple) and value and isinstance(value[0], Mapping):
            for position, item in enumerate(value):
                yield from _cut(item, f"{name}.{position}.", is_ours, several=several)
        elif key in HIGHEST and isinstance(value, int) and value > HIGHEST[key]:
            yield name, HIGHEST[key]
        elif key == "warmup_steps" and value >= STEPS:
            yield name, STEPS - 1
        elif key == "gradients_at" and value:
            yield name, list(range(STEPS))
        elif key.startswith("stop_") and value:
            yield name, STEPS - 1
        elif key == "count" and prefix != "tokens." and value != LOWEST_COUNT:
            yield name, LOWEST_COUNT
        elif key == "seeds":
            yield name, list(value[: 2 if several else 1])
        elif key in ("height", "width") and value is None:
            yield name, SIDE
        elif key in ("things", "strengths") and value:
            yield name, list(value[:1] + value[-1:])
        elif key == "ranks":
            yield name, [STEPS]
        elif key == "max_new_tokens":
            yield name, 4
        elif key.endswith("quantization") and value and _lacks_package(value):
            yield name, None


def _lacks_package(quantization: str) -> bool:
    package = QUANTIZATIONS[quantization].package
    return bool(package) and not find_spec(package)


def _cut_base(base: str, is_ours: Callable[[str], bool]) -> Path:
    """A copy of the config that a comparison names, cut as well."""
    config = load_config(base)
    path = Path("cut") / Path(base).name
    path.parent.mkdir(exist_ok=True)
    path.write_text(dump_config(load_config(base, cuts(config, is_ours))))
    return path
