"""The things that scenes are made of: what they are called, and in which colours each style shows them truthfully."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

__all__ = ["KINDS", "STYLES", "Thing", "dump_things", "read_things", "with_a"]

STYLES = ("flat", "twemoji", "noto", "contrast", "3d")
KINDS = {  # kind: its plural. A thing without a kind is never counted as one.
    "animal": "animals",
    "flower": "flowers",
    "fruit": "fruits",
    "vegetable": "vegetables",
    "vehicle": "vehicles",
    "tool": "tools",
    "instrument": "instruments",
    "ball": "balls",
}


@dataclass(frozen=True)
class Thing:
    """name, plural: what it is called. code: its emoji. kind: one of KINDS, or None.

    colors: style -> the colours that it may be painted in so that anybody would call it so. natural: style -> the
    colour of the icon as it is, only where one colour covers most of it and the list of things agrees.
    """

    name: str
    plural: str
    code: str
    kind: str | None = None
    colors: dict[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    natural: dict[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise ValueError(f"{self.name} is of kind {self.kind!r}, which is none of {', '.join(KINDS)}")
        object.__setattr__(self, "colors", {style: tuple(names) for style, names in self.colors.items()})


def read_things(path: Path) -> tuple[Thing, ...]:
    """The things of a JSONL file, in its order. Raises ValueError with file and line for a bad or repeated one."""
    things: list[Thing] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            things.append(Thing(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a thing ({error})") from error
        if things[-1].name in [thing.name for thing in things[:-1]]:
            raise ValueError(f"{path}, line {number}: {things[-1].name} stands there twice, and must be unique")
    return tuple(things)


def dump_things(things: Sequence[Thing]) -> str:
    rows = [{key: value for key, value in asdict(thing).items() if value not in (None, {})} for thing in things]
    return "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)


def with_a(words: str) -> str:
    """ "orange cat" -> "an orange cat": by its first letter, which is right for every name and colour used here."""
    return f"{'an' if words[0] in 'aeio' or words.startswith('umbrella') else 'a'} {words}"
