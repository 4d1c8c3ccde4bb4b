"""Which names of modules the tools read: `known.csv`, a row for each tool, architecture and way to spell names.

    tool, source    the tool, and the release or commit of its code that the row comes from
    architecture    a key of `LAYOUTS`; `*` for all of which the tool has no rows
    prefix          what the names begin with; behind one that ends with `_`, the dots of the path are underscores
    names           whose the paths are: see `PATHS`; `any` for those of the model, whatever they are
    form            the tensors of the modules, where names are read in some forms only: see `form_of`; `not A` for all
                    without lora_A
    lost            the roles of tensors that the tool does not read in this form
    others          `raises` where it loads nothing of a file that has other names, too
    modules         the paths that it reads, with `#` for numbers: `all`, `all but ...` or a list

What has no row is not known to the tool. `tests/formats/known_names` makes the table from checkouts of the tools, whose
own code says it, and holds the rows of diffusers, PEFT and LyCORIS equal to what these do.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from dora_mm.formats.naming.layouts import LAYOUTS
from dora_mm.formats.naming.names import TEXT_PREFIX, expanded, underscored

TABLE = Path(__file__).with_name("known.csv")
ALL, BUT, ANY, RAISES, NOT_A = "all", "all but ", "any", "raises", "not A"
_FUSED = re.compile(r".*\.to_(added_)?qkv$")
_PROCESSOR = re.compile(r"(.*attn\d)\.(to_(?:q|k|v|out))(?:\.\d)?$")

_FORMS = {
    "A": r"lora_A\.weight",
    "down": r"lora_down\.weight",
    "old": r"(lora(_linear_layer)?\.)?down(\.weight)?",
    "lokr": r"lokr_\w+",
}


class Row(NamedTuple):
    """A row of the table."""

    tool: str
    source: str
    architecture: str
    prefix: str
    names: str
    form: str
    lost: str
    others: str
    modules: str


class Reading(NamedTuple):
    """The modules of a file that a tool reads, by their names.

    Attributes:
        lost: By the module that it knows: the roles of tensors that it does not read.
        raises: Whether it loads nothing where there is a module that it does not know.
    """

    lost: Mapping[str, frozenset[str]]
    raises: bool


def reading(tool: str, architecture: str | None, modules: Mapping[str, Collection[str]]) -> Reading:
    """Looks up the modules of a file that a tool reads.

    Args:
        tool: Its name in the table.
        architecture: That of the model; None where it is none of `LAYOUTS`.
        modules: The ends of the keys by the name of a module, of the whole file.
    """
    table = _known(tool, architecture or "*") or _known(tool, "*")
    forms: dict[str, str] = {}  # of the modules that begin with a prefix
    for prefix in {row.prefix for row, _ in table}:
        here = [endings for module, endings in modules.items() if module.startswith(prefix)]
        forms[prefix] = form_of({ending for endings in here for ending in endings})
    found: dict[str, frozenset[str]] = {}
    raises = False
    for module in modules:
        for row, kinds in table:
            rest = module.removeprefix(row.prefix)
            fits = _has_form(row, forms[row.prefix]) and module.startswith(row.prefix)
            if fits and (kinds is None or _kind(rest, row.prefix) in kinds):
                found[module] = frozenset(row.lost.split())
                raises |= row.others == RAISES
                break
    return Reading(found, raises)


def form_of(endings: Collection[str]) -> str:
    """The form of a file from the ends of its keys, with the tensors besides A and B.

    `A` stands for lora_A, `down` for lora_down, `old` for what diffusers wrote in 2023, `lokr`; `other` for several of
    them, or none.
    """
    found = [name for name, text in _FORMS.items() if any(re.fullmatch(text, ending) for ending in endings)]
    found = found if len(found) == 1 else ["other"]
    found += ["alpha"] if "alpha" in endings else []
    return " ".join(found + (["magnitude"] if any("magnitude" in ending for ending in endings) else []))


def _has_form(row: Row, form: str) -> bool:
    return row.form in ("", form) or (row.form == NOT_A and not form.startswith("A"))


def kind_of(path: str) -> str:
    """A path with `#` for its numbers."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "#", path)


def _kind(rest: str, prefix: str) -> str:
    return re.sub(r"(?<![^_])\d+(?![^_])", "#", rest) if prefix.endswith("_") else kind_of(rest)


# --- whose paths -----------------------------------------------------------------------------------------------------


def _own(architecture: str) -> Iterator[str]:
    rules = LAYOUTS[architecture].names
    return (rule for rule in rules if ".processor." not in rule and not _FUSED.match(rule))


def _diffusers(architecture: str) -> Iterator[str]:
    return (path for meaning in LAYOUTS[architecture].names.values() for path in expanded(meaning))


def _parts(architecture: str) -> Iterator[str]:
    return (f"{rule}.0" for rule in _own(architecture) if "{" in LAYOUTS[architecture].names[rule])


def _processor(architecture: str) -> Iterator[str]:
    found = map(_PROCESSOR.match, _diffusers(architecture))
    return (f"{match[1]}.processor.{match[2]}_lora" for match in found if match)


PATHS: Mapping[str, Callable[[str], Iterator[str]]] = {
    "own": _own,  # of the authors' own code
    "diffusers": _diffusers,
    "fused": lambda architecture: filter(_FUSED.match, LAYOUTS[architecture].names),  # of diffusers, fused
    "parts": _parts,  # a fused own path with the number of a part (OneTrainer)
    "processor": _processor,  # of diffusers in 2023
    "xlabs": lambda architecture: (rule for rule in LAYOUTS[architecture].names if ".processor." in rule),
    "clip": lambda architecture: _diffusers("clip-l"),  # of transformers
    "flat clip": lambda architecture: (path.removeprefix(TEXT_PREFIX) for path in _diffusers("clip-l")),  # of its 5.6
}


@cache
def kinds_of(architecture: str, names: str) -> frozenset[str]:
    """The paths of an architecture, with `#` for numbers."""
    return frozenset(kind_of(path) for path in PATHS[names](architecture))


# --- the table -------------------------------------------------------------------------------------------------------


@cache
def rows() -> tuple[Row, ...]:
    """The rows of the table."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        header, *found = csv.reader(file)
    assert tuple(header) == Row._fields
    return tuple(Row(*row) for row in found)


@cache
def _known(tool: str, architecture: str) -> tuple[tuple[Row, frozenset[str] | None], ...]:
    """The rows of a tool and an architecture, those of the longest prefix first, with the paths that it reads."""
    found = [row for row in rows() if (row.tool, row.architecture) == (tool, architecture)]
    return tuple((row, _spelled(row)) for row in sorted(found, key=lambda row: -len(row.prefix)))


def _spelled(row: Row) -> frozenset[str] | None:
    """The paths of a row as they stand behind its prefix; None for any."""
    if row.names == ANY:
        return None
    listed = row.modules.removeprefix(BUT).split()
    if row.modules == ALL or row.modules.startswith(BUT):
        found = kinds_of(row.architecture, row.names) - set(listed if row.modules != ALL else ())
    else:
        found = frozenset(listed)
    flat = row.prefix.endswith("_")  # where `linear_1` cannot be told from `linear.1`
    return frozenset(_kind(underscored(path), row.prefix) for path in found) if flat else found
