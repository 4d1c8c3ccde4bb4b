"""Multiple choice questions about images, in the TSV files of VLMEvalKit; the answer is the letter of an option."""

import ast
from collections.abc import Iterator
from pathlib import Path
from string import ascii_uppercase

from pydantic import TypeAdapter

from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.embedded import decoded, image_name
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.readers.cells import table_lines
from dora_mm.data.vl.rows import BadRows, RowError, good_rows

CELLS = TypeAdapter(list[str])
NEEDED = ("index", "question", "A", "B")
LONGEST_REFERENCE = 64  # characters; a longer `image` is an image, a shorter one the index of the row that has it


def read_choices(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every question of a file, or those of one `split`.

    The columns are `index`, `question`, options `A`, `B`, ... without gaps, and where the file has them `image` (base64
    or the index of a row with the same image), `image_path`, `hint`, `answer`, `category` and `split`. The text of an
    example is hint, question and options, a line each. An image cell may hold several images as a Python list.

    Raises:
        ValueError: The file cannot be read, lacks a column or the split, or a row is bad and `bad` is set to "stop".
    """
    path = source.path
    header = _header(path, source.split)
    selected = header.index("split") if source.split else 0
    rows = (
        row
        for row in table_lines(path, tabs=True)
        if not source.split or row[1][selected : selected + 1] == [source.split]
    )
    shared = _shared_images(path, header)

    def example(cells: list[str]) -> Example:
        if len(cells) != len(header):
            raise RowError(f"has {len(cells)} cells, and the header {len(header)}")
        return _example(dict(zip(header, cells, strict=True)), shared)

    yield from good_rows(path, rows, CELLS, example, bad)


def _header(path: Path, split: str | None) -> list[str]:
    """The names of the columns.

    Raises:
        ValueError: The file has no rows, or lacks a column or every row of the split.
    """
    rows = table_lines(path, tabs=True, start=0)
    header = next(rows, ("", []))[1]
    needed = [*NEEDED, *(["split"] if split else [])]
    if missing := [name for name in needed if name not in header]:
        raise ValueError(
            f"{path} has no column {missing[0]}: multiple choice questions are a table with tabs between the columns "
            f"{', '.join(needed)} and so on"
        )
    if split:
        place = header.index("split")
        splits = {row[place] for _, row in rows if len(row) > place}
        if split not in splits:
            raise ValueError(f"{path} has no rows of the split {split!r}: it has {', '.join(sorted(splits)) or 'none'}")
    return header


def _shared_images(path: Path, header: list[str]) -> dict[str, str]:
    """The images to which other rows refer, by the index of the row that has them."""
    if "image" not in header:
        return {}
    image, index = header.index("image"), header.index("index")

    def complete() -> Iterator[list[str]]:
        return (cells for _, cells in table_lines(path, tabs=True) if len(cells) == len(header))

    wanted = {cells[image] for cells in complete() if cells[image] and _is_reference(cells[image])}
    if not wanted:
        return {}
    return {cells[index]: cells[image] for cells in complete() if cells[index] in wanted}


def _is_reference(cell: str) -> bool:
    return len(cell) <= LONGEST_REFERENCE


def _example(row: dict[str, str], shared: dict[str, str]) -> Example:
    if not row["index"]:
        raise RowError("has no index")
    if not row["question"].strip():
        raise RowError("has no question")
    letters = [letter for letter in ascii_uppercase if row.get(letter)]
    if "".join(letters) != ascii_uppercase[: len(letters)] or len(letters) < 2:
        raise RowError("has a gap in its options A, B, ..., or fewer than two")
    options = tuple(row[letter] for letter in letters)
    answer = row.get("answer", "").strip()
    if answer and answer not in letters:
        raise RowError("has an answer that is not the letter of an option")
    lines = [row.get("hint", ""), row["question"], *map("{}. {}".format, letters, options)]
    return Example(
        row["index"],
        _images(row, shared),
        "\n".join(filter(None, lines)),
        (answer,) if answer else (),
        (1.0,) if answer else (),
        kinds=(row["category"],) if row.get("category") else (),
        options=options,
    )


def _images(row: dict[str, str], shared: dict[str, str]) -> tuple[str, ...]:
    cell = row.get("image", "")
    if not cell:
        paths = row.get("image_path", "")
        return tuple(map(image_name, _listed(paths))) if paths else ()
    if _is_reference(cell):
        if _is_reference(shared.get(cell, "")):
            raise RowError("has an image that is neither base64 nor the index of a row with one")
        cell = shared[cell]
    return tuple(map(decoded, _listed(cell)))


def _listed(cell: str) -> list[str]:
    """The members of a cell that holds a Python list of texts, else the cell itself."""
    if not cell.startswith("["):
        return [cell]
    try:
        members = ast.literal_eval(cell)
    except (ValueError, SyntaxError):
        members = None
    if not isinstance(members, list) or not all(isinstance(member, str) for member in members):
        raise RowError("has a list of images that is not a list of texts")
    return members
