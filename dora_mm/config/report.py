"""Turns pydantic's errors into messages that name the key, its location, and the probable correction."""

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
        path = _without_tags(tuple(item["loc"]), schema)
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
    siblings = list(dict.fromkeys(key for section in _sections(schema, parents) for key in section.model_fields))
    close = nearest(str(name), siblings)
    if close:
        return close
    elsewhere = [key for key in all_keys(schema) if key.split(".")[-1] == name]
    if elsewhere:
        return f", did you mean {elsewhere[0]!r}?"
    return f"; this section has {', '.join(siblings)}" if siblings else ""


def _sections(schema: type[BaseModel], parents: Iterable[str | int]) -> list[type[BaseModel]]:
    """The models that a key path can lead to; list indices are skipped."""
    models = [schema]
    for part in parents:
        if not isinstance(part, int):
            fields = [model.model_fields[part] for model in models if part in model.model_fields]
            models = [model for field in fields for model in _models_in(field.annotation)]
    return models


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The model classes in an annotation such as Section | None, tuple[Section, ...] or a union of sections."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in getattr(annotation, "__args__", ()) for model in _models_in(argument)]


def _without_tags(location: KeyPath, schema: type[BaseModel]) -> KeyPath:
    """A location without what pydantic adds after the key of a union of sections: which of them was chosen."""
    path: list[str | int] = []
    models, tag_follows = [schema], False
    for part in location:
        if tag_follows and isinstance(part, str):
            tag_follows = False
            continue
        path.append(part)
        if isinstance(part, str):
            fields = [model.model_fields[part] for model in models if part in model.model_fields]
            found = [_models_in(field.annotation) for field in fields]
            models, tag_follows = [model for each in found for model in each], any(len(each) > 1 for each in found)
    return tuple(path)


def all_keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys of a schema, sections included, each with `prefix` in front."""
    keys = []
    for name, field in schema.model_fields.items():
        keys.append(prefix + name)
        for inner in _models_in(field.annotation):
            keys += all_keys(inner, f"{prefix}{name}.")
    return list(dict.fromkeys(keys))
