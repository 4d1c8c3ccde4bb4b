"""dora-mm caption: captions of the images in a folder, by a vision-language model."""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dora_mm.config.paths import resolve_model, resolve_path
from dora_mm.config.vl import DecodeConfig
from dora_mm.data.images.captions import METADATA
from dora_mm.data.images.folder import uncaptioned_images
from dora_mm.data.images.pixels import load_rgb
from dora_mm.data.vl.answers import texts_of
from dora_mm.data.vl.example import Example
from dora_mm.models.vl.families import load_for_questions
from dora_mm.models.vl.vl_model import VLModel
from dora_mm.utils.day import today
from dora_mm.utils.devices import default_device
from dora_mm.utils.progress import tracked

log = logging.getLogger(__name__)


def main(
    folder: str,
    *,
    model: str,
    prompt: str,
    max_new_tokens: int | None = None,
    batch_size: int = 1,
    dtype: str | None = None,
    revision: str | None = None,
) -> None:
    """Captions the images that have no caption, and writes each at once into metadata.jsonl, after the lines it has.

    No caption that exists is changed. A command that was stopped goes on where it was: what it wrote is there already.

    Args:
        folder: The images.
        model: A folder of `save_pretrained`, or a hub name.
        prompt: The question about each image, prompted as in `dora-mm ask`.
        max_new_tokens: The longest caption in tokens; None: 256.
        batch_size: Images that are captioned together.
        dtype: The dtype of the weights; None: that of the model's config.
        revision: A commit, branch or tag of a hub model; None: its main branch.

    Raises:
        ValueError: The folder, an image, its captions or the model cannot be used.
    """
    if not prompt.strip():
        raise ValueError("--prompt is empty")
    root, file = resolve_path(folder, "FOLDER"), resolve_path(folder, "FOLDER") / METADATA[0]
    drop_torn_line(file)
    images, num_captioned = uncaptioned_images(root)
    for image in images:
        load_rgb(image)
    if not images:
        print(f"all {num_captioned} images of {root} have captions")
        return
    path = resolve_model(model, "--model")
    given = {key: value for key, value in (("dtype", dtype), ("revision", revision)) if value}
    settings: dict[str, Any] = {"seed": 0, "trained_tower": False, "device": default_device(), "today": today()}
    vl = load_for_questions(path, None, given=given, **settings)
    without = write_captions(vl, images, prompt, file, DecodeConfig(max_new_tokens=max_new_tokens), batch_size)
    print(f"{len(images) - len(without)} captions in {file}, {num_captioned} images had theirs")
    if without:
        log.warning("%d images got an empty answer, and have no caption: %s", len(without), ", ".join(without[:8]))


def write_captions(
    vl: VLModel, images: Sequence[Path], prompt: str, file: Path, decode: DecodeConfig, batch_size: int
) -> list[str]:
    """Captions images and appends a line for each; returns the names of those with an empty answer."""
    answer, without = vl.answerer(vl.question_task, decode, ()), []
    starts = tracked(range(0, len(images), batch_size), "captions", "batches")
    with file.open("a", encoding="utf-8") as lines:
        for start in starts:
            batch = images[start : start + batch_size]
            answers = texts_of(answer([Example(image.name, (str(image.absolute()),), prompt) for image in batch], "/"))
            for image, text in zip(batch, answers, strict=True):
                if caption := " ".join(text.split()):
                    row = {"file_name": image.name, "text": caption}
                    lines.write(json.dumps(row, ensure_ascii=False) + "\n")
                else:
                    without.append(image.name)
            lines.flush()
            os.fsync(lines.fileno())
    return without


def drop_torn_line(file: Path) -> None:
    """Removes the start of a line that a killed command left at the end of a file, and ends a line without an end."""
    if not file.is_file() or not (content := file.read_bytes()) or content.endswith(b"\n"):
        return
    head, _, last = content.rpartition(b"\n")
    try:
        json.loads(last)
    except ValueError:
        if last.startswith(b'{"file_name": '):  # as this command writes it; else a person's mistake, which is reported
            os.truncate(file, len(head) + 1 if head else 0)
    else:
        with file.open("ab") as lines:
            lines.write(b"\n")
