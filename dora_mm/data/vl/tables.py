"""Tables of examples on disk: a source is parsed once into an Arrow file, from which rows are read on demand.

The file is in Arrow's stream format and named after a digest of its source files; `datasets.Dataset.from_file` can open
it too. Image files are checked every time a table is opened, since they may change while the rows do not.
"""

import gc
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.images.frames import is_video
from dora_mm.data.vl.arrow import SCHEMA, example_at, record_batches
from dora_mm.data.vl.embedded import ImageStore
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.image_folder import ImageFolder, folder_with
from dora_mm.data.vl.readers import check_files, own_folders, read_source, resolved
from dora_mm.data.vl.readers.hub_rows import is_of_hub
from dora_mm.data.vl.readers.unread import unread_columns
from dora_mm.data.vl.rows import BadRows, OnBadData, warn_skipped
from dora_mm.data.vl.source_digest import source_digest
from dora_mm.utils.atomic import write_atomically, write_text
from dora_mm.utils.digest import file_digest, known_digest
from dora_mm.utils.folders import REFUSED, Links
from dora_mm.utils.progress import Progress

log = logging.getLogger(__name__)
LAYOUT = "10"  # increase it when the files or the rows of all readers change; a reader has its `version`
BATCH_ROWS = 1000  # rows per Arrow record batch: the number held in memory while writing
ABSOLUTE = "name the folder that it is in with `images`, or set data.absolute_paths=true"
ALL_ANSWERS = -1  # in place of the number of the only one
STORED_IMAGES = "images"  # the subfolder of images that were embedded in data files


@dataclass(frozen=True, eq=False, repr=False)
class ExampleTable(Sequence[Example]):
    """The examples of one source, read from a memory-mapped Arrow file on access.

    Attributes:
        path: The Arrow file.
        file: The data file that it was made from, for messages.
        batches: Its record batches; of several files joined, those of one after the other.
        rows: Which rows of the file are in this table, in the table's order.
        on_bad_data: What `with_images` does with rows whose images are missing.
        skipped: The places of skipped rows, by reason.
        image_paths: The path of an image by its name, for images in subfolders.
        picked: For each row, which of its answers is the only one here, or ALL_ANSWERS; None: all of them in all rows.
        origins: Of several files joined: the first row of each, and its name.
        content: The digest of the source files and of what is read of them, whatever the layout of tables is.
        unread: The columns of the source files that have texts or images and are not read, see `unread_columns`.
    """

    path: Path
    file: str
    batches: Sequence[pa.RecordBatch]
    rows: np.ndarray
    on_bad_data: OnBadData
    skipped: dict[str, list[str]] = field(default_factory=dict)
    image_paths: dict[str, str] = field(default_factory=dict)
    picked: np.ndarray | None = None
    origins: tuple[tuple[int, str], ...] = ()
    content: str = ""
    unread: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "ExampleTable": ...
    def __getitem__(self, index: int | slice) -> "Example | ExampleTable":
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        row = int(self.rows[index])
        batch = int(np.searchsorted(self._starts, row, "right")) - 1
        example = example_at(self.batches[batch], row - int(self._starts[batch]))
        if self.picked is not None and (answer := self.picked[index]) != ALL_ANSWERS:
            example = replace(example, answers=(example.answers[answer],), scores=(example.scores[answer],))
        if not self.image_paths:
            return example
        return replace(example, images=tuple(self.image_paths.get(name, name) for name in example.images))

    @cached_property
    def _starts(self) -> np.ndarray:
        """The first row of each record batch."""
        sizes = [batch.num_rows for batch in self.batches]
        return np.cumsum([0, *sizes[:-1]])

    def by_source(self) -> list[np.ndarray]:
        """The indices of the rows of each of the files that were joined."""
        numbers = np.searchsorted([start for start, _ in self.origins], self.rows, "right") - 1
        return [np.flatnonzero(numbers == number) for number in range(len(self.origins))]

    def file_of(self, index: int) -> str:
        """The data file of a row."""
        return next((file for start, file in reversed(self.origins) if start <= self.rows[index]), self.file)

    def select(self, indices: Iterable[int]) -> "ExampleTable":
        """A table of the rows at these indices, in the order given."""
        return self._at(np.fromiter(indices, np.int64))

    def _at(self, chosen: np.ndarray) -> "ExampleTable":
        """A table of the rows at these indices, or where this is true."""
        return replace(self, rows=self.rows[chosen], picked=None if self.picked is None else self.picked[chosen])

    def answered(self) -> "ExampleTable":
        """A table of the rows that have at least one answer, the last turn or another, and so can be trained on."""
        turns = self._column("turns")
        losses = turns.flatten().field("loss").to_numpy(zero_copy_only=False).astype(bool)
        num_learned = np.bincount(turns.value_parent_indices().to_numpy()[losses], minlength=len(turns))
        return self._at((self.lengths("answers") > 0) | (num_learned > 0))

    def first_answers(self, chosen: np.ndarray) -> "ExampleTable":
        """A table in which the first answer of chosen rows is the only one, where they have several.

        Args:
            chosen: Whether this holds for each row.
        """
        is_picked = chosen & (self.lengths("answers") > 1)
        return replace(self, picked=np.where(is_picked, 0, ALL_ANSWERS)) if is_picked.any() else self

    def per_answer(self) -> "ExampleTable":
        """A table with one row for each answer of each row."""
        counts = self.lengths("answers")
        picked = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # 0, 1, 0, 0, 1, 2, ...
        return replace(self, rows=np.repeat(self.rows, counts), picked=picked)

    @property
    def identity(self) -> str:
        """Changes with the content of the source files, with how they are read, and with the selection of rows."""
        return f"{self.path.name} {self._selection}"

    @property
    def content_identity(self) -> str:
        """Changes with the content of the source files and with the selection of rows, and not with our readers."""
        return f"{self.content} {self._selection}"

    @property
    def _selection(self) -> str:
        selection = self.rows.tobytes() + (b"" if self.picked is None else self.picked.tobytes())
        return hashlib.blake2b(selection, digest_size=8).hexdigest()

    def images(self) -> list[str]:
        """The distinct names of all images, sorted."""
        return sorted(self.image_paths.get(name, name) for name in self._names())

    def image_lists(self) -> list[list[str]]:
        """The names of the images of each row."""
        rows: list[list[str]] = self._column("images").to_pylist()
        return [[self.image_paths.get(name, name) for name in names] for names in rows]

    def contents(self) -> list[tuple[Any, ...]]:
        """The values of each row except its id and its images, as plain lists and dictionaries."""
        columns = [self._column(name).to_pylist() for name in SCHEMA.names if name not in ("id", "images")]
        return list(zip(*columns, strict=True))

    def with_images(
        self,
        find: Callable[[str], str | None],
        where: object,
        refusal: Callable[[str], str] = lambda name: "",
        advice: Callable[[Sequence[str]], str] = lambda names: "",
    ) -> "ExampleTable":
        """A table of the rows all of whose images exist, with the paths of the images; other rows are bad.

        Args:
            find: Returns the path of an image by its name, or None if there is no such image.
            where: The folder or files in which `find` searches, for messages.
            refusal: Why an image that `find` does not return may not be read; empty: there is none.
            advice: What to do where it returns none of these, as the end of a sentence.

        Raises:
            ValueError: No image exists, or one is missing and `on_bad_data` is "stop".
        """
        found = {name: find(name) for name in self._names()}
        missing = {name: refusal(name) or f"is not in {where}" for name, path in found.items() if path is None}
        if found and len(missing) == len(found):
            one = min(missing)
            if reason := refusal(one):
                raise ValueError(f"{self.file}: none of its {len(missing)} images may be read: {one} {reason}")
            raise ValueError(
                f"{self.file}: none of its {len(missing)} images is in {where}; one is {one}{advice([*missing])}"
            )
        image_paths = {name: path for name, path in found.items() if path is not None and path != name}
        kept, skipped = self._without(missing) if missing else (np.arange(len(self)), self.skipped)
        return replace(self._at(kept), skipped=skipped, image_paths=self.image_paths | image_paths)

    def have(self, chosen: Callable[[str], bool]) -> np.ndarray:
        """Whether each row has an image whose name is chosen."""
        names = self._column("images")
        encoded = names.flatten().dictionary_encode()
        is_chosen = np.array([chosen(name) for name in encoded.dictionary.to_pylist()], bool)
        rows = names.value_parent_indices().to_numpy()[is_chosen[encoded.indices.to_numpy()]]
        return np.bincount(rows, minlength=len(names)) > 0

    def has(self, column: str) -> np.ndarray:
        """Whether each row has a text in a column of texts, such as "tools"."""
        return self._column(column).to_numpy(zero_copy_only=False) != ""

    def filmed(self) -> np.ndarray:
        """Whether each row has a video, in a file or as frames."""
        return self.have(lambda name: is_video(self.image_paths.get(name, name))) | (self.lengths("frames") > 0)

    def empty_answers(self) -> int:
        """How many turns of the assistant have neither text nor calls, in all rows. They are not learned."""
        turns = self._column("turns").flatten()
        roles, texts, calls = (turns.field(name).to_numpy(zero_copy_only=False) for name in ("role", "text", "calls"))
        parts = zip(roles, texts, calls, strict=True)
        return sum(role == "assistant" and not (text.strip() or call) for role, text, call in parts)

    def lengths(self, column: str) -> np.ndarray:
        """How many entries each row has in a column of lists, such as "images" or "turns"."""
        return self._column(column).value_lengths().to_numpy()

    def without(self, bad: np.ndarray, reason: str) -> "ExampleTable":
        """A table without the rows that are bad for the given reason.

        Args:
            bad: Whether each row is bad.
            reason: Why, to follow a row's place in a message.

        Raises:
            ValueError: A row is bad and `on_bad_data` is "stop", or all are.
        """
        return self.without_rows(dict.fromkeys(np.flatnonzero(bad).tolist(), reason))

    def without_rows(self, bad: Mapping[int, str]) -> "ExampleTable":
        """A table without bad rows.

        Args:
            bad: Why rows are bad, by index, to follow a row's place in a message.

        Raises:
            ValueError: A row is bad and `on_bad_data` is "stop", or all are.
        """
        if not bad:
            return self
        if len(bad) == len(self):
            raise ValueError(f"{self.file}: every row {bad[0]}")
        found, ids = BadRows(self.on_bad_data), self._column("id")
        for row in sorted(bad):
            found.add(f"{self.file_of(row)}, id {ids[row]}", bad[row])
        warn_skipped(found.found)
        kept = np.delete(np.arange(len(self)), sorted(bad))
        return replace(self._at(kept), skipped={**self.skipped, **found.found})

    def _without(self, missing: Mapping[str, str]) -> tuple[np.ndarray, dict[str, list[str]]]:
        """The indices of the rows with none of these images, and the skipped places, those of the others added.

        Args:
            missing: Why they cannot be used, by their names.
        """
        affected = np.flatnonzero(self.have(lambda name: name in missing))
        bad = BadRows(self.on_bad_data, self.skipped)
        names, ids = self._column("images"), self._column("id")
        for row in affected:
            image = next(name for name in names[row].as_py() if name in missing)
            bad.add(f"{self.file}, id {ids[row]}, image {image}", missing[image])
        return np.delete(np.arange(len(self)), affected), bad.found

    def _names(self) -> list[str]:
        """The distinct image names as the rows have them."""
        return self._column("images").flatten().unique().to_pylist()

    def _column(self, name: str) -> Any:  # a pyarrow Array; its subclasses have different methods
        chunks = pa.chunked_array([batch[name] for batch in self.batches])
        return chunks.combine_chunks().take(pa.array(self.rows))


def open_table(
    source: SourceConfig,
    folder: Path,
    *,
    on_bad_data: OnBadData,
    check_images: bool = True,
    links: Links = REFUSED,
    absolute_paths: bool = False,
) -> ExampleTable:
    """Opens the table of a source, which is first written to `folder` if needed (10 s for 440,000 questions).

    If the source names a folder of images, or its rows may name absolute paths, the images of every row must exist. A
    warning lists the skipped rows.

    Args:
        source: The source, with relative or absolute paths.
        folder: Where tables are kept, and images that are embedded in data files: in its subfolder `images`.
        on_bad_data: "stop" raises at the first bad row, "skip" omits bad rows.
        check_images: Whether the images must exist; False where only the texts are used.
        links: What becomes of links that lead out of the folders of the source.
        absolute_paths: Whether rows may name any image on this machine by its absolute path.

    Raises:
        ValueError: A file or folder is missing, damaged or empty; a data file is a link out of its folder; or
            a row is bad (see the readers and `ExampleTable.with_images`) and `on_bad_data` is "stop".
    """
    source = resolved(source if check_images else source.model_copy(update={"images": None}))
    with ThreadPoolExecutor(1) as thread:  # images are listed while files are hashed
        images_folder = (folder / STORED_IMAGES).absolute()
        listing = thread.submit(_listing, source, images_folder, links, absolute_paths) if check_images else None
        check_files(source, links)
        content = source_digest(source)
    read = hashlib.blake2b(f"{LAYOUT} {source.reader.version} {content}".encode(), digest_size=16).hexdigest()
    path = folder / f"{source.format}-{read}.arrow"
    table = _open(path, source, on_bad_data)
    if table is None:
        write_atomically(path, lambda partial: _write(partial, path, source, on_bad_data))
        table = _open(path, source, on_bad_data)
        assert table is not None
    table = replace(table, content=content)
    for reason, image_paths in table.skipped.items():
        if on_bad_data == "stop":  # the file was written with on_bad_data "skip"
            raise ValueError(f"{image_paths[0]}: {reason}")
    if listing is not None:
        table = table.with_images(*listing.result(), partial(_other_folder, source))
    warn_skipped(table.skipped)
    return table


def _other_folder(source: SourceConfig, names: Sequence[str]) -> str:
    """The end of a sentence with the folder that images of a source are in, if it is found."""
    found = folder_with(names, source.path, source.images)
    return f", which is in {found}: set `images` of its source to that" if found else ""


def _listing(
    source: SourceConfig, stored: Path, links: Links, absolute_paths: bool
) -> tuple[Callable[[str], str | None], str, Callable[[str], str]]:
    """How to find the images of a source, where that is, and why one may not be read.

    Args:
        source: The source.
        stored: The folder of images that were embedded in data files.
        links: As in `open_table`.
        absolute_paths: Likewise.
    """
    settings = {"anywhere": absolute_paths, "remedy": ABSOLUTE}
    if source.images is not None:
        folder = ImageFolder(Path(source.images), [stored, *own_folders(source)], links, **settings).listed()
        return folder.find, f"the folder {source.images}", folder.refusal
    if source.reader.images == "own" or (source.reader.images == "either" and is_of_hub(source)):
        folder = ImageFolder(None, [stored, *own_folders(source)], links, **settings)
        where = "the file system (relative names need `images`)"
        return folder.find, where, folder.refusal
    # Only features are read, by the names of images
    return (lambda name: None if os.path.isabs(name) else name), "", lambda name: f"is an absolute path: {ABSOLUTE}"


def _write(partial: Path, path: Path, source: SourceConfig, on_bad_data: OnBadData) -> None:
    """Writes the Arrow file to its temporary path, and a JSON file with row count and skipped rows next to `path`."""
    bad, store = BadRows(on_bad_data), ImageStore(path.parent / STORED_IMAGES)
    end = None if source.limit is None else source.skip + source.limit
    rows = map(store.stored, islice(read_source(source, bad), source.skip, end))
    progress = Progress(f"reading {source.path.name}", unit="rows")
    num_rows = 0
    with _no_collection(), pa.OSFile(str(partial), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer, progress:
        for batch in record_batches(rows, BATCH_ROWS):
            writer.write_batch(batch)
            num_rows += batch.num_rows
            progress.advance(batch.num_rows)
    store.flush()
    if not num_rows:
        warn_skipped(bad.found)
        after = f" after the first {source.skip}" if source.skip else ""
        raise ValueError(f"{source.title} has no usable row{after}")
    summary = {"num_rows": num_rows, "num_stored_images": len(store.names), "skipped": bad.found}
    summary["unread"] = unread_columns(source)
    summary["sha256"] = file_digest(partial)
    write_text(path.with_suffix(".json"), json.dumps(summary, indent=1))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without garbage collection: rows have no cycles, and traversing them again and again takes half the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _open(path: Path, source: SourceConfig, on_bad_data: OnBadData) -> ExampleTable | None:
    """The table in this file; None if the file is missing, damaged or not as it was written.

    It is compared before it is mapped: a reader of Arrow trusts what it maps, and may end the process.
    """
    if not path.exists():
        return None
    try:
        summary = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        intact = known_digest(path) == summary["sha256"]
        batches = list(pa.ipc.open_stream(pa.memory_map(str(path)))) if intact else []
        intact = intact and sum(batch.num_rows for batch in batches) == summary["num_rows"]
        if num_stored := summary["num_stored_images"]:
            intact = intact and _count_stored(batches, path.parent / STORED_IMAGES) == num_stored
    except (OSError, ValueError, KeyError, TypeError) as error:
        summary, batches, intact = {}, [], False
        log.debug("%s: %s", path, error)
    if not intact:
        log.warning("%s is damaged: the table is read again from its source", path)
        return None
    rows, found = np.arange(summary["num_rows"]), {key: summary[key] for key in ("skipped", "unread")}
    return ExampleTable(path, source.title, batches, rows, on_bad_data, **found)


def _count_stored(batches: Sequence[pa.RecordBatch], folder: Path) -> int:
    """How many different images of the rows are files of this folder: fewer than were stored if it was moved."""
    files = set(os.listdir(folder)) if folder.is_dir() else set()
    prefix = f"{folder.absolute()}{os.sep}"
    names = pa.chunked_array([batch["images"].flatten() for batch in batches]).unique().to_pylist()
    return sum(name.startswith(prefix) and name.removeprefix(prefix) in files for name in names)
