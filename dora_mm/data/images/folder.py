"""A folder of captioned images: captions from metadata.jsonl, else <name>.txt, else the instance prompt."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from dora_mm.config import resolve_path
from dora_mm.data.images.buckets import Size
from dora_mm.data.images.pixels import SUFFIXES, load_rgb

log = logging.getLogger(__name__)
METADATA = "metadata.jsonl"


class CaptionedImage(NamedTuple):
    """One training image and its caption."""

    path: Path
    caption: str
    size: Size  # (h, w), upright, before resizing
    digest: str  # SHA-256 of the file, part of the key of cached latents


def read_captioned_images(
    folder: str | Path, *, instance_prompt: str | None = None, placeholder: str | None = None
) -> list[CaptionedImage]:
    """Reads every image of a folder with its caption, sorted by path.

    All images are decoded once, so that a broken one stops the run at its start. A blank caption counts as missing: the
    next source of captions is used. Images that take the instance prompt, duplicates and ignored files are logged by
    name.

    Args:
        folder: The folder, relative to the current directory or to the packaged configs, or absolute.
        instance_prompt: The caption of images that have none.
        placeholder: A word that at least one caption must contain.

    Raises:
        ValueError: Lists all problems of the folder: it is missing, unreadable or has no images; an image is broken,
            empty or too large; metadata.jsonl is malformed or names an image that is missing, outside the folder or
            listed already; an image has no caption; no caption contains the placeholder.
    """
    root = resolve_path(folder, "data.folder")
    names = _list(root)
    rows, problems = _read_metadata(root) if METADATA in names else ({}, [])
    paths = sorted({root / name for name in names if _is_image(name)} | set(rows))
    if not paths and not problems:
        raise ValueError(f"data.folder: {root} has no images ({', '.join(SUFFIXES)})")

    images, uncaptioned, with_prompt = [], [], []
    for path in tqdm(paths, desc="reading images", unit="image", delay=2, disable=None):
        caption = rows.get(path) or _read_text(path.with_suffix(".txt"), problems)
        if not caption and instance_prompt:
            caption = instance_prompt
            with_prompt.append(path)
        if not caption:
            uncaptioned.append(path)
        try:
            images.append(CaptionedImage(path, caption, measure(path), _digest(path)))
        except ValueError as error:
            problems.append(str(error))
    if uncaptioned:
        problems.append(f"{_counted(uncaptioned)} without a caption: caption them or set data.instance_prompt")
    if not problems and placeholder:
        problems += _check_placeholder(images, placeholder)
    if problems:
        raise ValueError(_report(root, problems))
    _log_notes(root, names, images, with_prompt if len(with_prompt) < len(images) else [])
    return images


def digest_of(images: Sequence[CaptionedImage]) -> str:
    """SHA-256 that identifies a data set: the content of its images, their captions and their order."""
    return hashlib.sha256(json.dumps([(image.digest, image.caption) for image in images]).encode()).hexdigest()


def measure(path: Path) -> Size:
    """(h, w) of an image as returned by `load_rgb`; the image is fully decoded.

    Raises:
        ValueError: As in `load_rgb`.
    """
    image: Image.Image = load_rgb(path)
    return image.height, image.width


def contains_word(text: str, word: str) -> bool:
    """Whether the text contains the word as a separate word: "a TOK icon" contains TOK, "TOKYO" does not."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def _list(root: Path) -> list[str]:
    if not root.is_dir():
        raise ValueError(f"data.folder: {root} is not a folder")
    try:
        return sorted(entry.name for entry in root.iterdir())
    except OSError as error:
        raise ValueError(f"data.folder: {root} cannot be read: {error.strerror}") from None


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _read_metadata(root: Path) -> tuple[dict[Path, str], list[str]]:
    """The captions by path, and the problems of the lines."""
    captions: dict[Path, str] = {}
    lines_of: dict[Path, int] = {}
    problems = []
    try:
        lines = (root / METADATA).read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut captions at U+2028
    except (OSError, UnicodeDecodeError) as error:
        return {}, [f"{METADATA} cannot be read as UTF-8 text: {error}"]
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            path, caption = _read_row(root, line)
            if path in captions:
                raise ValueError(f"names {path.name} again (first in line {lines_of[path]})")
            captions[path], lines_of[path] = caption, number
        except ValueError as error:
            problems.append(f"{METADATA} line {number} {error}")
    return captions, problems


def _read_row(root: Path, line: str) -> tuple[Path, str]:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON: {error.msg} at character {error.pos + 1}") from None
    name = row.get("file_name") if isinstance(row, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError("must be an object with the key file_name")
    captions = {key: row[key] for key in ("text", "prompt") if row.get(key) is not None}
    if not all(isinstance(caption, str) for caption in captions.values()):
        raise ValueError("has a caption that is not text")
    if len({caption.strip() for caption in captions.values()}) > 1:
        raise ValueError("has different values for text and prompt: keep one")
    return _inside(root, name), next(iter(captions.values()), "").strip()


def _inside(root: Path, name: str) -> Path:
    """The path of an image named in metadata.jsonl; `..`, absolute paths and links must not leave the folder."""
    path = root / os.path.normpath(name)
    try:
        real = path.resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, a NUL byte
        raise ValueError(f"names {name!r}, which is not a valid path") from None
    if not real.is_relative_to(root.resolve()):
        raise ValueError(f"names {name}, which is outside the folder: copy the image into it")
    if not real.is_file():
        raise ValueError(f"names {name}, which does not exist")
    return path


def _read_text(path: Path, problems: list[str]) -> str:
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").split()) if path.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path.name} cannot be read as UTF-8 text: {error}")
        return ""


def _check_placeholder(images: list[CaptionedImage], placeholder: str) -> list[str]:
    without = [image.path for image in images if not contains_word(image.caption, placeholder)]
    if len(without) < len(images):
        if without:
            log.warning("%s without the placeholder %s", _counted(without), placeholder)
        return []
    example = images[0].caption
    return [f"no caption contains the placeholder {placeholder} as a word (data.placeholder); the first is {example!r}"]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _report(root: Path, problems: list[str]) -> str:
    if len(problems) == 1:
        return f"data.folder {root}: {problems[0]}"
    return "\n  ".join([f"data.folder {root}: {len(problems)} problems", *problems])


def _log_notes(root: Path, names: list[str], images: list[CaptionedImage], with_prompt: list[Path]) -> None:
    """Logs what the user should know, although it does not stop the run."""
    if with_prompt:
        log.warning("%s without a caption: data.instance_prompt is used", _counted(with_prompt))
    first_of: dict[str, Path] = {}
    duplicates = [image.path for image in images if first_of.setdefault(image.digest, image.path) != image.path]
    if duplicates:
        log.warning("%s identical to another image of the folder", _counted(duplicates))
    caption_files = {image.path.with_suffix(".txt").name for image in images}
    others = [root / name for name in names if not (_is_image(name) or name == METADATA or name in caption_files)]
    if others:
        log.info("%s ignored: neither images nor captions", _counted(others, "file"))


def _counted(paths: Iterable[Path], noun: str = "image") -> str:
    """The start of a sentence: "3 images (a.png, b.png, c.png) are"."""
    names = [path.name for path in paths]
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''} ({listed}) {'are' if len(names) > 1 else 'is'}"
