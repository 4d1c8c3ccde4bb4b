"""Makes the rows of a tool in `dora_mm/formats/naming/known.csv` again, from a checkout of the tool.

    python -m tests.formats.known_names comfyui CHECKOUT "2026-08 (783545f)"

The tool's own code says which names it reads: it is imported from the checkout, where nothing else of it runs.
`diffusers` is the installed one, whatever the checkout.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from importlib import import_module
from pathlib import Path

from dora_mm.formats.naming.known import ALL, BUT, NOT_A, RAISES, TABLE, Row, kind_of
from tests.formats.known_names.cases import Case, cases, file_of, paths_of
from tests.formats.known_names.networks import TINY

_HERE = "tests.formats.known_names"
TOOLS = {  # by the tool: the place of its loader
    "comfyui": f"{_HERE}.comfyui:ComfyUI",
    "forge": f"{_HERE}.comfyui:Forge",
    "a1111": f"{_HERE}.webuis:Automatic1111",
    "sdnext": f"{_HERE}.webuis:SDNext",
    "invokeai": f"{_HERE}.invokeai:InvokeAI",
    "onetrainer": f"{_HERE}.onetrainer:OneTrainer",
    "musubi": f"{_HERE}.musubi:Musubi",
    "diffusers": f"{_HERE}.libraries:Diffusers",
}
STATED = {"diffusers": ("any", "clip", "processor")}  # what no loader is asked: other tests run it
Loader = Callable[
    [Case, Collection[str], str], set[str]
]  # of a case, some of its paths and a form: those that are read


def rows_of(tool: str, source: str, loader: Loader, forms: Collection[str] = ("down alpha",)) -> Iterator[Row]:
    """The rows of a tool; none that says only what another one of the prefix says."""
    for architecture in TINY:
        found = {
            (case, form): kinds_read(case, tried(case, loader), loader, form)
            for case in cases(architecture)
            for form in forms
        }
        for (case, form), (read, raises, lost) in found.items():
            same = [found[case, other] for other in forms]
            any_form = len(forms) == 1 or all(other == same[0] for other in same)
            not_A = tool != "diffusers" and len({found[case, each] for each in forms if not each.startswith("A")}) == 1
            covered = form != forms[0] and (any_form or (not_A and not form.startswith("A")))
            if not read & kinds_of_layers(case) or covered:
                continue
            same = [each for each in found if each[1] == form and each[0].prefix == case.prefix and each[0] != case]
            others = [found[each][0] for each in same]
            if not any(read < kinds or (read == kinds and case.names == "own") for kinds in others):
                shown = "" if any_form else NOT_A if not_A and form == forms[0] else form
                modules = modules_of(case, read, tried(case, loader))
                yield Row(tool, source, architecture, case.prefix, case.names, shown, lost, raises, modules)


def kinds_read(case: Case, paths: Collection[str], loader: Loader, form: str) -> tuple[frozenset[str], str, str]:
    """The paths that a tool reads, with `#` for numbers; `raises` where it does so only without others; what it loses.

    A path stands for all that differ from it in numbers, so that one is read only where all of these are.
    """
    known = loader(case, paths, form) if paths else set()
    alone: set[str] = set()
    if not known and getattr(loader, "raises", False):
        kinds = {kind_of(path): path for path in paths}
        single = {kind for kind, path in kinds.items() if loader(case, [path], form)}
        alone = {path for path in paths if kind_of(path) in single}
        alone = alone if alone and loader(case, alone, form) == alone else set()
    known |= alone
    is_known: dict[str, list[bool]] = defaultdict(list)
    for path in paths:
        is_known[kind_of(path)].append(path in known)
    some = sorted(kind for kind, found in is_known.items() if any(found) and not all(found))
    if some:
        print(f"{case}: of {' '.join(some)} only some are read, and count as not known", file=sys.stderr)
    read = frozenset(kind for kind, found in is_known.items() if all(found))
    return read, RAISES if alone else "", getattr(loader, "lost", "")


def kinds_of_layers(case: Case) -> frozenset[str]:
    """The paths that stand for layers, and not for norms."""
    tensors, _ = file_of(case, "A", list(paths_of(case)))
    return frozenset(kind_of(path) for path in paths_of(case) if f"{case.key(path)}.lora_A.weight" in tensors)


def tried(case: Case, loader: Loader) -> list[str]:
    """The paths of a case that a tool is asked for: norms have no LoRA, which is all that some tools read."""
    paths = list(paths_of(case))
    if not getattr(loader, "layers_alone", False):
        return paths
    tensors, _ = file_of(case, "A", paths)
    return [path for path in paths if f"{case.key(path)}.lora_A.weight" in tensors]


def modules_of(case: Case, read: frozenset[str], paths: Collection[str]) -> str:
    """The paths that are read, as a row has them: in the shortest way.

    Modules that the tiny networks have not count as read where all others are.
    """
    missing = {kind_of(path) for path in paths} - read
    if not missing:
        return ALL
    return min(BUT + " ".join(sorted(missing)), " ".join(sorted(read)), key=len)


def write(tool: str, rows: Collection[Row]) -> None:
    """Puts the rows of a tool into the table, in place of the old ones but for those that are stated by hand."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        others = [Row(*row) for row in list(csv.reader(file))[1:]]
    order = list(TINY)
    stated = STATED.get(tool, ("any", "flat clip"))
    found = [*(row for row in others if row.tool != tool or row.names in stated), *rows]
    found.sort(key=lambda row: (row.tool, order.index(row.architecture) if row.architecture in order else -1))
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([Row._fields, *found])


def main(tool: str, checkout: str, source: str) -> None:
    """Makes the rows of a tool."""
    module, _, name = TOOLS[tool].partition(":")
    loader = getattr(import_module(module), name)(Path(checkout))
    write(tool, list(rows_of(tool, source, loader, getattr(loader, "forms", ("down alpha",)))))


if __name__ == "__main__":
    main(*sys.argv[1:])
