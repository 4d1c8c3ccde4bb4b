"""Turns pydantic's errors into sentences that name the key, where it stands, and what was probably meant."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from dora_mm.config.yaml12 import KeyPath

_WANTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "model_type": "a section of keys",
}


class Problem(NamedTuple):
    where: str  # "line 7" or "--set lr=2"
    key: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in self if part)


def describe(error: ValidationError, schema: type[BaseModel], origins: Mapping[KeyPath, str]) -> list[Problem]:
    """One problem per error, in the order of the schema; origins say where a key stands."""
    problems = []
    for item in error.errors(include_url=False):
        path = tuple(item["loc"])
        problems.append(Problem(_origin(path, origins), outline(path), _message(item, path, schema)))
    return problems


def outline(path: KeyPath) -> str:
    """sample.seeds[0]"""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def nearest(name: str, names: Iterable[str]) -> str:
    """', did you mean ...?' or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""


def _origin(path: KeyPath, origins: Mapping[KeyPath, str]) -> str:
    """Where the key stands, or else the closest section above it."""
    for length in range(len(path), 0, -1):
        if path[:length] in origins:
            return origins[path[:length]]
    return ""


def _message(item: Any, path: KeyPath, schema: type[BaseModel]) -> str:
    kind, given, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key{_suggestion(path, schema)}"
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        return f"must be {context['expected']}, got {given!r}{nearest(str(given), _quoted(context['expected']))}"
    if kind in _WANTED:
        return f"must be {_WANTED[kind]}, got {given!r}"
    text = (
        item["msg"]
        .replace("Input should be", "must be")
        .replace("String should", "must")
        .replace("Tuple should", "must")
    )
    return f"{text[0].lower()}{text[1:]}, got {given!r}"


def _quoted(expected: str) -> list[str]:
    return expected.split("'")[1::2]


def _suggestion(path: KeyPath, schema: type[BaseModel]) -> str:
    """The key of this section that is spelled nearly so, or else where the config has a key of that name."""
    *parents, name = path
    section = _section(schema, parents)
    siblings = list(section.model_fields) if section else []
    close = nearest(str(name), siblings)
    if close:
        return close
    elsewhere = [key for key in all_keys(schema) if key.split(".")[-1] == name]
    if elsewhere:
        return f", did you mean {elsewhere[0]!r}?"
    return f"; this section has {', '.join(siblings)}" if siblings else ""


def _section(schema: type[BaseModel], parents: Iterable[str | int]) -> type[BaseModel] | None:
    """The model that stands at a path; list positions do not change it."""
    model: type[BaseModel] | None = schema
    for part in parents:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if model else None
        model = _model_in(field.annotation) if field else None
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The section behind an annotation such as Section, Section | None or tuple[Section, ...]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [_model_in(argument) for argument in getattr(annotation, "__args__", ())]
    return next((model for model in found if model), None)


def all_keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in schema.model_fields.items():
        keys.append(prefix + name)
        inner = _model_in(field.annotation)
        if inner:
            keys += all_keys(inner, f"{prefix}{name}.")
    return keys
