"""Turns pydantic's errors into messages that name the key, its location, and the probable correction."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic import Discriminator, ValidationError

from dora_mm.config.schema import Section, SectionChoice
from dora_mm.registries.other_trainers import key_of, other_meaning, outside
from dora_mm.registries.renamed import KEYS
from dora_mm.utils.messages import nearest
from dora_mm.utils.yaml12 import KeyPath

_WANTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "model_type": "a section of keys",
}


ANY_NAME = "*"  # in dotted keys


OF_A_KEY = "[key]"  # what pydantic appends to a location where not the value is wrong, but the name of its key


_TAGS = ("union_tag_invalid", "union_tag_not_found")  # the class of a section is not one that there is


class Problem(NamedTuple):
    """One problem of a config; as text, `where: key: message`."""

    where: str  # "line 7" or "--set lr=2"; empty if unknown
    key: str  # dotted; empty for the whole config
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in self if part)


def describe(error: ValidationError, schema: type[Section], origins: Mapping[KeyPath, str]) -> list[Problem]:
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
        location = _location(schema, item["loc"])
        path = (*location.path, location.choice.key) if location.choice and item["type"] in _TAGS else location.path
        # that of the key, or else of the closest section that contains it
        origin = next((origins[path[:length]] for length in range(len(path), 0, -1) if path[:length] in origins), "")
        key = dotted_key(path)
        message, example = _message(item, location, schema), _example(item, location)
        if example and origin.startswith("--set"):
            message += f": --set {shlex.quote(f'{key}={example}')}"
        elif example:
            message += f": such as {example}"
        problems.append(Problem(origin, key, message))
    return _without_repeated(problems)


def _without_repeated(problems: list[Problem]) -> list[Problem]:
    """The problems but those of a key that is named already, or of the list that such a key is in."""
    found: list[Problem] = []
    for problem in problems:
        if not any(f"{other.key}[".startswith(f"{problem.key}[") for other in found):
            found.append(problem)
    return found


def dotted_key(path: KeyPath) -> str:
    """A key path as text, such as sample.seeds[0]."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def _message(item: Any, location: _Location, schema: type[Section]) -> str:
    kind, given, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "extra_forbidden":
        return _of_another_class(location) or f"unknown key{_suggestion(location, schema)}"
    if kind in _TAGS and location.choice:
        given, kind = given[location.choice.key], "literal_error"
        context = {"expected": " or ".join(map(repr, location.choice.classes))}
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        quoted = context["expected"].split("'")[1::2]
        return f"must be {context['expected']}, got {given!r}{nearest(str(given), quoted)}"
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


def _example(item: Any, location: _Location) -> str:
    """A valid value to suggest for a key instead of one of another type; empty if none is known."""
    kind, given = item["type"], item["input"]
    if kind == "tuple_type" and isinstance(given, str | int | float) and not _is_section(_inside(location.value, 0)):
        return f"[{', '.join(part.strip() for part in str(given).split(','))}]"
    if kind == "model_type" and _is_section(location.value):
        return _example_of_section(location.value, given)
    if kind == "float_type" and isinstance(location.default, float):
        return f"{location.default:g}"
    return ""


def _example_of_section(section: type[Section], given: Any) -> str:
    """A section with one key that may be given alone; empty where it needs others."""
    defaults = {name: field.default for name, field in section.model_fields.items()}
    if any(field.is_required() for field in section.model_fields.values()):
        return ""
    if section.exclusive and type(given) is float:  # of data.valid: a share
        return f"{{{section.exclusive[0][0]}: {given:g}}}"
    return next((f"{{{k}: {'true' if v is False else v}}}" for k, v in defaults.items() if v not in (None, ())), "{}")


def _suggestion(location: _Location, schema: type[Section]) -> str:
    """Suggests a similar key of the same section, else the same key in another section, else lists the keys."""
    name = str(location.path[-1])
    if now := KEYS.get(_pipeline_of(schema), {}).get(dotted_key(location.path)):
        return f", which is called {now} now"
    siblings = list(location.section.model_fields) if location.section else []
    others = (
        [key for section in location.choice.classes.values() for key in section.model_fields] if location.choice else []
    )
    elsewhere = [key for key in all_keys(schema) if key.split(".")[-1] == name and ANY_NAME not in key]
    if not elsewhere and (ours := key_of(name)) in all_keys(schema):
        return f", which is {ours} here{other_meaning(name)}"
    if not elsewhere and (use := outside(name)):
        return f": {use}"
    if close := nearest(name, siblings) or nearest(name, others):
        return close
    if elsewhere:
        return f", did you mean {elsewhere[0]!r}?"
    return f"; this section has {', '.join(siblings)}" if siblings else ""


def _pipeline_of(schema: type[Section]) -> str:
    """The recipe that a schema is of; empty for a section."""
    field = schema.model_fields.get("pipeline")
    return str(get_args(field.annotation)[0]) if field and get_args(field.annotation) else ""


def _of_another_class(location: _Location) -> str:
    """The problem of a key that only another class of its section has; empty if none has it."""
    if location.choice is None:
        return ""
    key, classes = location.choice
    others = [tag for tag, section in classes.items() if location.path[-1] in section.model_fields]
    chosen = next(tag for tag, section in classes.items() if section is location.section)
    return f"is for {key} {' and '.join(others)}, not {chosen}" if others else ""


class _Choice(NamedTuple):
    """The classes that a section may have, by tag, and the key that chooses one."""

    key: str
    classes: Mapping[str, type[Section]]


class _Location(NamedTuple):
    """The location of an error in a schema.

    Attributes:
        path: The key path, without the tags that pydantic adds for the class of a section.
        section: The section that has the last key, or would have it; None: there is none, as for an item of a list.
        choice: The classes of that section, or of the value where the error is, where there are several.
        value: The type of the value; None where it is not known.
        default: The default of the last key; None where there is none.
    """

    path: KeyPath
    section: type[Section] | None
    choice: _Choice | None
    value: Any
    default: Any


def _location(schema: type[Section], location: Sequence[str | int]) -> _Location:
    path: list[str | int] = []
    value: Any = schema  # the type of what the next part of the location is in
    section = choice = chosen = section_choice = None
    for part in location:
        if choice is not None and part in choice.classes:
            value, chosen, choice = choice.classes[str(part)], choice, None
            continue
        if part == OF_A_KEY or _is_alternative(value, part):
            continue
        path.append(part)
        section, section_choice = (value if _is_section(value) else None), chosen
        value, chosen = _inside(value, part), None
        choice = _choice_in(value)
    field = section.model_fields.get(str(path[-1])) if section and path else None
    return _Location(tuple(path), section, choice or section_choice, value, field and field.default)


def _is_alternative(value: Any, part: str | int) -> bool:
    """Whether a part of pydantic's location is one of several types of a value, such as float and dict[str,float]."""
    keys = [name for section in sections_in(value) for name in section.model_fields]
    return get_origin(value) in (Union, UnionType) and isinstance(part, str) and part not in ("", *keys)


def sections_at(schema: type[Section], path: Iterable[str | int]) -> list[type[Section]]:
    """The classes that the section at a key path may have; empty: there is no section."""
    value: Any = schema
    for part in path:
        value = _inside(value, part)
    if choice := _choice_in(value):
        return list(choice.classes.values())
    return [value] if _is_section(value) else []


def _inside(annotation: Any, part: str | int) -> Any:
    """The type of a key of a section, or of an item of a list or mapping; None: there is no such key."""
    if _is_section(annotation):
        if (field := annotation.model_fields.get(part)) is None:
            return None
        return _without_null(Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation)
    arguments = get_args(annotation)
    return _without_null(arguments[-1] if get_origin(annotation) is dict else arguments[0]) if arguments else None


def _without_null(annotation: Any) -> Any:
    """A type without None, and without metadata other than what chooses a class."""
    if get_origin(annotation) is Annotated and _choice_in(annotation) is None:
        return _without_null(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        others = [argument for argument in get_args(annotation) if argument is not NoneType]
        return _without_null(others[0]) if len(others) == 1 else annotation
    return annotation


def _choice_in(annotation: Any) -> _Choice | None:
    """The choice of a type such as `Annotated[A | B, Discriminator(...)]`."""
    for mark in getattr(annotation, "__metadata__", ()):
        if isinstance(mark, Discriminator):
            chosen_by: SectionChoice = mark.discriminator.__self__  # type: ignore[union-attr]
            members = [get_args(member) for member in get_args(get_args(annotation)[0])]
            return _Choice(chosen_by.key, {tag.tag: section for section, tag in members})
    return None


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def sections_in(annotation: Any) -> list[type[Section]]:
    """The sections in a type such as Section, Section | None, tuple[Section, ...] or one of several classes."""
    if _is_section(annotation):
        return [annotation]
    return [section for argument in get_args(annotation) for section in sections_in(argument)]


def all_keys(schema: type[Section], prefix: str = "") -> list[str]:
    """All dotted keys of a schema, sections included, each with `prefix` in front; `*` is any name of a section."""
    keys: dict[str, None] = {}
    for name, field in schema.model_fields.items():
        keys[prefix + name] = None
        any_name = f"{ANY_NAME}." if get_origin(field.annotation) is dict else ""
        for section in sections_in(field.annotation):
            keys |= dict.fromkeys(all_keys(section, f"{prefix}{name}.{any_name}"))
    return list(keys)
