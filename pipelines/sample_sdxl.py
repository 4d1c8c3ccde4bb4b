"""Draws pictures for prompts with an SDXL model and an adapter: one PNG each, and a labelled sheet of all."""

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
from dora_mm.models.sdxl.encoding import truncated_prompts
from dora_mm.models.sdxl.loading import SDXL, load_configured
from dora_mm.sampling.before_after import at_strength
from dora_mm.sampling.grids import sheet
from dora_mm.sampling.sdxl import sample
from dora_mm.train.run import RunDirectory, open_run
from dora_mm.utils.devices import default_device

log = logging.getLogger(__name__)
NO_ADAPTER = "no adapter"


def main(config: SampleSDXLConfig, *, resume: Path | None = None) -> None:
    prompts = list(config.prompts) or read_prompts(resolve_path(config.prompts_file or "", "prompts_file"))
    model = load_configured(config.model)
    adapted = load_adapter(config, model)
    model.freeze().to(default_device())
    for prompt, count in truncated_prompts(model, prompts).items():
        log.warning("A prompt of %d tokens is cut to %d: %s", count, model.tokenizer.model_max_length, prompt)
    run = open_run(config)

    jobs = list(product(prompts, config.seeds))
    columns = {}
    for column, pictures in draw(config, model, adapted, jobs):
        columns[column] = pictures
        if config.images:
            save_pictures(config, run, jobs, column, pictures)
    if config.images:
        print(f"pictures  {run.samples}")
    if config.sheet:
        labels = [prompt if len(config.seeds) == 1 else f"{prompt}, seed {seed}" for prompt, seed in jobs]
        rows = [[pictures[index] for pictures in columns.values()] for index in range(len(jobs))]
        sheet(rows, labels, list(columns)).save(run.sheet)
        print(f"sheet     {run.sheet}")


def load_adapter(config: SampleSDXLConfig, model: SDXL) -> dict[str, torch.nn.Module]:
    """The networks that the adapter file adapts."""
    if config.adapter is None:
        return {}
    networks = model.adaptable
    file = resolve_path(config.adapter.path, "adapter.path")
    report = dora_mm.load_adapter(networks, file, backend=config.backend)
    log.info("%d adapted modules, %s parameters.", report.num_modules, f"{report.num_parameters:,}")
    adapted = {name: network for name, network in networks.items() if methods(network)}
    if is_whole(adapted) and (config.strengths or config.adapter.strength != 1.0):
        raise ValueError(f"{config.adapter.path} holds weights that were trained whole: they have no strength but 1.")
    return adapted


def methods(network: torch.nn.Module) -> set[str]:
    return {module.spec.method for module in network.modules() if isinstance(module, AdaptedLayer)}


def is_whole(adapted: dict[str, torch.nn.Module]) -> bool:
    """Weights that were trained themselves took the base's place: they have no strength, and no "without"."""
    return any("full" in methods(network) for network in adapted.values())


def draw(
    config: SampleSDXLConfig, model: SDXL, adapted: dict[str, torch.nn.Module], jobs: Sequence[tuple[str, int]]
) -> Iterator[tuple[str, list[Image.Image]]]:
    """The columns of the sheet and their pictures: without the adapter (where there is a sheet), then each strength.

    Weights that were trained whole have one column.
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
    if is_whole(adapted):
        yield "adapter", sample(pipe, prompts, seeds, description="adapter", **settings)
        return
    strengths = {f"strength {factor:g}": factor * config.adapter.strength for factor in config.strengths or (1.0,)}
    if config.sheet:
        strengths = {NO_ADAPTER: 0.0, **strengths}
    for label, strength in strengths.items():
        yield label, at_strength(pipe, adapted, strength, prompts, seeds, description=label, **settings)


def save_pictures(
    config: SampleSDXLConfig,
    run: RunDirectory,
    jobs: Sequence[tuple[str, int]],
    column: str,
    pictures: list[Image.Image],
) -> None:
    """samples/<column>/<number>-seed<seed>.png, each with what made it in its text chunk `dora_mm`."""
    common = config.model_dump(include={"model", "adapter", "steps", "guidance", "negative_prompt", "height", "width"})
    folder = run.samples / column.replace(" ", "-")
    folder.mkdir(parents=True)
    for index, ((prompt, seed), picture) in enumerate(zip(jobs, pictures, strict=True)):
        about = PngImagePlugin.PngInfo()
        about.add_itxt("dora_mm", json.dumps({"prompt": prompt, "seed": seed, "column": column, **common}))
        picture.save(folder / f"{index // len(config.seeds):03d}-seed{seed}.png", pnginfo=about)


def read_prompts(path: Path) -> list[str]:
    """One prompt a line (.txt), or the column `prompt` of a .csv or .jsonl file.

    Raises:
        ValueError: another kind of file, or none, or one that is not UTF-8, or a row without a prompt.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # with the mark that Excel writes, or without
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
        raise ValueError(f"prompts_file {path} holds no prompts.")
    return prompts


def _json_row(line: str, path: Path, number: int) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"prompts_file {path} line {number} is not JSON: {error.msg}.") from None
    return row if isinstance(row, dict) else {}


def _prompt_of(row: dict, path: Path, number: int) -> str:
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"prompts_file {path} line {number} has no prompt.")
    return prompt.strip()
