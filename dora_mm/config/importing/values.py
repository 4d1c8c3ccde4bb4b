"""Values of other trainers in our units."""

from collections.abc import Mapping, Sequence
from typing import Any

from dora_mm.config.importing.translation import Translation
from dora_mm.utils import yaml12
from dora_mm.utils.messages import shown

OF_METHODS = "DoRA, LoRA, magnitudes and full fine-tuning are trained"


def refuse(key: str, value: Any, known: Sequence[Any], what_exists: str) -> None:
    """Refuses a method that has no equal here: without it the config would train something else.

    Raises:
        ValueError: It is none of those that have one.
    """
    if value not in known:
        raise ValueError(f"{key}: {shown(value, 40)} has no equal here, so there is nothing to import: {what_exists}")


def put_resolution(found: Translation, given: Any) -> None:
    if (size := side_of(given)) is not None:
        found.put("data.resolution", size, "resolution")
        if len(sides := set(_sides(given))) > 1:
            width, height = sides
            found.differs(
                f"A resolution of {width} x {height} is an area: images keep their shapes, near {size} x {size}."
            )


def side_of(given: Any) -> int | None:
    """The side of the square of an area that is given as a number, "width,height" or a list; a multiple of 64."""
    sides = _sides(given)
    if not sides:
        return None
    return sides[0] if len(set(sides)) == 1 else round((sides[0] * sides[1]) ** 0.5 / 64) * 64


def _sides(given: Any) -> list[int]:
    """The width and the height, or one side; empty where it is neither."""
    words = given if isinstance(given, list) else str(given or "").replace("x", ",").split(",")
    numbers = [str(word).strip() for word in words]
    return [int(word) for word in numbers[:2]] if all(word.isdecimal() for word in numbers) else []


def put_schedule(found: Translation, name: Any, source: str) -> None:
    """A schedule; where cycles and power are not given, they are 1, as in transformers and diffusers."""
    found.put("schedule.name", name, source)
    for key, of_schedule in (("schedule.cycles", "restarts"), ("schedule.power", "polynomial")):
        if found.values.get("schedule.name") != of_schedule:
            found.values.pop(key, None)
        else:
            found.values.setdefault(key, 1)


def put_warmup(found: Translation, given: Any, source: str) -> None:
    """A warm-up in steps; below 1 it is a share of all steps."""
    steps = number_of(given)
    if steps and steps < 1:
        found.put("schedule.warmup_ratio", steps, source)
    elif steps:
        found.put("schedule.warmup_steps", int(steps), source)


def put_optimizer_options(found: Translation, options: Mapping[str, Any], source: str) -> None:
    betas = options.get("betas") or [options[key] for key in ("beta1", "beta2") if options.get(key) is not None]
    if isinstance(betas, str):
        betas = [float(each) for each in betas.strip("()[]").split(",")]
    found.put("optimizer.betas", list(betas) if betas and len(betas) == 2 else None, source)
    found.put("optimizer.eps", number_of(options.get("eps")), source)
    found.put("optimizer.weight_decay", number_of(options.get("weight_decay")), source)
    known = ("betas", "beta1", "beta2", "eps", "weight_decay")
    others = {key: value for key, value in options.items() if key not in known and value is not None}
    if others:
        found.put("optimizer.options", others, source)


def pairs_of(given: Any) -> dict[str, Any]:
    """`["key=value", ...]`, or one such text, as a mapping."""
    words = given.split() if isinstance(given, str) else [str(word) for word in given or ()]
    pairs = (word.partition("=")[::2] for word in words if "=" in word)
    return {key.strip(): _value(text.strip()) for key, text in pairs}


def _value(text: str) -> Any:
    value = yaml12.read(text).value if text and "(" not in text and "[" not in text and ":" not in text else text
    return {"True": True, "False": False}.get(text, value)


def number_of(given: Any) -> float | None:
    try:
        return None if given is None else float(given)
    except (TypeError, ValueError):
        return None
