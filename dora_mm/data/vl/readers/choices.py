"""Questions about images in the TSV files of VLMEvalKit: with options, whose answer is a letter, or with words."""

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase

from pydantic import TypeAdapter

from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.embedded import decoded, image_name
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.readers.cells import table_lines
from dora_mm.data.vl.readers.contents import interleaved
from dora_mm.data.vl.readers.vqa_answers import NUM_ANSWERS
from dora_mm.data.vl.rows import BadRows, RowError, good_rows

CELLS = TypeAdapter(list[str])
LONGEST_REFERENCE = 64  # characters; a longer `image` is an image, a shorter one the index of the row that has it
KINDS = ("category", "split")  # columns by which scores are grouped; the first one that has a value counts


def read_choices(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every multiple choice question of a file, or those of one `split`.

    The columns are `index`, `question`, options `A`, `B`, ... without gaps, and where the file has them `image` (base64
    or the index of a row with the same image), `image_path`, `hint`, `answer`, `category` and `split`. The text of an
    example is hint, question and options, a line each. An image cell may hold several images as a Python list.

    Raises:
        ValueError: The file cannot be read, lacks a column or the split, or a row is bad and `bad` is set to "stop".
    """
    return _read(source, bad, ("index", "question", "A", "B"), choice_cells)


def read_answers(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every question of a file, as `read_choices` does; those without options have answers in words.

    A cell of `answer` may hold several answers as a Python list; ten are those of ten people.

    Raises:
        ValueError: As in `read_choices`.
    """
    return _read(source, bad, ("index", "question"), answer_cells)


def _read(
    source: SourceConfig, bad: BadRows, needed: Sequence[str], make: Callable[[Mapping[str, str]], Example]
) -> Iterator[Example]:
    path = source.path
    header = _header(path, needed, source.split)
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
        row = dict(zip(header, cells, strict=True))
        return interleaved(replace(make(row), images=_images(row, shared)))

    yield from good_rows(path, rows, CELLS, example, bad)


def _header(path: Path, needed: Sequence[str], split: str | None) -> list[str]:
    """The names of the columns.

    Raises:
        ValueError: The file has no rows, or lacks a column or every row of the split.
    """
    rows = table_lines(path, tabs=True, start=0)
    header = next(rows, ("", []))[1]
    needed = [*needed, *(["split"] if split else [])]
    if missing := [name for name in needed if name not in header]:
        raise ValueError(
            f"{path} has no column {missing[0]}: {'multiple choice ' * ('A' in needed)}questions are a table with tabs "
            f"between the columns {', '.join(needed)} and so on"
        )
    if split:
        index = header.index("split")
        splits = {row[index] for _, row in rows if len(row) > index}
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


def choice_cells(row: Mapping[str, str]) -> Example:
    """A multiple choice question by its columns, without images."""
    letters = [letter for letter in ascii_uppercase if row.get(letter)]
    if "".join(letters) != ascii_uppercase[: len(letters)] or len(letters) < 2:
        raise RowError("has a gap in its options A, B, ..., or fewer than two")
    options = [row[letter] for letter in letters]
    answer = row.get("answer", "").strip()
    return choice(_index(row), _question(row), options, answer, hint=row.get("hint", ""), kinds=_kinds(row))


def answer_cells(row: Mapping[str, str]) -> Example:
    """A question by its columns, without images, with options or an answer in words."""
    if row.get("A"):
        return choice_cells(row)
    text = "\n".join(filter(None, (row.get("hint", ""), _question(row))))
    answers = tuple(listed(cell)) if (cell := row.get("answer", "")) else ()
    ten = answers if len(answers) == NUM_ANSWERS else ()
    return Example(_index(row), (), text, answers, (1.0,) * len(answers), ten, _kinds(row))


def _index(row: Mapping[str, str]) -> str:
    if not row["index"]:
        raise RowError("has no index")
    return row["index"]


def _question(row: Mapping[str, str]) -> str:
    if not row["question"].strip():
        raise RowError("has no question")
    return row["question"]


def _kinds(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in KINDS if row.get(name))[:1]


def choice(
    key: str,
    question: str,
    options: Sequence[str],
    answer: str,
    *,
    images: tuple[str, ...] = (),
    hint: str = "",
    kinds: tuple[str, ...] = (),
    group: str = "",
) -> Example:
    """A multiple choice question: its text is hint, question and options, a line each.

    Args:
        key: Its id.
        question: Its question.
        options: Its options, A, B, ... in turn.
        answer: The letter of the right one; "" where the file has none.
        images: The names of its images.
        hint: What comes first.
        kinds: Its categories.
        group: What it has in common with others.

    Raises:
        RowError: The answer is no letter of an option, or there are too many options.
    """
    letters = ascii_uppercase[: len(options)]
    if len(options) > len(letters):
        raise RowError(f"has more than {len(letters)} options")
    if answer and answer not in list(letters):
        raise RowError("has an answer that is not the letter of an option")
    text = "\n".join(filter(None, (hint, question, *map("{}. {}".format, letters, options))))
    answers = (answer,) if answer else ()
    scores = (1.0,) * len(answers)
    return Example(key, images, text, answers, scores, kinds=kinds, options=tuple(options), group=group)


def _images(row: Mapping[str, str], shared: dict[str, str]) -> tuple[str, ...]:
    cell = row.get("image", "")
    if not cell:
        paths = row.get("image_path", "")
        return tuple(map(image_name, listed(paths))) if paths else ()
    if _is_reference(cell):
        if _is_reference(shared.get(cell, "")):
            raise RowError("has an image that is neither base64 nor the index of a row with one")
        cell = shared[cell]
    return tuple(map(decoded, listed(cell)))


def listed(cell: str) -> list[str]:
    """The members of a cell that holds a Python list of texts, else the cell itself."""
    if not cell.startswith("["):
        return [cell]
    try:
        members = ast.literal_eval(cell)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last two: of what is nested deeply
        members = None
    if not isinstance(members, list) or not all(isinstance(member, str) for member in members):
        raise RowError("has a list of images that is not a list of texts")
    return members
