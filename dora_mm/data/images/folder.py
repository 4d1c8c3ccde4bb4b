"""A folder of captioned images: captions from metadata.jsonl, else <name>.txt, else the instance prompt.

With `data.subfolders`, the images of its subfolders count, too. A folder named as in kohya's trainers, 10_name, repeats
its images 10 times in every epoch.
"""

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from dora_mm.config import resolve_path
from dora_mm.config.images import DataConfig
from dora_mm.data.images.buckets import Size
from dora_mm.data.images.pixels import SUFFIXES, load_rgb
from dora_mm.utils.digest import file_digest

log = logging.getLogger(__name__)
METADATA = "metadata.jsonl"
REPEATS = re.compile(r"(\d+)_.*")  # kohya's name of a folder whose images are repeated


class CaptionedImage(NamedTuple):
    """One training image and its caption."""

    path: Path
    caption: str
    size: Size  # (h, w), upright, before resizing
    digest: str  # SHA-256 of the file, part of the key of cached latents
    source: str = METADATA  # where the caption is from: METADATA, ".txt" or "data.instance_prompt"
    repeats: int = 1  # how often it occurs in an epoch, by the name of its subfolder


def read_captioned_images(
    folder: str | Path,
    *,
    instance_prompt: str | None = None,
    placeholder: str | None = None,
    subfolders: bool = False,
    key: str = "data.folder",
) -> list[CaptionedImage]:
    """Reads every image of a folder with its caption, sorted by path.

    All images are decoded once, so that a broken one stops the run at its start. A blank caption counts as missing: the
    next source of captions is used. Images that take the instance prompt, duplicates and ignored files are logged by
    name.

    Args:
        folder: The folder, relative to the current directory or to the packaged configs, or absolute.
        instance_prompt: The caption of images that have none.
        placeholder: A word that at least one caption must contain.
        subfolders: Whether to read the images of subfolders, too, with a metadata.jsonl in any of them. Hidden folders
            and linked ones are left out.
        key: The key of the config that names the folder, for messages.

    Raises:
        ValueError: Lists all problems of the folder: it is missing, unreadable or has no images; an image is broken,
            empty or too large; metadata.jsonl is malformed or names an image that is missing, outside the folder or
            listed already; an image has no caption; no caption contains the placeholder; all images are in subfolders,
            or the name of a subfolder asks for 0 repeats.
    """
    root = resolve_path(folder, key)
    folders = _folders(root) if subfolders else [root]
    entries = [path for each in folders for path in _list(each, key)]
    rows, problems = _read_all_metadata(root, [path for path in entries if path.name == METADATA])
    paths = sorted({path for path in entries if _is_image(path.name)} | set(rows))
    deeper = [] if subfolders else _images_in_subfolders(root, paths)
    if not paths and not problems:
        raise ValueError(_no_images(root, deeper, key))

    images, uncaptioned = [], []
    for path in tqdm(paths, desc="reading images", unit="image", delay=2, disable=None):
        text = rows.get(path)
        source = METADATA if text else ".txt"
        caption = text or _read_text(path.with_suffix(".txt"), problems)
        if not caption and instance_prompt:
            caption, source = instance_prompt, "data.instance_prompt"
        if not caption:
            uncaptioned.append(path)
        try:
            repeats = _repeats(root, path) if subfolders else 1
            images.append(CaptionedImage(path, caption, measure(path), file_digest(path), source, repeats))
        except ValueError as error:
            problems.append(str(error))
    if uncaptioned:
        problems.append(f"{_counted(uncaptioned)} without a caption: caption them or set data.instance_prompt")
    if not problems and placeholder:
        problems += _check_placeholder(images, placeholder)
    if problems:
        raise ValueError(_report(root, problems, key))
    _log_notes([path for path in entries if path not in folders], images, deeper)
    return images


def read_training_images(data: DataConfig) -> list[CaptionedImage]:
    """Reads the images of a config's `data` section; see `read_captioned_images`.

    Raises:
        ValueError: As there.
    """
    return read_captioned_images(
        data.folder, instance_prompt=data.instance_prompt, placeholder=data.placeholder, subfolders=data.subfolders
    )


def digest_of(images: Sequence[CaptionedImage]) -> str:
    """SHA-256 that identifies a data set: the content of its images, their captions, order and repeats."""
    rows = [(image.digest, image.caption, *([image.repeats] if image.repeats != 1 else [])) for image in images]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


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


def _folders(root: Path) -> list[Path]:
    """The folder and all of its subfolders, but for hidden and linked ones."""
    found = []
    for folder, names, _ in os.walk(root):
        names[:] = sorted(name for name in names if not name.startswith("."))
        found.append(Path(folder))
    return found or [root]  # a path that is no folder gives none, and is reported when it is listed


def _list(folder: Path, key: str) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{key}: {folder} is not a folder")
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise ValueError(f"{key}: {folder} cannot be read: {error.strerror}") from None


def _images_in_subfolders(root: Path, listed: Sequence[Path]) -> list[Path]:
    """The images in subfolders that are not read without `data.subfolders`: those that metadata.jsonl does not name."""
    known = set(listed)
    return [
        Path(folder, name)
        for folder in _folders(root)[1:]
        for name in sorted(os.listdir(folder))
        if _is_image(name) and Path(folder, name) not in known
    ]


def _no_images(root: Path, deeper: Sequence[Path], key: str) -> str:
    if not deeper:
        return f"{key}: {root} has no images ({', '.join(SUFFIXES)})"
    first = deeper[0].relative_to(root)
    return (
        f"{key}: {root} has no images itself, but {len(deeper)} in subfolders, such as {first}: set "
        "data.subfolders=true to read these"
    )


def _repeats(root: Path, path: Path) -> int:
    """How often the image occurs in an epoch: the number in the name of the innermost folder that has one, else 1."""
    for name in reversed(path.relative_to(root).parts[:-1]):
        if found := REPEATS.fullmatch(name):
            if int(found[1]) == 0:
                raise ValueError(f"{path}: the folder {name} asks for 0 repeats: rename it, or move it elsewhere")
            return int(found[1])
    return 1


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _read_all_metadata(root: Path, files: Sequence[Path]) -> tuple[dict[Path, str], list[str]]:
    """The captions by path, and the problems of the lines; an outer file is read before those in its subfolders."""
    captions: dict[Path, str] = {}
    problems = []
    for file in sorted(files, key=lambda file: len(file.parts)):
        found, bad = _read_metadata(file.parent)
        twice = sorted(path.name for path in found if path in captions)
        bad += [f"names {name}, which an outer {METADATA} names already" for name in twice]
        name = file.relative_to(root)
        problems += [f"{name} {problem}" for problem in bad]
        captions |= found
    return captions, problems


def _read_metadata(root: Path) -> tuple[dict[Path, str], list[str]]:
    """The captions by path, and the problems of the lines."""
    captions: dict[Path, str] = {}
    lines_of: dict[Path, int] = {}
    problems = []
    try:
        lines = (root / METADATA).read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut captions at U+2028
    except (OSError, UnicodeDecodeError) as error:
        return {}, [f"cannot be read as UTF-8 text: {error}"]
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            path, caption = _read_row(root, line)
            if path in captions:
                raise ValueError(f"names {path.name} again (first in line {lines_of[path]})")
            captions[path], lines_of[path] = caption, number
        except ValueError as error:
            problems.append(f"line {number} {error}")
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
    if not all(isinstance(caption, str) and _is_text(caption) for caption in captions.values()):
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


def _is_text(text: str) -> bool:
    """Whether the text is valid Unicode, without half a surrogate pair, which JSON can contain."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


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
    return [
        f"no caption contains the placeholder {placeholder} as a word; the first is {images[0].caption!r}: set "
        f"data.placeholder to a word of theirs, or to null; or, for images without captions, data.instance_prompt"
    ]


def _report(root: Path, problems: list[str], key: str) -> str:
    if len(problems) == 1:
        return f"{key} {root}: {problems[0]}"
    return "\n  ".join([f"{key} {root}: {len(problems)} problems", *problems])


def _log_notes(entries: Sequence[Path], images: list[CaptionedImage], deeper: Sequence[Path]) -> None:
    """Logs what the user should know, although it does not stop the run.

    Args:
        entries: All files and folders that were found.
        images: The images that are used.
        deeper: Images in subfolders, which are not used.
    """
    if deeper:
        log.warning("%s not used, because in subfolders: data.subfolders=true reads these, too", _counted(deeper))
    repeated = Counter((image.path.parent.name, image.repeats) for image in images if image.repeats != 1)
    for (name, repeats), count in sorted(repeated.items()):
        log.info("%s: %d image%s, %d times in an epoch", name, count, "s" if count > 1 else "", repeats)
    with_prompt = [image.path for image in images if image.source == "data.instance_prompt"]
    if len(with_prompt) < len(images) and with_prompt:
        log.warning("%s without a caption: data.instance_prompt is used", _counted(with_prompt))
    first_of: dict[str, Path] = {}
    duplicates = [image.path for image in images if first_of.setdefault(image.digest, image.path) != image.path]
    if duplicates:
        log.warning("%s identical to another image of the folder", _counted(duplicates))
    used = {image.path.with_suffix(".txt") for image in images} | {path.parent for path in deeper}
    used |= {folder for path in used for folder in path.parents}
    others = [path for path in entries if not (_is_image(path.name) or path.name == METADATA or path in used)]
    if others:
        log.info("%s ignored: neither images nor captions", _counted(others, "file"))


def _counted(paths: Iterable[Path], noun: str = "image") -> str:
    """The start of a sentence: "3 images (a.png, b.png, c.png) are"."""
    names = [path.name for path in paths]
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''} ({listed}) {'are' if len(names) > 1 else 'is'}"
