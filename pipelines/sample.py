"""Generates images for the prompts of a job: one PNG each, a manifest, and labelled contact sheets."""

import logging
from collections.abc import Sequence
from pathlib import Path

from dora_mm.config.generation import BatchGenerationConfig
from dora_mm.config.loader import saved_values
from dora_mm.config.paths import resolve_adapter, resolve_path
from dora_mm.sampling.batch.prompt_row import PromptRow
from dora_mm.sampling.batch.prompts import check_syntax, with_alternatives
from dora_mm.sampling.batch.reading import read_prompts_file
from dora_mm.sampling.batch.requests import (
    ImageRequest,
    about_bare,
    check_strengths,
    expand,
    file_names,
    template,
    without_adapter,
)
from dora_mm.utils.processes import started_together
from dora_mm.utils.shell import quoted

log = logging.getLogger(__name__)
STRENGTHS = (
    "Strengths are linear here: W0 + t (W' - W0). diffusers' set_adapters and PEFT scale only the low-rank part of "
    "DoRA, so between 0 and 1 the same number generates another image there (docs/generate_images.md)."
)


def main(config: BatchGenerationConfig, *, resume: Path | None = None) -> None:
    """Generates the images that are not there yet.

    Writes to the run directory: the images in samples/, manifest.jsonl, and contact sheets. A run directory of this
    pipeline that `output` or `resume` names goes on.

    Args:
        config: The config.
        resume: The run directory to go on with.

    Raises:
        ValueError: The prompts file, the model or an adapter cannot be used; the run directory is created only after
            these checks. Or some images could not be generated; all others are then.
    """
    rows = read_rows(config)
    check_strengths(rows, config)
    requests = requests_of(config, rows)
    check_syntax(requests)
    file_names(requests)
    adapters = {path for request in requests for path, _ in request.adapters}
    for path in sorted(adapters):
        resolve_adapter(path, "adapter")
    for path in config.images:
        resolve_path(path, "images")

    # torch and diffusers are imported here, since that takes seconds: mistakes in a prompts file are found before
    from dora_mm.sampling.contact_sheets import save_contact_sheets
    from dora_mm.sampling.generating import existing_run, generation_run
    from dora_mm.sampling.model import find_adapters, load_model
    from dora_mm.sampling.trainings import with_usual_settings

    processes = started_together()
    found = existing_run(config, resume) if processes.is_main else None
    if found and resume is None:
        check_same_prompts_file(config, found)
    config = with_usual_settings(config, find_adapters(adapters))
    requests = with_alternatives(requests_of(config, rows))
    loaded = load_model(config, adapters)
    loaded.check(requests)
    if any(strength != 1 for request in requests for _, strength in request.active_adapters):
        log.info(STRENGTHS)
    if bare := about_bare(without_adapter(rows, requests), requests):
        log.warning(bare)
    with processes.run(generation_run(config, found)) as run:
        generation = loaded.generate(run.path, requests, config.batch_size, processes)
        if not processes.is_main:
            return
        print(f"images    {len(generation.done)} of {len(requests)} in {run.samples}")
        for file in save_contact_sheets(generation) if config.contact_sheet else ():
            print(f"sheet     {file}")
        print(f"to look   dora-mm gallery {quoted(run.path)}")
        if bare:
            log.warning(bare)
        generation.raise_failures()


def requests_of(config: BatchGenerationConfig, rows: Sequence[PromptRow]) -> list[ImageRequest]:
    """The images of a job."""
    return expand(rows, template(config), config.seeds, config.strengths or (1.0,))


def check_same_prompts_file(config: BatchGenerationConfig, run: Path) -> None:
    """Checks that a run directory that `output` names belongs to the same prompts file: another one has other images.

    Raises:
        ValueError: It belongs to another one.
    """
    before = saved_values(run).get("prompts_file") if (run / "config.yaml").is_file() else None
    after = config.prompts_file
    if before and after and Path(str(before)).name != Path(after).name:
        raise ValueError(
            f"output {run} has the images of {before}, and those of {after} would replace them: choose another "
            f"folder, or, if it is the same job under a new name: "
            f"dora-mm sample {quoted(after)} --resume {quoted(run)}"
        )


def read_rows(config: BatchGenerationConfig) -> list[PromptRow]:
    """The rows of the prompts file, or else the prompts of the config."""
    if config.prompts_file is not None:
        return read_prompts_file(resolve_path(config.prompts_file, "prompts_file"))
    return [PromptRow(prompt=prompt) for prompt in config.prompts]


def replay(request: Path, *, output: str | None = None) -> None:
    """Generates an image again from what its file says, in the batch that it was generated in.

    Args:
        request: A PNG file that `main` has saved.
        output: The folder to write to; None: a numbered folder in runs/replay.

    Raises:
        ValueError: The file does not say how it was generated, or the model or an adapter has changed since.
    """
    from dora_mm.sampling.replay import replay_image
    from dora_mm.utils.folders import new_folder

    found = []

    def fill(partial: Path) -> None:
        generated, difference = replay_image(request, partial)
        found.extend((generated.relative_to(partial), difference))

    folder = new_folder("replay", output, fill)
    generated, difference = folder / found[0], found[1]
    print(f"image     {generated}")
    print("          " + (f"differs from {request} {difference}" if difference else f"the same pixels as {request}"))
