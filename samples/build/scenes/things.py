"""The objects in scenes: their names, and the colours in which each style shows them recognisably."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

STYLES = ("flat", "twemoji", "noto", "contrast", "3d")
KINDS = {  # kind: its plural; an object without a kind is never counted as one
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
    """An object that scenes can contain.

    Attributes:
        name: Its name.
        plural: The plural of its name.
        code: The code points of its emoji.
        kind: One of KINDS, or None.
        colors: Style -> the colours in which it may be painted, because its icon then clearly has this colour.
        natural: Style -> the colour of the original icon, if one colour covers most of it and samples/things.jsonl
            names the same colour.
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
    """The objects in a JSONL file, in its order.

    Raises:
        ValueError: A line is not a valid object, or a name is repeated; the message names file and line.
    """
    things: list[Thing] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            things.append(Thing(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a valid object ({error})") from error
        if things[-1].name in [thing.name for thing in things[:-1]]:
            raise ValueError(f"{path}, line {number}: {things[-1].name} is repeated but must be unique")
    return tuple(things)


def dump_things(things: Sequence[Thing]) -> str:
    """The content of a JSONL file that `read_things` reads."""
    rows = [{key: value for key, value in asdict(thing).items() if value not in (None, {})} for thing in things]
    return "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)


def with_a(words: str) -> str:
    """Adds an article by the first letter, which is correct for all names used here: "an orange cat"."""
    return f"{'an' if words[0] in 'aeio' or words.startswith('umbrella') else 'a'} {words}"
