"""Captions of a folder: metadata.jsonl, metadata.csv or kohya's, or <name>.txt and <name>.caption next to an image.

Files that look like captions and are not read are found, too: otherwise images would be trained with another text.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dora_mm.data.images.decoders import SUFFIXES
from dora_mm.data.images.kohya_metadata import kohya_rows
from dora_mm.registries.other_trainers import CAPTION_FILES
from dora_mm.utils.folders import REFUSED, Links, inside
from dora_mm.utils.json_text import parse_json, read_bounded
from dora_mm.utils.tables import decoded, read_table

METADATA = ("metadata.jsonl", "metadata.csv")
CAPTION_SUFFIXES = (".txt", ".caption")  # suffixes of files beside an image, in the order in which they are looked for
KEYS = ("text", "prompt", "caption")  # of a row
# Of the reference images of a row: our name, those of `datasets` in folders of images, that of musubi-tuner
COLUMNS = ("reference", "cond_image", "conditioning_image", "control_image", "source_image", "input_image")
OF_DATASETS = tuple(f"{name}_file_name{s}" for name in COLUMNS for s in ("s", ""))
REFERENCES = ("references", *OF_DATASETS, "control_path")
CONTROL = re.compile(r"control_path_\d+")  # of musubi-tuner, one key for each
MOST_BYTES = 2**30  # of a metadata file: some four million rows
MOST_CAPTION_BYTES = 2**20  # of the captions of an image
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
WORDS = ("caption", "metadata", "prompt", "tags", "dataset", "labels", "meta_")  # in names of files with captions
HALVES = re.compile("[\ud800-\udfff]")  # of surrogate pairs
DOCUMENTS = ("readme", "license", "licence", "notes", "sources", "prompts", "sample_prompts")  # a .txt that is none


class ImageCaption(NamedTuple):
    """The text of an image, and the name of the file that has it, or its suffix where it is named as the image."""

    text: str
    source: str
    more: tuple[str, ...] = ()  # further texts of the same image
    references: tuple[Path, ...] = ()  # of a metadata file: the reference images that a row names


class CaptionFiles:
    """All files with captions of a folder, read.

    Attributes:
        rows: What metadata files say, by the path of the image; some of the texts may be empty.
        problems: What is wrong with the files, one sentence each.
        unused: Files that look like captions and are not used, each with the reason.

    Args:
        root: The folder.
        entries: All files in it and in those of its subfolders that are read.
        lines: Whether each line of a text is a caption of its own.
        links: What becomes of links in metadata files that lead out of their folders.
    """

    def __init__(self, root: Path, entries: Sequence[Path], *, lines: bool = False, links: Links = REFUSED):
        self.root, self.lines, self.links = root, lines, links
        self.rows: dict[Path, ImageCaption] = {}
        self.problems: list[str] = []
        self.unused: dict[Path, str] = {}
        self._caption_files: dict[Path, list[Path]] = {}  # by the path of the image without its suffix
        for path in entries:
            if path.suffix.lower() in CAPTION_SUFFIXES and path.is_file():
                self._caption_files.setdefault(path.with_suffix(""), []).append(path)
        self._metadata = [path for path in entries if is_metadata(path.name)]
        for path in sorted(self._metadata, key=lambda path: (len(path.parts), path.name)):
            self._read_metadata(path)

    def of_image(self, image: Path) -> ImageCaption | None:
        """The caption of an image: that of a metadata file, else of a file beside it; None where there is none."""
        found = [caption for caption in (self.rows.get(image),) if caption and caption.text]
        files = self._caption_files.get(image.with_suffix(""), [])
        for path in sorted(files, key=lambda path: CAPTION_SUFFIXES.index(path.suffix.lower())):
            texts = self._read_texts(path)
            if not found and texts:
                found.append(ImageCaption(texts[0], path.suffix.lower(), tuple(texts[1:])))
            elif found and texts and not _is_same(texts, found[0]):
                self.unused[path] = f"{image.name} has its caption from {found[0].source}, and that is another"
        return found[0] if found else None

    def note_unused(self, entries: Iterable[Path], images: Iterable[Path]) -> None:
        """Finds what else looks like captions and is not used.

        Args:
            entries: All files of the folder.
            images: Those of its images.
        """
        stems = {image.with_suffix("") for image in images}
        names = {path.name for path in stems}
        for path in entries:
            if not is_metadata(path.name) and path not in self.unused and (reason := _why_unused(path, stems, names)):
                self.unused[path] = reason

    def _read_metadata(self, file: Path) -> None:
        found, bad = read_metadata(file, lines=self.lines, links=self.links)
        names = sorted((each.name for each in self._metadata if each.parent == file.parent), key=_by_preference)
        if len(names) > 1:
            found, bad = {}, [f"is one of {'two' if len(names) == 2 else len(names)}: keep {' or '.join(names)}"]
        twice = sorted(path.name for path in found if path in self.rows)
        bad += [f"names {name}, which an outer metadata file names already" for name in twice]
        if found and not any(caption.text for caption in found.values()):
            self.unused[file] = f"no row has a {', '.join(KEYS[:-1])} or {KEYS[-1]}"
        elif not found and not bad and file.suffix == ".json":
            self.unused[file] = "it has no object with a caption or tags for each image, as kohya's scripts write it"
        self.problems += [f"{file.relative_to(self.root)} {problem}" for problem in bad]
        self.rows |= found

    def _read_texts(self, path: Path) -> list[str]:
        try:
            return _texts(read_bounded(path, MOST_CAPTION_BYTES).decode("utf-8-sig"), lines=self.lines)
        except ValueError as error:
            self.problems.append(f"{path.name} cannot be read as UTF-8 text: {error}")
            return []


def _texts(text: str, *, lines: bool) -> list[str]:
    """The captions in a text without spaces around them, and no empty ones: its lines, or all of it."""
    return [found for part in (text.splitlines() if lines else [text]) if (found := " ".join(part.split()))]


def is_metadata(name: str) -> bool:
    """Whether a file has the captions of images beside it, by its name."""
    return name in METADATA or CAPTION_FILES.fullmatch(name) is not None


def _by_preference(name: str) -> tuple[int, str]:
    return METADATA.index(name) if name in METADATA else len(METADATA), name


def _is_same(texts: Sequence[str], caption: ImageCaption) -> bool:
    """Whether a file beside an image says what its metadata do; kohya's join such files."""
    of_metadata = [" ".join(text.split()) for text in (caption.text, *caption.more)]
    joined = CAPTION_FILES.fullmatch(caption.source) and all(text in " ".join(of_metadata) for text in texts)
    return bool(joined) or list(texts) == of_metadata


def is_image(name: str) -> bool:
    """Whether a file is an image, by its name."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _why_unused(path: Path, stems: set[Path], names: set[str]) -> str:
    """Why a file that looks like captions is not used; empty where it does not look like that, or is used."""
    suffix, stem = path.suffix.lower(), path.stem
    if not suffix or path.name.startswith("."):
        return ""
    if suffix in CAPTION_SUFFIXES and path.with_suffix("") not in stems:
        if is_image(stem) and path.with_suffix("").is_file():
            return f"the caption of {stem} is read from {Path(stem).stem}.txt"
        return "" if stem.lower() in DOCUMENTS else "no image has this name"
    if suffix in DATA_SUFFIXES and (stem in names or any(word in stem.lower() for word in WORDS)):
        return f"only {' and '.join(METADATA)}, or a .txt or .caption file of an image's name, are read"
    return ""


# --- metadata files --------------------------------------------------------------------------------------------------


def read_metadata(
    file: Path, *, lines: bool = False, links: Links = REFUSED
) -> tuple[dict[Path, ImageCaption], list[str]]:
    """The captions by path that a metadata file has, some of them empty, and the problems of its lines.

    Args:
        file: metadata.jsonl, metadata.csv, or one of kohya's.
        lines: Whether each line of a text is a caption of its own.
        links: What becomes of links that lead out of its folder.
    """
    captions: dict[Path, ImageCaption] = {}
    first: dict[Path, str] = {}  # where an image is named
    problems: list[str] = []
    try:
        content = read_bounded(file, MOST_BYTES)
        text = decoded(content) if file.suffix == ".csv" else re.sub("\r\n?", "\n", content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return {}, [f"cannot be read as UTF-8 text: {error}"]
    except (OSError, ValueError) as error:
        return {}, [str(error)]
    for where, row in _rows(file, text, problems, lines=lines):
        try:
            name, texts = _of_row(row)
            path = _named(file.parent, name, links)
            references = tuple(_named(file.parent, each, links) for each in _references_of(row))
            if path in captions:
                raise ValueError(f"names {path.name} again (first in {first[path]})")
            caption = _as_caption(texts, file.name, lines=lines)
            captions[path], first[path] = caption._replace(references=references), where
        except ValueError as error:
            problems.append(f"{where} {error}")
    return captions, problems


def _rows(file: Path, text: str, problems: list[str], *, lines: bool) -> Iterator[tuple[str, Any]]:
    """The rows of a metadata file, each with its place in it for messages."""
    if file.suffix == ".json":
        images = [path for path in sorted(file.parent.iterdir()) if is_image(path.name)]
        yield from kohya_rows(file, text, images, problems, lines=lines)
    else:
        names = ("file_name", *KEYS, *REFERENCES)
        is_table = file.suffix == ".csv"
        rows = read_table(text, names.__contains__, problems) if is_table else _json_rows(text, problems)
        yield from ((f"line {number}", row) for number, row in rows)


def _json_rows(text: str, problems: list[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut captions at U+2028
        if line.strip():
            try:
                yield number, parse_json(line, f"line {number}", object)
            except ValueError as error:
                problems.append(str(error))


def _as_caption(texts: Sequence[str], source: str, *, lines: bool) -> ImageCaption:
    if lines:
        texts = [line for text in texts for line in _texts(text, lines=True)]
    first, *others = [text.strip() for text in texts if text.strip()] or [""]
    return ImageCaption(first, source, tuple(others))


def _of_row(row: Any) -> tuple[str, Sequence[str]]:
    """The name of an image, and its captions."""
    name = row.get("file_name") if isinstance(row, Mapping) else None
    if not isinstance(name, str) or not name:
        raise ValueError("must be an object with the key file_name")
    values = ((key, row[key]) for key in KEYS if row.get(key) is not None)
    captions = {key: value if isinstance(value, list) else [value] for key, value in values}
    if not all(isinstance(text, str) and not HALVES.search(text) for texts in captions.values() for text in texts):
        raise ValueError("has a caption that is not text")
    if len({tuple(text.strip() for text in texts) for texts in captions.values()}) > 1:
        raise ValueError(f"has different values for {' and '.join(captions)}: keep one")
    return name, next(iter(captions.values()), [])


def _references_of(row: Mapping[str, Any]) -> list[str]:
    """The names of the reference images of a row: a text or a list of texts, or one text in each of several keys."""
    numbered = sorted((key for key in row if CONTROL.fullmatch(key)), key=lambda key: int(key.rpartition("_")[2]))
    keys = [key for key in (*REFERENCES, *numbered) if row.get(key)]
    if sum(key in REFERENCES for key in keys) + bool(numbered) > 1:
        raise ValueError(f"has references in {' and '.join(keys)}: keep one")
    values = [value for key in keys for value in (row[key] if isinstance(row[key], list) else [row[key]])]
    if not all(isinstance(value, str) and value for value in values):
        raise ValueError(f"has references that are no names of files, in {' and '.join(keys)}")
    return values


def _named(folder: Path, name: str, links: Links) -> Path:
    """The path of an image that a metadata file of a folder names.

    Raises:
        ValueError: It is outside of the folder, or does not exist.
    """
    try:
        path = inside(folder, name, links)
    except ValueError as error:
        raise ValueError(f"names {name if name.isprintable() else repr(name)}, which {error}") from None
    if not path.is_file():
        raise ValueError(f"names {name}, which does not exist")
    return path
