"""Generates a labelled grid: the effect of one or two settings on an image, next to the base model's image."""

import logging
from dataclasses import replace
from pathlib import Path

from dora_mm.config import load_config
from dora_mm.config.generation import GridConfig
from dora_mm.config.paths import resolve_path
from dora_mm.sampling.axes import cells_of, with_base_model
from dora_mm.sampling.batch.prompts import with_alternatives
from dora_mm.sampling.batch.requests import about_bare, template
from dora_mm.sampling.contact_sheets import save_grid
from dora_mm.sampling.generating import existing_run, generation_run
from dora_mm.sampling.model import find_adapters, load_model
from dora_mm.sampling.strengths import as_strength, scaled, strength_text
from dora_mm.sampling.trainings import with_usual_settings
from dora_mm.train.checkpoint import checkpoints, step_of
from dora_mm.utils.processes import started_together
from dora_mm.utils.run_directory import RunDirectory
from dora_mm.utils.shell import quoted

log = logging.getLogger(__name__)


def main(config: GridConfig, *, resume: Path | None = None) -> None:
    """Generates the images of the grid that are not there yet.

    Writes to the run directory: the images in samples/, manifest.jsonl, and sheet.png.

    Args:
        config: The config.
        resume: The run directory to go on with.

    Raises:
        ValueError: The model or an adapter cannot be used, or a value does not fit its axis; the run directory is
            created only after these checks. Or some images could not be generated; all others are then.
    """
    processes = started_together()
    found = existing_run(config, resume) if processes.is_main else None
    folders = checkpoint_folders(config)
    rows, columns = cells_of(config.rows, folders), cells_of(config.columns, folders)
    has_adapters = config.adapter or "adapter" in (config.columns.name, config.rows and config.rows.name)
    if config.without_adapter and has_adapters:
        rows, columns = with_base_model(config, rows, columns)
    cells = [{**row, **column} for _, row in rows for _, column in columns]
    adapters = {path for cell in cells for path, _ in cell.get("adapters", template(config).adapters)}
    config = with_usual_settings(config, find_adapters(adapters))
    common = template(config, prompt=config.prompt or "", seed=config.seed)
    requests = with_alternatives([replace(common, row=number, **cell) for number, cell in enumerate(cells, 1)])
    loaded = load_model(config, adapters)
    loaded.check(requests)
    if bare := about_bare([p for p in requests if not p.adapters and p.strength and not has_adapters], requests):
        log.warning(bare)
    with processes.run(generation_run(config, found)) as run:
        generation = loaded.generate(run.path, requests, config.batch_size, processes)
        if not processes.is_main:
            return
        save_grid(generation, run.contact_sheet, [label for label, _ in rows], [label for label, _ in columns])
        print(f"images    {len(generation.done)} of {len(requests)} in {run.samples}\nsheet     {run.contact_sheet}")
        print(f"to look   dora-mm gallery {quoted(run.path)}")
        if bare:
            log.warning(bare)
        generation.raise_failures()


def checkpoint_folders(config: GridConfig) -> dict[str, str]:
    """The checkpoints of the run that `adapter.path` names, by step, if an axis asks for them.

    The strength at which a run saves its adapter is not part of its checkpoints, and is added here.

    Raises:
        ValueError: The path is not a run directory, or the run has kept no checkpoint.
    """
    if "checkpoint" not in (config.columns.name, config.rows and config.rows.name) or config.adapter is None:
        return {}
    run = resolve_path(config.adapter.path, "adapter.path")
    found = checkpoints(RunDirectory(run).checkpoints)
    if not found or not (run / "config.yaml").is_file():
        raise ValueError(f"adapter.path: {run} is not a run directory with checkpoints")
    trained = load_config(run / "config.yaml")
    saved = getattr(getattr(trained, "adapter", None), "strength", 1.0)
    strength = scaled(as_strength(config.adapter.strength), saved)
    return {str(step_of(folder)): f"{folder}:{strength_text(strength)}" for folder in found}
