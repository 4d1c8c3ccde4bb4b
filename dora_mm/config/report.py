"""Turns pydantic's errors into messages that name the key, its location, and the probable correction."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, get_origin

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


ANY_NAME = "*"  # in dotted keys


class Problem(NamedTuple):
    """One problem of a config; as text, `where: key: message`."""

    where: str  # "line 7" or "--set lr=2"; empty if unknown
    key: str  # dotted; empty for the whole config
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in self if part)


def describe(error: ValidationError, schema: type[BaseModel], origins: Mapping[KeyPath, str]) -> list[Problem]:
    """Describes every error of a validation.

    Args:
        error: What pydantic raised.
        schema: The schema that was validated against.
        origins: The location of each key, such as "line 7".

    Returns:
        One problem per error, in the order of the schema.
    """
    problems = []
    for item in error.errors(include_url=False):
        path = tuple(item["loc"])
        problems.append(Problem(_origin(path, origins), dotted_key(path), _message(item, path, schema)))
    return problems


def dotted_key(path: KeyPath) -> str:
    """A key path as text, such as sample.seeds[0]."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def nearest(name: str, names: Iterable[str]) -> str:
    """The text ", did you mean '...'?" with the most similar of `names`, or an empty text if none is similar."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""


def _origin(path: KeyPath, origins: Mapping[KeyPath, str]) -> str:
    """The location of the key, or else of the closest section that contains it."""
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
    if kind == "string_unicode":
        return f"must be text in Unicode, without half a surrogate pair, got {given!r}"
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
    """Suggests a similar key of the same section, else the same key in another section, else lists the keys."""
    *parents, name = path
    section = _section(schema, parents)
    siblings = list(section.model_fields) if section else []
    close = nearest(str(name), siblings)
    if close:
        return close
    elsewhere = [key for key in all_keys(schema) if key.split(".")[-1] == name and ANY_NAME not in key]
    if elsewhere:
        return f", did you mean {elsewhere[0]!r}?"
    return f"; this section has {', '.join(siblings)}" if siblings else ""


def _section(schema: type[BaseModel], parents: Iterable[str | int]) -> type[BaseModel] | None:
    """The model at a key path; list indices, and the names of sections that have any name, are skipped."""
    model: type[BaseModel] | None = schema
    named = False
    for part in parents:
        if named or isinstance(part, int):
            named = False
            continue
        field = model.model_fields.get(part) if model else None
        model = _model_in(field.annotation) if field else None
        named = field is not None and get_origin(field.annotation) is dict
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model class in an annotation such as Section, Section | None or tuple[Section, ...]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [_model_in(argument) for argument in getattr(annotation, "__args__", ())]
    return next((model for model in found if model), None)


def all_keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys of a schema, sections included, each with `prefix` in front; `*` is any name of a section."""
    keys = []
    for name, field in schema.model_fields.items():
        keys.append(prefix + name)
        inner = _model_in(field.annotation)
        if inner:
            any_name = f"{ANY_NAME}." if get_origin(field.annotation) is dict else ""
            keys += all_keys(inner, f"{prefix}{name}.{any_name}")
    return keys
