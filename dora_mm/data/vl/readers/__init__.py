"""The readers of vision-language data files, by `format` of a source.

A reader is a function `read(source, bad)` that yields one Example per usable row of the source's files, in file order.
It reads `source.file` and, where the format has them, `source.annotations`, `source.subtitles` and `source.split`;
`skip`, `limit` and `images` are handled by tables.py. It passes every row that it cannot use to `bad`, normally through
`good_rows`, and raises ValueError for a file that cannot be parsed. Its rows must depend only on the content of these
files, the name of `source.file` and the split, since tables are cached by them; if a reader changes, so does `version`
of its record. An image that is inside a file is yielded as a data URL (embedded.py); tables.py makes a file of it.

A benchmark on the hub is an entry of LAYOUTS in hub_layouts.py.
To add a format: write its reader in this folder; add its record to dora_mm/registries/readers.py, its name to `formats`
of the tasks that it serves (vl_tasks.py there), its file layout to tests/data/vl, and a row to the table of
docs/vl.md or docs/scores.md.
One more shape of `chat` is an entry of SHAPES in chat_shapes.py, with a function that takes a row apart; of
`preferences` one of PAIR_SHAPES in preferences.py.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from dora_mm.config import resolve_path
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.readers.chat import find_shape
from dora_mm.data.vl.readers.hub_files import METADATA, check_links, files_of, files_of_source
from dora_mm.data.vl.readers.hub_rows import is_of_hub, read_hub_rows
from dora_mm.data.vl.readers.preferences import find_pair_shape
from dora_mm.data.vl.rows import BadRows
from dora_mm.registries.readers import ANY
from dora_mm.registries.registry import load
from dora_mm.utils.folders import Links

SHAPES = {"chat": find_shape, "preferences": find_pair_shape}  # what finds the shape of a file, by its format
FILES = ("file", "annotations", "subtitles")  # the keys of a source that name files with row content


def read_source(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """The usable rows of a source with existing paths, by the reader of its format.

    Args:
        source: The source.
        bad: Takes the rows that are not usable.

    Raises:
        ValueError: A file cannot be read, or a row is bad and `bad` is set to "stop".
    """
    if is_of_hub(source):
        return read_hub_rows(source, bad)
    return load(source.reader.read)(_with_one_file(source), bad)


def _with_one_file(source: SourceConfig) -> SourceConfig:
    """The source with the one official file of a folder that it names."""
    if not source.reader.hub or source.reader.official == ANY:
        return source
    (path,) = files_of_source(source)
    return source.model_copy(update={"file": str(path)})


def format_name(source: SourceConfig) -> str:
    """The format of a source for reports, of conversations and preferences with their shape.

    Raises:
        ValueError: A file of these cannot be read.
    """
    find = SHAPES.get(source.format)
    if find is None:
        return source.format
    files = data_files(resolved(source), "file")
    shapes = dict.fromkeys(find(file, source.columns).name for file in files)
    return ", ".join([source.format, *shapes])


def data_files(source: SourceConfig, key: str) -> list[Path]:
    """The files under a key of a source: of conversations also those of folders and patterns.

    Raises:
        ValueError: A folder has no data files.
    """
    if key == "file" and source.reader.several:
        return files_of_source(source)
    return [Path(path) for path in paths_under(source, key)]


def own_folders(source: SourceConfig) -> list[Path]:
    """The folders of the images that the data files of a source name beside themselves, by absolute paths."""
    files, relative = data_files(source, "file"), source.reader.image_folder
    folders = [os.path.abspath(file.parent / relative) for file in files if relative or file.name in METADATA]
    return [*map(Path, dict.fromkeys(folders))]


def check_files(source: SourceConfig, links: Links) -> None:
    """Checks that the data files of folders and patterns are in these.

    Raises:
        ValueError: One is a link that leads out, or a folder has no data files.
    """
    for path in map(Path, source.files) if source.reader.several else ():
        check_links(path, files_of(path, None if source.reader.splits_rows else source.split), links)


def paths_under(source: SourceConfig, key: str) -> tuple[str, ...]:
    """The paths under a key of a source: none, one, or several."""
    value = source.files if key == "file" else getattr(source, key)
    return value if isinstance(value, tuple) else () if value is None else (value,)


def resolved(source: SourceConfig) -> SourceConfig:
    """The source with its files and its folder of images as existing paths.

    Raises:
        ValueError: A path does not exist.
    """
    found = {
        key: tuple(str(resolve_path(path)) for path in paths)
        for key in (*FILES, "images")
        if (paths := paths_under(source, key))
    }
    return source.model_copy(update={key: paths[0] if len(paths) == 1 else paths for key, paths in found.items()})
