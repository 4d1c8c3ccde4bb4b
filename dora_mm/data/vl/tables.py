"""Rows on the disk: a source is read once into an Arrow file, and looked up from there without being held.

The file is in Arrow's stream format, named by the content that it was made from; `datasets.Dataset.from_file` opens it
as well. Pictures are looked for whenever a table is opened, since they come and go while the questions stay.
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from dora_mm.config.vl import SourceConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.image_folder import Pictures
from dora_mm.data.vl.readers import FILES, READERS, resolved
from dora_mm.data.vl.rows import BadRows, OnBadData, warn_of
from dora_mm.utils.atomic import write_atomically, write_text

__all__ = ["ExampleTable", "open_table"]

log = logging.getLogger(__name__)
LAYOUT = "1"  # raise it when a reader makes other rows of the same files
BATCH_ROWS = 1000  # of Arrow: what is held while writing

TEXTS = pa.list_(pa.string())
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "images": TEXTS,
        "text": pa.string(),
        "answers": TEXTS,
        "scores": pa.list_(pa.float64()),
        "raw_answers": TEXTS,
        "kinds": TEXTS,
    }
)
assert SCHEMA.names == [column.name for column in fields(Example)]


@dataclass(frozen=True, eq=False, repr=False)
class ExampleTable(Sequence[Example]):
    """Examples of one source, read from its memory-mapped file when they are asked for.

    path: the Arrow file. file: the data file that it was made from.
    skipped: where the rows stand that were left out, by reason.
    """

    path: Path
    file: str
    batches: Sequence[pa.RecordBatch]  # of BATCH_ROWS rows, the last of fewer
    rows: np.ndarray  # which of them are in this table, in its order
    on_bad_data: OnBadData
    skipped: dict[str, list[str]] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)  # of pictures in subfolders: path by name

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "ExampleTable": ...
    def __getitem__(self, index: int | slice) -> "Example | ExampleTable":
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        batch, row = divmod(int(self.rows[index]), BATCH_ROWS)
        values: dict[str, Any] = self.batches[batch].slice(row, 1).to_pylist()[0]
        values["images"] = [self.places.get(name, name) for name in values["images"]]
        for key in values.keys() - {"id", "text"}:
            values[key] = tuple(values[key])
        return Example(**values)

    def select(self, indices: Iterable[int]) -> "ExampleTable":
        """The rows at these indices, in their order."""
        return replace(self, rows=self.rows[np.fromiter(indices, np.int64)])

    def answered(self) -> "ExampleTable":
        """The rows that have an answer, and so can be trained on."""
        return replace(self, rows=self.rows[self._column("answers").value_lengths().to_numpy() > 0])

    @property
    def identity(self) -> str:
        """Changes with the content of the files, and with which rows are left out or selected."""
        return f"{self.path.name} {hashlib.blake2b(self.rows.tobytes(), digest_size=8).hexdigest()}"

    def images(self) -> list[str]:
        """The distinct names of all pictures, sorted."""
        return sorted(self.places.get(name, name) for name in self._names())

    def with_pictures(self, find: Callable[[str], str | None], where: object) -> "ExampleTable":
        """The rows of which `find` knows every picture, with the paths that it gives for their names; others are bad.

        Raises:
            ValueError: no picture at all is found, or one is not and bad data stop; names `where` they were sought.
        """
        found = {name: find(name) for name in self._names()}
        lost = {name for name, path in found.items() if path is None}
        if found and len(lost) == len(found):
            raise ValueError(f"{self.file}: none of its {len(lost)} pictures is in {where} (one is {min(lost)})")
        places = {name: path for name, path in found.items() if path is not None and path != name}
        kept, bad = self._leave_out(lost, where) if lost else (self.rows, self.skipped)
        return replace(self, rows=kept, skipped=bad, places=self.places | places)

    def _leave_out(self, lost: set[str], where: object) -> tuple[np.ndarray, dict[str, list[str]]]:
        """The rows with none of these pictures, and the places of those with, beside the ones known before."""
        names = self._column("images")
        encoded = names.flatten().dictionary_encode()
        of_lost = np.array([name in lost for name in encoded.dictionary.to_pylist()])[encoded.indices.to_numpy()]
        affected = np.unique(names.value_parent_indices().to_numpy()[of_lost])
        bad = BadRows(self.on_bad_data, self.skipped)
        ids = self._column("id")
        for row in affected:
            missing = next(name for name in names[row].as_py() if name in lost)
            bad.add(f"{self.file}, id {ids[row]}, picture {missing}", f"is not in {where}")
        return np.delete(self.rows, affected), bad.found

    def _names(self) -> list[str]:
        """Of pictures, as the rows give them, each once."""
        return self._column("images").flatten().unique().to_pylist()

    def _column(self, name: str) -> Any:  # an Array of pyarrow, whose kinds have methods of their own
        chunks = pa.chunked_array([batch[name] for batch in self.batches])
        return chunks.combine_chunks().take(pa.array(self.rows))


def open_table(source: SourceConfig, folder: Path, *, on_bad_data: OnBadData) -> ExampleTable:
    """The rows of a source, read into a file in `folder` if they are not there yet (10 s for 440,000 questions).

    Where the source names a folder of pictures, every row's must be in it. Rows left out are warned of once.

    Raises:
        ValueError: a file or folder is missing, damaged or empty; or a row is bad (see the readers, and
            `ExampleTable.with_pictures`) and `on_bad_data` is "stop".
    """
    source = resolved(source)
    path = folder / f"{source.format}-{_digest(source)}.arrow"
    table = _open(path, source, on_bad_data)
    if table is None:
        write_atomically(path, lambda partial: _write(partial, path, source, on_bad_data))
        table = _open(path, source, on_bad_data)
        assert table is not None
    for reason, places in table.skipped.items():
        if on_bad_data == "stop":  # the file was made when they were left out
            raise ValueError(f"{places[0]}: {reason}")
    if source.images is not None:
        where = f"{source.images}, or in several of its subfolders"
        table = table.with_pictures(Pictures(Path(source.images)).find, where)
    warn_of(table.skipped)
    return table


def _write(partial: Path, path: Path, source: SourceConfig, on_bad_data: OnBadData) -> None:
    """The Arrow file under its temporary name, and beside its final one what is to be known of it."""
    bad = BadRows(on_bad_data)
    end = None if source.limit is None else source.skip + source.limit
    examples = itertools.islice(READERS[source.format](source, bad), source.skip, end)
    progress = tqdm(examples, desc=f"reading {Path(source.file).name}", unit="row", delay=2, disable=None)
    num_rows = 0
    with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        for rows in _in_batches(progress):
            columns = [pa.array([getattr(row, column.name) for row in rows], column.type) for column in SCHEMA]
            writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
            num_rows += len(rows)
    if not num_rows:
        warn_of(bad.found)
        after = f" after the first {source.skip}" if source.skip else ""
        raise ValueError(f"{source.file} has no row that can be used{after}")
    write_text(path.with_suffix(".json"), json.dumps({"num_rows": num_rows, "skipped": bad.found}, indent=1))


def _open(path: Path, source: SourceConfig, on_bad_data: OnBadData) -> ExampleTable | None:
    """None where there is no such file, or a damaged one."""
    if not path.exists():
        return None
    try:
        known = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        batches = list(pa.ipc.open_stream(pa.memory_map(str(path))))
        intact = sum(batch.num_rows for batch in batches) == known["num_rows"]
    except (OSError, ValueError) as error:
        known, batches, intact = {}, [], False
        log.debug("%s: %s", path, error)
    if not intact:
        log.warning("A damaged table is read anew from its source: %s", path)
        return None
    return ExampleTable(path, source.file, batches, np.arange(known["num_rows"]), on_bad_data, known["skipped"])


def _digest(source: SourceConfig) -> str:
    """Of all that rows depend on: the contents of the files (0.5 s for VQA v2), the first one's name, the choice."""
    digest = hashlib.blake2b(digest_size=16)
    choice = [source.split, source.limit, *([source.skip] if source.skip else [])]
    digest.update(json.dumps([LAYOUT, source.format, Path(source.file).name, *choice]).encode())
    for key in FILES:
        if (path := getattr(source, key)) is not None:
            content = hashlib.blake2b(digest_size=16)
            try:
                with open(path, "rb") as file:
                    while piece := file.read(1 << 20):
                        content.update(piece)
            except OSError as error:
                raise ValueError(f"{path} cannot be read: {error.strerror}") from None
            digest.update(f"{key} {content.hexdigest()}".encode())
    return digest.hexdigest()


def _in_batches(rows: Iterable[Example]) -> Iterator[list[Example]]:
    iterator = iter(rows)
    while batch := list(itertools.islice(iterator, BATCH_ROWS)):
        yield batch
