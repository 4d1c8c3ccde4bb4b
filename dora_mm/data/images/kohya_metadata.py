"""meta_cap.json and its successors, the metadata of kohya's finetune scripts, as rows of metadata.jsonl.

Shapes and joining are those of sd-scripts: finetune/merge_captions_to_metadata.py, FineTuningDataset of train_util.py.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dora_mm.utils.json_text import parse_json

SEPARATOR = ","  # caption_separator, with which theirs joins caption and tags
TEXTS = ("caption", "tags")


def kohya_rows(
    file: Path, text: str, images: list[Path], problems: list[str], *, lines: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each image of the file: its place in it for messages, and the row.

    Sizes (train_resolution, image_size) are not read: they follow from the image and data.resolution.

    Args:
        file: The metadata file.
        text: Its content.
        images: The images beside it, which it names with or without a suffix.
        problems: Takes a sentence for each entry that cannot be read.
        lines: Whether each line of a caption is one of its own, to which the tags are added.
    """
    try:
        entries = parse_json(text, "it")
    except ValueError as error:
        problems.append(str(error))
        return
    if not all(isinstance(entry, Mapping) for entry in entries.values()):
        return  # something else of this name
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        by_stem[image.stem].append(image)
    for key, entry in entries.items():
        try:
            yield (
                f"entry {key!r}",
                {"file_name": _file_name(file.parent, key, by_stem), "text": _text(entry, lines=lines)},
            )
        except ValueError as error:
            problems.append(f"entry {key!r} {error}")


def _file_name(folder: Path, key: str, by_stem: Mapping[str, list[Path]]) -> str:
    """The name relative to the folder; a key is that, without its suffix, or a path with --full_path."""
    if found := by_stem.get(key, []):
        if len(found) > 1:
            raise ValueError(f"is the name of {' and '.join(path.name for path in found)}: keep one")
        return found[0].name
    if not (folder / key).is_file() and os.path.isfile(key):
        return os.path.abspath(key)
    return key


def _text(entry: Mapping[str, Any], *, lines: bool) -> str:
    caption, tags = (entry.get(name) or "" for name in TEXTS)
    if not isinstance(caption, str) or not isinstance(tags, str):
        raise ValueError("has a caption or tags that are not text")
    if lines:
        tags = tags.replace("\n", SEPARATOR)
    texts = [line for line in caption.split("\n") if line.strip()] if lines else [caption]
    return "\n".join(SEPARATOR.join(filter(None, (text, tags))) for text in texts or [""])
