"""docs/keys.md: every key of every config, from the JSON schema; `python -m tests.documented.keys` writes it."""

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dora_mm.config.descriptions import json_schema
from dora_mm.config.pipelines import SCHEMAS

PAGE = Path(__file__).parents[2] / "docs" / "keys.md"
HEAD = """\
# Every key

The keys of all configs, from the schemas that check them: type, default, and what a key does. A key without a default
must be given. `dora-mm schema` prints the same for editors ([editors and shells](install.md#editors-and-shells)). What
keys are for, with commands, is on the pages of [training](train_images.md), [data](image_data.md),
[generating](generate_images.md), [scores](score_images.md) and [vision-language models](vlm.md).

"""
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
LARGEST = 2**31  # a bound that is no rule of ours


def page() -> str:
    """The page: a chapter per pipeline, and one per section."""
    schema = json_schema()
    sections = schema["$defs"]
    names = {record.__name__ for record in SCHEMAS.values()}
    pipelines = [chapter("##", name, sections[record.__name__]) for name, record in SCHEMAS.items()]
    others = [chapter("###", name, section) for name, section in sections.items() if name not in names]
    linked = textwrap.fill(" · ".join(f"[{name}](#{name})" for name in SCHEMAS), 120)
    return HEAD + "\n".join([f"{linked} ·\n[sections](#sections)\n", *pipelines, "## Sections\n", *others])


def chapter(mark: str, name: str, section: dict[str, Any]) -> str:
    """The heading and the table of a pipeline or a section."""
    required = section.get("required", ())
    about = section.get("description", "").partition("\n")[0]
    keys = {key: value for key, value in section.get("properties", {}).items() if key != "pipeline"}
    rows = [row(key, value, key in required) for key, value in keys.items()]
    table = "\n".join(["| key | type | default | |", "|---|---|---|---|", *rows])
    return "\n\n".join([f"{mark} {name}", *([about] if about else []), table]) + "\n"


def row(key: str, value: dict[str, Any], required: bool) -> str:
    default = "" if required or "default" not in value else default_text(value["default"])
    cells = [f"`{key}`", " or ".join(dict.fromkeys(types(value))), default, value.get("description", "")]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def types(value: dict[str, Any]) -> Iterator[str]:
    """The types that a value may have, as words; a section as a link."""
    for each in value.get("anyOf", value.get("oneOf", [value])):
        if "$ref" in each:
            name = each["$ref"].rpartition("/")[2]
            yield f"[{name}](#{name.lower()})"
        elif "const" in each:
            yield f"`{each['const']}`"
        elif "enum" in each:
            yield ", ".join(f"`{word}`" for word in each["enum"])
        elif each.get("type") == "array":
            inner = each.get("items") or (each.get("prefixItems") or [{}])[0]
            yield f"list of {' or '.join(dict.fromkeys(types(inner)))}"
        elif each.get("type") == "null":
            yield "null"
        elif isinstance(each.get("additionalProperties"), dict):
            yield f"mapping to {' or '.join(dict.fromkeys(types(each['additionalProperties'])))}"
        elif "anyOf" in each:
            yield from types(each)
        else:
            bounds = [f"{word} {each[key]:g}" for key, word in BOUNDS.items() if abs(each.get(key, LARGEST)) < LARGEST]
            yield " ".join([each.get("type", "any").replace("object", "mapping"), ", ".join(bounds)]).strip()


def default_text(value: Any) -> str:
    """A default as configs have it; of a section its own table has the defaults."""
    if isinstance(value, dict):
        return "its defaults" if value else ""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
