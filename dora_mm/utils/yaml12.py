"""YAML with plain scalars by the rules of YAML 1.2, and with the line number and duplicates of keys.

PyYAML follows YAML 1.1, where `no` is False, `1e-4` a string, `010` the number 8 and `2024-01-01` a date. ruamel.yaml
reads 1.2, but takes aliases and tags, writes what 1.1 reads as another type, and changes more of an edited document
than its values.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import yaml

KeyPath = tuple[str | int, ...]
MISSING: Any = object()  # the value of a key that is not there

_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)", "-+.0123456789"),
)


class Document(NamedTuple):
    """A parsed YAML document."""

    value: Any  # of plain Python types
    lines: dict[KeyPath, int]  # counted from 1
    duplicates: list[KeyPath]  # keys that occur more than once in their mapping


class Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's own class attribute)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if getattr(self.peek_event(), "tag", None):  # of text that is no number, say, or for dates and binary data
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="tags (!!name) are not allowed", problem_mark=mark)
        if self.check_event(yaml.AliasEvent):  # an alias can contain itself, or expand exponentially
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not allowed", problem_mark=mark)
        return super().compose_node(parent, index)


class Dumper(yaml.SafeDumper):
    """Quotes text that a reader of YAML 1.1 or 1.2 would take for another type."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)  # lists are indented under their key


for _tag, _pattern, _first in _SCALARS:
    for _class in (Loader, Dumper):
        _firsts = [*_first, ""] if _tag == "null" else list(_first)
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _firsts)


def _decimal(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    try:
        return int(loader.construct_scalar(node))
    except ValueError:  # Python reads no more than some thousand digits
        raise yaml.MarkedYAMLError(problem="a number has too many digits", problem_mark=node.start_mark) from None


Loader.add_constructor("tag:yaml.org,2002:int", _decimal)


def read(text: str) -> Document:
    """Parses one document.

    Raises:
        yaml.YAMLError: The text is not valid YAML, or uses aliases or tags.
    """
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return Document(None, {}, [])
        document = Document(loader.construct_document(node), {}, [])
        _collect(node, (), document.lines, document.duplicates)
        return document
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    finally:
        loader.dispose()


def write(value: Any) -> str:
    """Serializes a value of plain Python types; readers of YAML 1.1 and 1.2 read the same."""
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def edited(text: str, changes: Mapping[KeyPath, Any]) -> str:
    """A document with other values, and all else of it, comments included, as it was.

    Args:
        text: A document whose sections are mappings.
        changes: The new values by key path, which has the numbers of items of lists; MISSING removes the key. A key or
            section that is not there is added.
    """
    for path, value in changes.items():
        text = _edited(text, path, value)
    return text


def without_comment(text: str, path: KeyPath) -> str:
    """A document without the comment on the line of a key, where it has both."""
    line = read(text).lines.get(path)
    if line is None:
        return text
    lines = text.split("\n")
    lines[line - 1] = lines[line - 1].partition(" #")[0].rstrip()
    return "\n".join(lines)


def _edited(text: str, path: KeyPath, value: Any) -> str:
    section = yaml.compose(text, Loader)
    found = dict(_named(section)).get(path[0])
    for depth, name in enumerate(path[1:], 1):
        if found is None or not isinstance(found[1], yaml.CollectionNode):  # a section that is not there yet, or null
            path, value = path[:depth], _nested(path[depth:], value)
            break
        section = found[1]
        found = dict(_named(section)).get(name)
    if found is None and value is MISSING:
        return text
    if found is None and section.flow_style:
        at = _end(text, section) - 1
        return f"{text[:at]}{', ' if section.value else ''}{path[-1]}: {_inline(value)}{text[at:]}"
    if found is None:
        last_key, last = section.value[-1]
        at = _line_end(text, _end(text, last))
        return f"{text[:at]}\n{' ' * last_key.start_mark.column}{path[-1]}: {_inline(value)}{text[at:]}"
    key, node = found
    if value is MISSING:
        return text[: text.rindex("\n", 0, key.start_mark.index)] + text[_line_end(text, _end(text, node)) :]
    start, indent = node.start_mark.index, "\n" + " " * node.start_mark.column
    is_block = isinstance(node, yaml.SequenceNode) and not node.flow_style
    new = indent.join(f"- {_inline(item)}" for item in value) if is_block else _inline(value)
    return text[:start] + new + text[_end(text, node) :]


def _nested(path: KeyPath, value: Any) -> Any:
    """A value inside of mappings; MISSING stays what it is."""
    for key in reversed(path if value is not MISSING else ()):
        value = {key: value}
    return value


def _named(section: yaml.Node) -> Iterator[tuple[str | int, tuple[yaml.Node, yaml.Node]]]:
    """The keys or numbers of what a section holds, each with its nodes."""
    if isinstance(section, yaml.SequenceNode):
        yield from ((number, (node, node)) for number, node in enumerate(section.value))
    else:
        yield from ((key.value, (key, value)) for key, value in section.value)


def _end(text: str, node: yaml.Node) -> int:
    """The index of the end of a node; PyYAML lets a block reach to the next key."""
    while isinstance(node, yaml.CollectionNode) and not node.flow_style:
        last = node.value[-1]
        node = last[1] if isinstance(last, tuple) else last
    return node.end_mark.index


def _line_end(text: str, start: int) -> int:
    end = text.find("\n", start)
    return len(text) if end < 0 else end


def _inline(value: Any) -> str:
    """A value on one line."""
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return text.removesuffix("...\n").rstrip("\n")


def _collect(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], duplicates: list[KeyPath]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            child = (*path, key.value)
            if child in lines:  # the last one counts, as always in PyYAML
                duplicates.append(child)
                for known in [known for known in lines if known[: len(child)] == child]:
                    del lines[known]
            lines[child] = key.start_mark.line + 1
            _collect(value, child, lines, duplicates)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            _collect(item, (*path, index), lines, duplicates)
