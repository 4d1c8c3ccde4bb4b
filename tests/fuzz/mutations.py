"""What is done to files: bits and slices of any, values of JSON, headers of safetensors, what is inside of archives."""

import gzip
import io
import json
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import yaml

Change = Callable[[bytes, Random], bytes]
DEEP = 100_000
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 1.5, 1e308, float("nan"), float("inf"), 10**25, -(2**63), 2**31),
    *("", " ", "\0", "\x1b[2J", "\u202e", "\ud800", "a" * 5000, "²", "1" * 5000, "../../etc/passwd", "/etc/passwd"),
    *("owner/name", "latest", "nan", "~nobody/x", "{}", "[[[", "!!float abc", "0-99999999", "1e9999", "file\nfile"),
    *([], {}, [[1]], [None], {"": 0}, {"a": {"b": [1, 2]}}, [1] * 3000, {str(n): n for n in range(3000)}),
)
TOKENS = (
    *(b"[" * DEEP, b'{"a":' * 1000, b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n\n", b'"', b"'", b",", b"\t"),
    *(b"!!timestamp zz", b"&a [*a]", b"<<: *x", b"- ", b": ", b"#", b"{{", b"=", b"=1+1", b"9" * 5000, b"NaN", b"-0"),
)


def mutated(name: str, content: bytes, random: Random, more: Sequence[Change] = ()) -> bytes:
    """Other content of a file, by the end of its name, and by more changes where it is of a special kind."""
    changes = [*CHANGES.get(Path(name).suffix, []), *more]
    change = random.choice([*changes, *changes, _bytes])  # what keeps the form goes deeper
    for _ in range(1 + (random.random() < 0.3)):
        content = change(content, random)
    return content


def _bytes(content: bytes, random: Random) -> bytes:
    found = bytearray(content)
    first, last = sorted(random.randrange(len(found) + 1) for _ in range(2))
    kind = random.randrange(7)
    if kind == 0 and found:
        for _ in range(random.choice((1, 1, 3, 30))):
            found[random.randrange(len(found))] ^= 1 << random.randrange(8)
    elif kind == 1:
        del found[first:]
    elif kind == 2:
        del found[first : min(last, first + 64)]
    elif kind == 3:
        found[first:first] = found[first:last][:4096]
    elif kind == 4:
        found[first : first + random.randrange(8)] = random.choice(TOKENS)
    elif kind == 5:
        found[first : first + 8] = random.randbytes(8)
    else:
        found[first : first + 8] = random.choice((0, 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1)).to_bytes(8, "little")
    return bytes(found)


def _json(content: bytes, random: Random) -> bytes:
    try:
        return _dumped(changed_value(json.loads(content), random))
    except (ValueError, RecursionError):
        return _bytes(content, random)


def _lines(content: bytes, random: Random) -> bytes:
    lines = content.split(b"\n")
    place = random.randrange(len(lines))
    lines[place] = random.choice((_json, _json, _bytes))(lines[place], random)
    return b"\n".join(lines)


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()  # halves of surrogate pairs stay escapes


def changed_value(value: Any, random: Random) -> Any:
    """A JSON value with another one at a random place, or a key less, more, or another."""
    if isinstance(value, str) and value[:1] in ("{", "[") and random.random() < 0.8:
        try:  # JSON in a text of a header
            return json.dumps(changed_value(json.loads(value), random))
        except (ValueError, RecursionError):
            return random.choice(HOSTILE)
    if not isinstance(value, dict | list) or not value or random.random() < 0.1:
        return _number_near(value, random)
    found = dict(value) if isinstance(value, dict) else list(value)
    key = random.choice(list(found) if isinstance(found, dict) else range(len(found)))
    kind = random.random()
    if kind < 0.1:
        del found[key]
    elif kind < 0.2 and isinstance(found, dict):
        found[str(random.choice(HOSTILE))[:50]] = found.pop(key) if random.random() < 0.5 else random.choice(HOSTILE)
    elif kind < 0.25 and isinstance(found, list):
        found *= random.choice((2, 100))
    else:
        found[key] = changed_value(found[key], random)
    return found


def _number_near(value: Any, random: Random) -> Any:
    if type(value) in (int, float) and random.random() < 0.5:
        return random.choice((value + 1, -value, value * 2, value * 10**6, str(value), float(value)))
    return random.choice(HOSTILE)


def _header(content: bytes, random: Random) -> bytes:
    """A safetensors file with another header of the right length."""
    size = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + size])
    except (ValueError, RecursionError):
        return _bytes(content, random)
    if isinstance(header, dict) and "__metadata__" in header and random.random() < 0.5:
        header["__metadata__"] = changed_value(header["__metadata__"], random)
    else:
        header = changed_value(header, random)
    text = _dumped(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _values(content: bytes, random: Random) -> bytes:
    """A safetensors file with other values: NaN, infinity, huge ones."""
    start = 8 + int.from_bytes(content[:8], "little")
    place = random.randrange(start, len(content) - 3) if len(content) > start + 4 else start
    return (
        content[:place] + random.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f")) + content[place + 4 :]
    )


def _archive(content: bytes, random: Random) -> bytes:
    """A zip file with one of its members changed."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError):
        return _bytes(content, random)
    name = random.choice(list(members))
    members[name] = _bytes(members[name], random)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, inner in members.items():
            archive.writestr(name, inner)
    return file.getvalue()


def _packed(content: bytes, random: Random) -> bytes:
    try:
        return gzip.compress(_lines(gzip.decompress(content), random), 1, mtime=0)
    except (OSError, EOFError):
        return _bytes(content, random)


def placed(values: Sequence[Any]) -> Change:
    """A change of JSON: one of these values at a random place."""

    def change(content: bytes, random: Random) -> bytes:
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            return _bytes(content, random)
        parent, keys = found, _keys(found)
        while keys:
            key = random.choice(keys)
            if not (keys := _keys(parent[key])) or random.random() < 0.2:
                parent[key] = random.choice(values)
                break
            parent = parent[key]
        return _dumped(found)

    return change


def _keys(value: Any) -> list[Any]:
    return list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []


def inserted(pieces: Sequence[str]) -> Change:
    """A change of a chat template: a piece between two of its tags, or in the place of one, or one less, or twice."""

    def change(content: bytes, random: Random) -> bytes:
        parts = re.split(rb"(\{[{%#].*?[}%#]\})", content, flags=re.DOTALL)
        place, piece = random.randrange(len(parts)), random.choice(pieces).encode()
        kind = random.randrange(4)
        if kind == 3:
            parts[place:place] = [parts[random.randrange(len(parts))]]
        else:
            parts[place : place + (kind > 0)] = [piece] * (kind < 2)
        return b"".join(parts)

    return change


def other_yaml(content: bytes, random: Random) -> bytes:
    try:
        return _dumped(changed_value(yaml.safe_load(content), random))  # JSON is YAML
    except (ValueError, TypeError, RecursionError, yaml.YAMLError):
        return _bytes(content, random)


def _table(content: bytes, random: Random) -> bytes:
    """A table with tabs with another cell, a row less or twice, or a cell more."""
    rows = [line.split(b"\t") for line in content.split(b"\n")]
    row = random.choice(rows)
    kind = random.randrange(5)
    if kind == 0:
        rows.remove(row)
    elif kind == 1:
        rows.append(row)
    elif kind == 2:
        row.insert(random.randrange(len(row) + 1), b"A")
    else:
        row[random.randrange(len(row))] = random.choice(
            (*TOKENS, *(str(value).encode("utf-8", "surrogatepass") for value in HOSTILE))
        )
    return b"\n".join(map(b"\t".join, rows))


CHANGES: dict[str, list[Change]] = {
    ".json": [_json],
    ".jsonl": [_lines],
    ".safetensors": [_header, _header, _values],
    ".npz": [_archive],
    ".xlsx": [_archive],
    ".gz": [_packed],
    ".tsv": [_table],
}
