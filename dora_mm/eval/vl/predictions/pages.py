"""The page of a file of predictions, or of two of the same rows."""

import logging
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dora_mm.data.images.frames import is_video, stills
from dora_mm.data.images.pixels import load_rgb
from dora_mm.data.vl.example import Example, Predictions
from dora_mm.data.vl.image_folder import ImageFolder
from dora_mm.eval.vl.metrics import score_row
from dora_mm.eval.vl.pages import SIDE, PageExample, PageSection, write_examples_page
from dora_mm.registries.suites import file_stem
from dora_mm.utils.folders import REFUSED, Links
from dora_mm.utils.progress import tracked

log = logging.getLogger(__name__)


def write_page(
    path: Path,
    task: str,
    predictions: Predictions,
    before: Predictions | None = None,
    images: str | None = None,
    links: Links = REFUSED,
) -> None:
    """Writes a page of all rows, with small images in a folder beside it, which has its name and `_images`.

    Args:
        path: The page, a new file.
        task: The suite.
        predictions: Examples with predictions.
        before: Those of another run of the same rows, in the same order; None: there are none.
        images: The folder of images; None: no image is shown.
        links: What becomes of links that lead out of it.

    Raises:
        ValueError: The page or its folder exists, or images are missing in `images` or outside of it; their number and
            one are named.
    """
    folder = path.with_name(f"{path.stem}_images")
    for page_path in (path, folder):
        if page_path.exists():
            raise ValueError(f"--page: {page_path} exists: name a new file")
    paths = _found([example for example, _ in predictions], images, links)
    shown = _thumbnails(folder, paths)
    earlier = [None] * len(predictions) if before is None else [text for _, text in before]
    examples = [
        PageExample.from_example(
            example,
            text,
            score_row(task, example, text),
            [address for name in example.images for address in shown.get(name, ())],
            None if was is None else (was, score_row(task, example, was)),
        )
        for (example, text), was in zip(predictions, earlier, strict=True)
    ]
    title = file_stem(task)
    write_examples_page(path, title, [PageSection(title, examples)])


def _found(examples: Sequence[Example], images: str | None, links: Links) -> dict[str, Path]:
    """The files of images, by their names."""
    folder = ImageFolder(None if images is None else Path(images), links=links)
    names = dict.fromkeys(name for example in examples for name in example.images if not name.startswith("data:"))
    found = {name: folder.find(name) for name in names}
    missing = [name for name, path in found.items() if path is None]
    if missing and (reason := folder.refusal(missing[0])) and images is not None:
        raise ValueError(f"--images: {len(missing)} of {len(names)} images may not be read: {missing[0]} {reason}")
    if missing and images is not None:
        raise ValueError(f"--images: {len(missing)} of {len(names)} images are not in {images} (one is {missing[0]})")
    if missing:
        log.warning("%d of %d images are not shown: name their folder with --images", len(missing), len(names))
    return {name: Path(images or "", path) for name, path in found.items() if path is not None}


def _thumbnails(folder: Path, paths: dict[str, Path]) -> dict[str, list[str]]:
    """Writes small images, of videos their first ones; their addresses from the page, by name."""
    shown: dict[str, list[str]] = {}
    for number, (name, path) in enumerate(tracked(paths.items(), "images", "images")):
        shown[name] = []
        for part, image in enumerate(stills(path) if is_video(str(path)) else [load_rgb(path, "white")]):
            image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{number:05d}_{part}.webp"
            image.save(file, "WEBP", quality=80, method=2)
            shown[name].append(f"{folder.name}/{file.name}")
    return shown
