"""dora-mm gallery: the pictures of finished runs on one page, to filter, sort and compare them in a browser."""

from collections.abc import Sequence
from pathlib import Path

from dora_mm.sampling.gallery import GALLERY, read_pictures, write_gallery
from dora_mm.utils.run_directory import new_folder


def main(runs: Sequence[Path], *, output: Path | None = None) -> None:
    """Writes the gallery and prints the path of its page.

    Args:
        runs: Run directories, each with a manifest, or of a training.
        output: The folder; None is `gallery` in the run, or for several runs a numbered folder in runs/gallery.

    Raises:
        ValueError: A run has no manifest or a damaged one, or the folder holds something else than a gallery.
    """
    entries = {run: read_pictures(run) for run in runs}
    page = write_gallery(entries, output or default_folder(list(entries)))
    print(f"gallery  {page}")


def default_folder(runs: Sequence[Path]) -> Path:
    return runs[0] / GALLERY if len(runs) == 1 else new_folder("gallery")
