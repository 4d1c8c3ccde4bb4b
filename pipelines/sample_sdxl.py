"""Draws images for prompts with an SDXL model and an adapter: one PNG each, and a labelled sheet of all."""

import csv
import io
import json
import logging
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin

import dora_mm
from dora_mm.config.loader import resolve_path
from dora_mm.config.sdxl import SampleSDXLConfig
from dora_mm.core.adapted import AdaptedLayer
from dora_mm.models.sdxl.loading import SDXL, load_configured
from dora_mm.sampling.before_after import at_strength
from dora_mm.sampling.grids import sheet
from dora_mm.sampling.pictures import sample
from dora_mm.train.run import RunDirectory, open_run
from dora_mm.utils.devices import default_device

log = logging.getLogger(__name__)
NO_ADAPTER = "no adapter"


def main(config: SampleSDXLConfig, *, resume: Path | None = None) -> None:
    """Draws the images.

    Writes to the run directory: the images in samples/<column>/ with `images`, and sheet.png with `sheet`. The columns
    are "no adapter" and the strengths.

    Args:
        config: The config.
        resume: Unused, because sampling cannot be resumed.

    Raises:
        ValueError: The prompts file, the model or the adapter cannot be used, or a strength other than 1 is asked of
            weights of method `full`. The run directory is created only after these checks.
    """
    prompts = list(config.prompts) or read_prompts(resolve_path(config.prompts_file or "", "prompts_file"))
    model = load_configured(config.model)
    adapted = load_adapter(config, model)
    model.freeze().to(default_device())
    run = open_run(config)

    jobs = list(product(prompts, config.seeds))
    columns = {}
    for column, images in draw(config, model, adapted, jobs):
        columns[column] = images
        if config.images:
            save_images(config, run, jobs, column, images)
    if config.images:
        print(f"images    {run.samples}")
    if config.sheet:
        labels = [prompt if len(config.seeds) == 1 else f"{prompt}, seed {seed}" for prompt, seed in jobs]
        rows = [[images[index] for images in columns.values()] for index in range(len(jobs))]
        sheet(rows, labels, list(columns)).save(run.sheet)
        print(f"sheet     {run.sheet}")


def load_adapter(config: SampleSDXLConfig, model: SDXL) -> dict[str, torch.nn.Module]:
    """Loads the adapter; returns the networks that it adapts by component.

    Raises:
        ValueError: The file cannot be used, or has method `full` and a strength other than 1 is asked for.
    """
    if config.adapter is None:
        return {}
    networks = model.adaptable
    file = resolve_path(config.adapter.path, "adapter.path")
    report = dora_mm.load_adapter(networks, file, backend=config.backend)
    log.info("%d adapted modules, %s parameters.", report.num_modules, f"{report.num_parameters:,}")
    adapted = {name: network for name, network in networks.items() if methods(network)}
    if replaces_weights(adapted) and (config.strengths or config.adapter.strength != 1.0):
        raise ValueError(
            f"adapter.path: {config.adapter.path} holds weights of method full, whose strength is always 1: leave out "
            "strengths and adapter.strength."
        )
    return adapted


def methods(network: torch.nn.Module) -> set[str]:
    return {module.adaptation.spec.method for module in network.modules() if isinstance(module, AdaptedLayer)}


def replaces_weights(adapted: dict[str, torch.nn.Module]) -> bool:
    """Whether the file replaced weights of the base (method `full`), so that strength 0 cannot be drawn."""
    return any("full" in methods(network) for network in adapted.values())


def draw(
    config: SampleSDXLConfig, model: SDXL, adapted: dict[str, torch.nn.Module], jobs: Sequence[tuple[str, int]]
) -> Iterator[tuple[str, list[Image.Image]]]:
    """Draws the columns of the sheet: without the adapter (if there is a sheet), then each strength.

    Weights of method `full` have a single column.

    Yields:
        The label of the column, and one image per job.
    """
    prompts, seeds = [prompt for prompt, _ in jobs], [seed for _, seed in jobs]
    settings = {
        "steps": config.steps,
        "guidance": config.guidance,
        "negative_prompt": config.negative_prompt,
        "batch_size": config.batch_size,
        "height": config.height,
        "width": config.width,
    }
    pipe = model.pipeline()
    if not adapted or config.adapter is None:
        yield NO_ADAPTER, sample(pipe, prompts, seeds, description=NO_ADAPTER, **settings)
        return
    if replaces_weights(adapted):
        yield "adapter", sample(pipe, prompts, seeds, description="adapter", **settings)
        return
    strengths = {f"strength {factor:g}": factor * config.adapter.strength for factor in config.strengths or (1.0,)}
    if config.sheet:
        strengths = {NO_ADAPTER: 0.0, **strengths}
    for label, strength in strengths.items():
        yield label, at_strength(pipe, adapted, strength, prompts, seeds, description=label, **settings)


def save_images(
    config: SampleSDXLConfig,
    run: RunDirectory,
    jobs: Sequence[tuple[str, int]],
    column: str,
    images: list[Image.Image],
) -> None:
    """Saves samples/<column>/<prompt number>-seed<seed>.png, with the settings in the text chunk `dora_mm`."""
    common = config.model_dump(include={"model", "adapter", "steps", "guidance", "negative_prompt", "height", "width"})
    folder = run.samples / column.replace(" ", "-")
    folder.mkdir(parents=True)
    for index, ((prompt, seed), image) in enumerate(zip(jobs, images, strict=True)):
        info = PngImagePlugin.PngInfo()
        info.add_itxt("dora_mm", json.dumps({"prompt": prompt, "seed": seed, "column": column, **common}))
        image.save(folder / f"{index // len(config.seeds):03d}-seed{seed}.png", pnginfo=info)


def read_prompts(path: Path) -> list[str]:
    """Reads prompts: one per line of a .txt file, or the column `prompt` of a .csv or .jsonl file.

    Args:
        path: The file, in UTF-8.

    Raises:
        ValueError: The file has another suffix, is not UTF-8 or has no prompts, or a row has no prompt.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without the byte order mark that Excel writes
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts_file {path} is not UTF-8: byte {error.start} cannot be read.") from None
    if path.suffix == ".txt":
        prompts = [line.strip() for line in text.split("\n") if line.strip()]
    elif path.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(text, newline=""))
        prompts = [_prompt_of(row, path, number) for number, row in enumerate(rows, 2)]
    elif path.suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        prompts = [_prompt_of(_json_row(line, path, number), path, number) for number, line in lines]
    else:
        raise ValueError(f"prompts_file {path} must end in .txt, .csv or .jsonl.")
    if not prompts:
        raise ValueError(f"prompts_file {path} contains no prompts.")
    return prompts


def _json_row(line: str, path: Path, number: int) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"prompts_file {path} line {number} is not valid JSON: {error.msg}.") from None
    return row if isinstance(row, dict) else {}


def _prompt_of(row: dict, path: Path, number: int) -> str:
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"prompts_file {path} line {number} has no prompt.")
    return prompt.strip()
