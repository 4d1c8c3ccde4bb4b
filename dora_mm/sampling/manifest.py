"""The manifest of a run that draws pictures: one line of JSON per picture, in manifest.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dora_mm.utils.atomic import write_text

MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class ManifestEntry:
    """One picture of a run.

    Attributes:
        row: The number of its row in the job, from 1.
        file: Its path, relative to the run directory.
        status: "done"; "failed", with a reason; or "missing", as long as it was not drawn.
        batch: The number of its batch, from 1.
        settings: All that it was drawn with, by name: prompt, negative_prompt, seed, steps, guidance, width, height,
            scheduler, model, adapter, strength, and further ones.
        digest: SHA-256 of the file, in hex; None where it was not drawn.
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
        raise ValueError(f"{run} is not a run that drew pictures: it has no {MANIFEST}")
    try:
        return [ManifestEntry(**json.loads(line)) for line in file.read_text(encoding="utf-8").split("\n") if line]
    except (UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}): delete it, and repeat the command of the run") from None
