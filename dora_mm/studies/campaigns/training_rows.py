"""The table of a campaign's finished trainings: a row each, which is all that the report needs of it."""

import base64
import csv
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

from dora_mm.studies.campaigns.trainings import Training
from dora_mm.studies.config import CampaignConfig
from dora_mm.studies.variants import Variant
from dora_mm.utils.atomic import write_text
from dora_mm.utils.circumstances import Record, text_of
from dora_mm.utils.home import expanded
from dora_mm.utils.run_directory import DAY
from dora_mm.utils.tables import csv_records

FAILED = "diverged"  # in place of the value of a training whose loss or weights were not finite
OWN_COLUMNS = ("processor", "threads")  # of circumstances; all others are in one cell, with commas between them
KEPT = ("parameters", "trainable_share", "seconds", "seconds_per_step", "peak_memory_mb")  # of summary.json


@dataclass(frozen=True)
class TrainingRow:
    """A finished training. Every attribute is a column of the file, where an empty cell is one that is not known.

    Attributes:
        method: The method.
        rank: The rank; empty: of full fine-tuning.
        setting: The name of further settings.
        rate: The learning rate.
        seed: The seed.
        value: The score by which learning rates are chosen; "diverged" of a training that did, with whatever seed.
        parameters: The number of trained parameters; this and the next four are entries of summary.json.
        trainable_share: In per cent.
        seconds: Of the training.
        seconds_per_step: Of one optimizer step.
        peak_memory_mb: In 2^20 bytes.
        processor: That of the training, or its GPU; with the next two, what decides how its numbers are rounded.
        threads: Those of the processor.
        software: All other circumstances of the training and its scores, "torch 2.13.0, numpy 2.4", and the day
            where a chat template used it; earlier rows have the versions of some packages.
        digest: Of the training's config and inputs, and of how it is scored.
        scores: The reported scores as JSON; in the file, where they are most of it, `packed`.
    """

    method: str
    rank: str
    setting: str
    rate: str
    seed: str
    value: str
    parameters: str
    trainable_share: str
    seconds: str
    seconds_per_step: str
    peak_memory_mb: str
    processor: str
    threads: str
    software: str
    digest: str
    scores: str

    @property
    def training(self) -> Training:
        """The training. Raises ValueError where a cell is no number."""
        variant = Variant(self.method, int(self.rank) if self.rank else None, self.setting)
        return Training(variant, float(self.rate), int(self.seed))

    @property
    def has_diverged(self) -> bool:
        """Whether the training has no result: it then counts as one whose scores are 0."""
        return self.value == FAILED

    @property
    def day(self) -> str:
        """The day that the chat template got; empty: it did not ask."""
        return next((text.split()[1] for text in self.software.split(", ") if text.startswith(f"{DAY} ")), "")

    @property
    def number(self) -> float:
        """The score by which learning rates are chosen."""
        return 0.0 if self.has_diverged else float(self.value)

    @property
    def summary(self) -> dict[str, Any]:
        """The entries of its summary.json that reports need."""
        return {key: json.loads(text) for key in KEPT if (text := getattr(self, key))}

    @property
    def circumstances(self) -> Record:
        """The circumstances in the row, in the form of `as_cells`."""
        entries = (entry.partition(" ") for entry in self.software.split(", "))
        cells = {"processor": self.processor, "threads": self.threads, **{name: text for name, _, text in entries}}
        return {name: text for name, text in cells.items() if text}


def as_cells(records: Sequence[Record]) -> dict[str, str]:
    """Circumstances as rows have them: all values of a name as one text, without what runs the adapted layers."""
    names = [name for name in dict.fromkeys(chain(*records)) if " " not in name]
    values = {name: [text_of(record[name]) for record in records if name in record] for name in names}
    cells = {name: " and ".join(dict.fromkeys(found)) for name, found in values.items()}
    return {name: text if name in OWN_COLUMNS else text.replace(", ", ",") for name, text in cells.items()}


COLUMNS = tuple(field.name for field in fields(TrainingRow))


def row_of(
    training: Training,
    *,
    value: float | str | None,
    scores: str,
    summary: Mapping[str, Any],
    circumstances: Sequence[Record],
    digest: str,
) -> TrainingRow:
    """The row of a training.

    Args:
        training: The training.
        value: The score by which rates are chosen, or FAILED; None: it is not used for that.
        scores: The reported scores as JSON; empty: it is not reported.
        summary: Its summary.json.
        circumstances: The records of its steps and of its scores.
        digest: Of its config and inputs.
    """
    variant = training.variant
    cells = as_cells(circumstances)
    processor, threads = cells.pop("processor", ""), cells.pop("threads", "")
    return TrainingRow(
        method=variant.method,
        rank=str(variant.rank or ""),
        setting=variant.setting,
        rate=repr(training.rate),
        seed=str(training.seed),
        value=value if isinstance(value, str) else "" if value is None else f"{value:.6g}",
        processor=processor,
        threads=threads,
        software=", ".join(f"{name} {value}" for name, value in cells.items()),
        digest=digest,
        scores=scores,
        **{key: json.dumps(summary[key]) if key in summary else "" for key in KEPT},
    )


def packed(text: str) -> str:
    """A text, compressed by zlib, in base 85: half of JSON with many numbers. An empty one stays empty."""
    return base64.b85encode(zlib.compress(text.encode(), 9)).decode() if text else ""


def unpacked(cell: str) -> str:
    """The text of `packed`.

    Raises:
        ValueError: It is something else.
    """
    try:
        return zlib.decompress(base64.b85decode(cell)).decode() if cell else ""
    except zlib.error as error:
        raise ValueError(f"scores: {error}") from None


def rows_file(config: CampaignConfig, folder: Path) -> Path:
    """The file of rows of a campaign in this folder."""
    return expanded(config.rows) if config.rows else folder / "trainings.csv"


class TrainingRows:
    """The rows of a campaign, in a CSV file that may hold those of other campaigns, too.

    Args:
        file: The file, which need not exist yet.
        digest: Returns the digest that the row of a training has to have.

    Raises:
        ValueError: The file cannot be read.
    """

    def __init__(self, file: Path, digest: Callable[[Training], str]):
        self.file, self.digest = file, digest
        self.found = self._read()

    def _read(self) -> dict[str, TrainingRow]:
        if not self.file.exists():
            return {}
        csv.field_size_limit(sys.maxsize)  # scores of many answers are long
        try:
            reader = csv.DictReader(io.StringIO(self.file.read_text(encoding="utf-8"), newline=""), strict=True)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"its columns are not {', '.join(COLUMNS)}")
            rows = [TrainingRow(**{**record, "scores": unpacked(record["scores"])}) for record in reader]
            return {row.training.name: row for row in rows}
        except (OSError, ValueError, TypeError, csv.Error) as error:
            raise ValueError(f"rows: {self.file} cannot be read as trainings of a comparison: {error}") from None

    def get(self, training: Training) -> TrainingRow | None:
        """The row of a training; None: there is none.

        Raises:
            ValueError: Its row is that of a training with another config or other inputs.
        """
        row = self.found.get(training.name)
        if row is not None and row.digest != self.digest(training):
            raise ValueError(
                f"rows: {self.file} has {training.name} of another config, other data or another model: choose "
                "another file"
            )
        return row

    def rates(self, variant: Variant) -> list[float]:
        """The learning rates of which a variant has rows, ascending."""
        trainings = (row.training for row in self.found.values())
        return sorted({training.rate for training in trainings if training.variant == variant})

    def add(self, rows: Iterable[TrainingRow]) -> None:
        """Writes rows into the file, replacing those of the same trainings."""
        added = {row.training.name: row for row in rows}
        self.found = {**self._read(), **added}  # what others have added since stays
        rows = [replace(row, scores=packed(row.scores)) for row in sorted(self.found.values(), key=_order)]
        write_text(self.file, csv_records([asdict(row) for row in rows]))


def _order(row: TrainingRow) -> tuple[str, int, str, float, int]:
    return row.method, int(row.rank or 0), row.setting, float(row.rate), int(row.seed)
