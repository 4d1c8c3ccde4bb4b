"""The schemas of configs for people and editors: a sentence for each key, and the JSON schema of all pipelines.

The sentences are the comments of the schema classes, in front of a key or behind it, so that they stand in one place.
"""

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from functools import cache
from math import inf
from typing import Any

from pydantic.json_schema import JsonSchemaMode, models_json_schema

from dora_mm.config.pipelines import SCHEMAS
from dora_mm.config.report import sections_in
from dora_mm.config.schema import PipelineConfig, Section

DIALECT = "https://json-schema.org/draft/2020-12/schema"
REQUIRED = "required"


@cache
def descriptions_of(section: type[Section]) -> Mapping[str, str]:
    """The comment of each key of a section, as one line; keys without a comment are left out."""
    found: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if issubclass(base, Section) and base is not Section:
            found |= _comments_of(base)
    return {key: text for key, text in found.items() if key in section.model_fields}


def json_schema(schemas: Mapping[str, type[PipelineConfig]] = SCHEMAS) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of the config files of all pipelines, chosen by the key `pipeline`."""
    named: list[tuple[type[PipelineConfig], JsonSchemaMode]] = [(each, "validation") for each in schemas.values()]
    references, definitions = models_json_schema(named)
    cases = [_case(name, references[schema, "validation"]["$ref"]) for name, schema in schemas.items()]
    found = definitions["$defs"]
    for section in {each for schema in schemas.values() for each in sections_of(schema)}:
        if section.__name__ in found:
            _describe(found[section.__name__], section)
    return {
        "$schema": DIALECT,
        "title": "A config of dora_mm",
        "type": "object",
        REQUIRED: ["pipeline"],
        "properties": {"pipeline": {"enum": list(schemas), "description": "the recipe that reads this config"}},
        "allOf": cases,
        "$defs": found,
    }


def _case(name: str, reference: str) -> dict[str, Any]:
    return {"if": {"properties": {"pipeline": {"const": name}}, REQUIRED: ["pipeline"]}, "then": {"$ref": reference}}


def _describe(found: dict[str, Any], section: type[Section]) -> None:
    """Adds the comments of a section to its keys; the name of a config is that of its file, where it has none.

    A default that its own bounds exclude stands for a value that follows from other keys: it is left out.
    """
    keys = found.get("properties", {})
    for key, text in descriptions_of(section).items():
        if key in keys:
            keys[key]["description"] = text
    for value in keys.values():
        if "exclusiveMinimum" in value and value.get("default", inf) <= value["exclusiveMinimum"]:
            del value["default"]
    if issubclass(section, PipelineConfig) and "name" in found.get(REQUIRED, ()):
        found[REQUIRED].remove("name")


def sections_of(section: type[Section]) -> Iterator[type[Section]]:
    """A section and all sections in it."""
    yield section
    for field in section.model_fields.values():
        for inner in sections_in(field.annotation):
            yield from sections_of(inner)


def _comments_of(section: type[Section]) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(section))
    lines = source.split("\n")
    comments = {token.start[0]: token for token in _comments(source)}
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above = []
            number = node.lineno - 1
            while number in comments and lines[number - 1].lstrip().startswith("#"):
                above.insert(0, comments[number])
                number -= 1
            behind = [comments[each] for each in range(node.lineno, (node.end_lineno or 0) + 1) if each in comments]
            texts = [" ".join(filter(None, map(_text, tokens))) for tokens in (above, behind)]
            if text := "; ".join(filter(None, texts)):
                found[node.target.id] = text
    return found


def _comments(source: str) -> Iterator[tokenize.TokenInfo]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return (token for token in tokens if token.type == tokenize.COMMENT)


def _text(token: tokenize.TokenInfo) -> str:
    """A comment without its mark, and without notes to checkers."""
    return " ".join(
        part.strip()
        for part in token.string.split("#")
        if part.strip() and not part.strip().startswith(("type:", "noqa", "pyright:"))
    )
