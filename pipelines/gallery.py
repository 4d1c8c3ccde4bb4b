"""dora-mm gallery: the images of finished runs on one page, to filter, sort and compare them in a browser."""

from collections.abc import Sequence
from pathlib import Path

from dora_mm.config.images import TrainDiffusionConfig
from dora_mm.config.vl import TrainVLConfig
from dora_mm.sampling.gallery import GALLERY, INDEX, fill_gallery, read_images, write_gallery
from dora_mm.sampling.gallery.training import training_config
from dora_mm.sampling.manifest import MANIFEST
from dora_mm.sampling.next_steps import asking_command, sampling_command
from dora_mm.utils.folders import new_folder
from dora_mm.utils.run_directory import CONFIG, RunDirectory


def main(runs: Sequence[Path], *, output: Path | None = None) -> None:
    """Writes the gallery and prints the path of its page, and what comes next.

    Args:
        runs: Run directories, each with a manifest, or of a training; or folders of runs, such as runs, of which all
            are taken that have images.
        output: The folder; None is `gallery` in the run, or for several runs a numbered folder in runs/gallery.

    Raises:
        ValueError: A run has no manifest or a damaged one, or the folder holds something else than a gallery.
    """
    entries = {run: read_images(run) for given in runs for run in runs_in(given)}
    folder = output or (next(iter(entries)) / GALLERY if len(entries) == 1 else None)
    if folder is None:
        folder = new_folder("gallery", fill=lambda partial: fill_gallery(entries, partial, partial))
    else:
        write_gallery(entries, folder)
    print(f"gallery  {folder / INDEX}")
    print(next_step(list(entries)))


def runs_in(folder: Path) -> list[Path]:
    """The run itself; or of a folder of runs (runs, runs/NAME) those that have images, by name."""
    if (folder / CONFIG).exists() or (folder / MANIFEST).exists():
        return [folder]
    found = sorted(file.parent for depth in ("*", "*/*") for file in folder.glob(f"{depth}/{MANIFEST}"))
    return found or [folder]


def next_step(runs: Sequence[Path]) -> str:
    """The next step after the page: use the training, or generate the best of other images again."""
    for run in runs:
        config = training_config(run)
        if isinstance(config, TrainDiffusionConfig):
            return f"to sample  {sampling_command(config, RunDirectory(run))}"
        if isinstance(config, TrainVLConfig):
            return f"to ask   {asking_command(config, RunDirectory(run))}"
    return "to go on  open it, mark the best with f, save them as a job: dora-mm sample favourites.jsonl"
