"""The manifest of a run that generates images, with a line of JSON per image, and how replaced ones are kept."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from dora_mm.utils.atomic import write_text
from dora_mm.utils.folders import link_or_copy, written_at_once
from dora_mm.utils.json_text import parse_json

MANIFEST = "manifest.jsonl"
EARLIER = "earlier"  # the folder in a run of images that were replaced, by number


@dataclass(frozen=True)
class ManifestEntry:
    """One image of a run.

    Attributes:
        row: The number of its row in the job, from 1.
        file: Its path, relative to the run directory.
        status: "done"; "failed", with a reason; or "missing", as long as it was not generated.
        batch: The number of its batch, from 1.
        settings: All that it was generated with, by name: prompt, negative_prompt, seed, steps, guidance, width,
            height, scheduler, model, adapter, strength, and further ones.
        digest: SHA-256 of the file, in hex; None where it was not generated.
        reason: Why it failed.
        scores: What it scored, by the name of the score.
    """

    row: int
    file: str
    status: Literal["done", "failed", "missing"]
    batch: int
    settings: Mapping[str, Any]
    digest: str | None = None
    reason: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)


ENTRY = TypeAdapter(ManifestEntry)


def write_manifest(run: Path, entries: Iterable[ManifestEntry]) -> None:
    """Writes the manifest of a run directory, atomically."""
    write_text(run / MANIFEST, "".join(json.dumps(asdict(entry)) + "\n" for entry in entries))


def read_manifest(run: Path) -> list[ManifestEntry]:
    """Reads the manifest of a run directory.

    Raises:
        ValueError: There is no manifest, or it is damaged.
    """
    file = run / MANIFEST
    if not file.is_file():
        raise ValueError(f"{run} is not a run that generated images: it has no {MANIFEST}")
    try:
        lines = enumerate(file.read_text(encoding="utf-8").split("\n"), 1)
        return [_entry(line, number) for number, line in lines if line]
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): delete it, and repeat the command of the run") from None


def _entry(line: str, number: int) -> ManifestEntry:
    try:
        entry = ENTRY.validate_python(parse_json(line, f"line {number}"))
    except ValidationError as error:
        found = error.errors()[0]
        raise ValueError(": ".join([f"line {number}", *map(str, found["loc"][:1]), found["msg"]])) from None
    if re.search("[\0\ud800-\udfff]", entry.file):  # halves of surrogate pairs, too
        raise ValueError(f"line {number} names a file that cannot be")
    return entry


def recorded(folder: Path) -> dict[str, ManifestEntry]:
    """The entries of the files that the manifest in a run directory has, by path; none where it is damaged."""
    return {entry.file: entry for entry in readable_entries(folder) if entry.digest}


def readable_entries(folder: Path) -> list[ManifestEntry]:
    """The entries of a manifest; none where it is missing or damaged."""
    try:
        return read_manifest(folder)
    except ValueError:
        return []


def keep_earlier(run: Path, files: Iterable[str]) -> Path | None:
    """Keeps files of a run that are going to be replaced: `earlier/<NNN>` has them, its contact sheets and a manifest.

    It appears complete or not at all, and what an interrupted process has kept is not kept again.

    Args:
        run: The run directory.
        files: The paths of the images, relative to it.

    Returns:
        The folder, which a gallery reads as it does a run; None if all of them are kept already.
    """
    from dora_mm.utils.digest import file_digest  # imports torch, which a gallery does without

    before = [folder for folder in sorted((run / EARLIER).glob("*")) if folder.name.isdecimal()]
    kept = {(file, entry.digest) for folder in before for file, entry in recorded(folder).items()}
    found = {file: file_digest(run / file) for file in files}
    if not found.items() - kept:
        return None
    entries = {(entry.file, entry.digest): entry for entry in readable_entries(run)}
    new = {  # one that was changed has no entry
        file: entries.get((file, digest), ManifestEntry(0, file, "done", 0, {}, digest))
        for file, digest in found.items()
    }
    folder = run / EARLIER / f"{max((int(each.name) for each in before), default=0) + 1:03d}"
    with written_at_once(folder) as partial:
        for source in (*(run / file for file in found), *run.glob("sheet*.png")):
            link_or_copy(source, partial / source.relative_to(run))
        write_manifest(partial, new.values())
    return folder
