"""dora-mm gallery: the pictures of finished runs on one page, to filter, sort and compare them in a browser."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from dora_mm.sampling.gallery import write_gallery
from dora_mm.sampling.gallery.training import read_pictures
from dora_mm.sampling.manifest import MANIFEST
from dora_mm.utils.run_directory import new_folder


def main(runs: Sequence[Path], *, output: Path | None = None) -> None:
    """Writes the gallery and prints the path of its page.

    Args:
        runs: Run directories, each with a manifest, or of trainings that drew sheets.
        output: The folder; None is `gallery` in the run, or for several runs a numbered folder in runs/gallery.

    Raises:
        ValueError: A run has no manifest or a damaged one, or the folder holds something else than a gallery.
    """
    entries = {run: read_pictures(run) for run in runs}
    page = write_gallery(entries, output or default_folder(list(entries)))
    print(f"gallery  {page}")
    print(next_step(list(entries)))


def next_step(runs: Sequence[Path]) -> str:
    """What to do with the page: a training is drawn with, and of other pictures the best are drawn again."""
    trained = next((run for run in runs if not (run / MANIFEST).is_file()), None)
    if trained is None:
        return "to go on  open it, mark the best with f, save them as a job: dora-mm sample favourites.jsonl"
    path = shlex.quote(f"adapter.path={trained}")
    return f"to draw  dora-mm sample --set {path} 'prompts=[...]' 'strengths=[0, 1]'"


def default_folder(runs: Sequence[Path]) -> Path:
    return runs[0] / "gallery" if len(runs) == 1 else new_folder("gallery")
