"""The strength of an adapter in a job: one number, or several by part and block, which can be hashed and written."""

from __future__ import annotations

import re
from collections.abc import Mapping

HashableStrength = float | tuple[tuple[str, float], ...]  # the second: numbers by the names of parts, "" for all others

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
_PAIR = rf"[\w.]*={_NUMBER}"


def as_strength(value: float | Mapping[str, float]) -> HashableStrength:
    """The strength of a config, or of `load_adapter`."""
    return tuple(value.items()) if isinstance(value, Mapping) else value


def scaled(strength: HashableStrength, factor: float) -> HashableStrength:
    """The strength times a factor."""
    if not isinstance(strength, tuple):
        return strength * factor
    return tuple((name, value * factor) for name, value in {"": 1.0, **dict(strength)}.items())


def is_zero(strength: HashableStrength) -> bool:
    """Whether it is the base model."""
    return not any(value for _, value in strength) if isinstance(strength, tuple) else not strength


def strength_text(strength: HashableStrength) -> str:
    """The strength as `parse_strength` reads it: `0.7` or `unet.down=0.5,text_encoder=1`."""
    if isinstance(strength, tuple):
        return ",".join(f"{name}={value:.12g}" for name, value in strength)
    return f"{strength:.12g}"


def parse_strength(text: str) -> HashableStrength | None:
    """Reads `0.7` or `unet.down=0.5,text_encoder=1`; None where the text is neither."""
    if re.fullmatch(_NUMBER, text, re.I):
        return float(text)
    if re.fullmatch(f"{_PAIR}(?:,{_PAIR})*", text, re.I):
        return tuple((name, float(value)) for name, _, value in (pair.partition("=") for pair in text.split(",")))
    return None
