"""Scores a style adapter: does it draw in the style, and does it still draw what the prompt names?

A fitted judge (`fit_judge`) scores images of things that no adapter was trained on, drawn by the bare model (with
prompts that it knows, and with the adapter's prompts) and by the adapter. The table has 95 % intervals over things.
"""

import logging
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

import dora_mm
from dora_mm.config.loader import resolve_model, resolve_path
from dora_mm.config.pictures import AdapterChoice, EvalDiffusionConfig
from dora_mm.eval.images.clip import ClipSimilarity, read_references
from dora_mm.eval.images.concepts import Concept
from dora_mm.eval.images.encoder import Encoder
from dora_mm.eval.images.judge import Judge
from dora_mm.eval.images.prompts import fill
from dora_mm.eval.images.scores import format_interval, metrics_table, scores_per_image, summarize, write_json
from dora_mm.eval.statistics import Interval, bootstrap
from dora_mm.models.diffusion import ImageModel
from dora_mm.models.image_families import load_image_model
from dora_mm.sampling.before_after import sample_merged
from dora_mm.sampling.grids import sheet
from dora_mm.sampling.manifest import ManifestEntry, write_manifest
from dora_mm.train.run import open_run
from dora_mm.utils.atomic import write_atomically
from dora_mm.utils.devices import default_device
from dora_mm.utils.digest import file_digest, module_digest
from dora_mm.utils.run_directory import RunDirectory
from dora_mm.utils.tables import markdown_table

log = logging.getLogger(__name__)
SHEET_COLUMNS = 10
BARE_FLAT, BARE, ADAPTER = "bare model, flat prompts", "bare model", "adapter"


def main(config: EvalDiffusionConfig, *, resume: Path | None = None) -> None:
    """Draws the images, scores them and prints the table.

    Writes to the run directory: table.md, metrics.json, the scores of single images in scores/, the images in samples/
    with manifest.jsonl, which a gallery shows, and sheet.png.

    Args:
        config: The config; without `adapter` only the bare model is scored.
        resume: Unused, because an evaluation cannot be resumed.

    Raises:
        ValueError: The judge, the model, the adapter or the reference images cannot be used, or the judge was fitted
            for another model. The run directory is created only after these checks.
    """
    judge = Judge.load(resolve_path(config.judge, "judge"))
    concepts = judge.choose(config.concepts.role, config.concepts.count)
    device = default_device()
    model = load_image_model(config.model).to(device)
    judge.check_model(model.resolution, module_digest(model.networks["vae"]))
    if config.adapter:
        load_adapter(model, config.adapter)
    encoder = Encoder(device)
    references = read_references(config.clip.images) if config.clip and config.clip.images else []
    clip = ClipSimilarity(resolve_model(config.clip.path, "clip.path"), device) if config.clip else None
    run = open_run(config)

    adapted = {}
    if config.adapter:
        adapted[ADAPTER] = draw(config, model, concepts, ADAPTER)
        # again, since weights of method full replace those of the base; the adapted one is freed
        model = load_image_model(config.model).to(device)
    images = {row: draw(config, model, concepts, row) for row in (BARE_FLAT, BARE)} | adapted
    seeds = config.concepts.seeds
    cosines = {}
    if clip and config.clip:
        texts = [fill(config.clip.text, concept) for concept in concepts for _ in seeds]
        cosines = {name: clip.cosines(drawn, texts, references) for name, drawn in images.items()}
    metrics, scored = {}, {}
    for name, drawn in images.items():
        scores = judge.scores(encoder(drawn), concepts, seeds)
        scores.save(run.path / "scores" / f"{file_name(name)}.json")
        # Also for the bare model on flat prompts, which should be flat: how much of the style the judge sees in it.
        metrics[name] = summarize(scores, config.style, judge.style_space, over_seeds=False)
        scored[name] = scores_per_image(scores.cells(config.style) | cosines.get(name, {}))
    save_images(config, run, images, concepts, scored)
    similarity = {
        name: {key: bootstrap(values.reshape(-1, len(seeds))) for key, values in row.items()}
        for name, row in cosines.items()
    }
    report(config, run, judge, metrics, similarity)
    save_sheet(run, images, concepts, len(seeds))


def draw(config: EvalDiffusionConfig, model: ImageModel, concepts: list[Concept], row: str) -> list[Image.Image]:
    """Draws the images of one row of the table."""
    settings = [each for _, each in image_settings(config, row, concepts)]
    prompts, seeds = [each["prompt"] for each in settings], [each["seed"] for each in settings]
    return sample_merged(model, prompts, seeds, config.draw, row)


def load_adapter(model: ImageModel, adapter: AdapterChoice) -> None:
    file = resolve_path(adapter.path, "adapter.path")
    report = dora_mm.load_adapter(model.adaptable, file, strength=adapter.strength)
    log.info("%d adapted modules, %s parameters.", report.num_modules, f"{report.num_parameters:,}")


def save_images(
    config: EvalDiffusionConfig,
    run: RunDirectory,
    images: dict[str, list[Image.Image]],
    concepts: list[Concept],
    scored: dict[str, list[dict[str, float]]],
) -> None:
    """Saves samples/<row of the table>/<concept>-seed<seed>.png, and the manifest with the scores of each."""
    entries = []
    for name, drawn in images.items():
        first_batch = entries[-1].batch + 1 if entries else 1
        rows = zip(image_settings(config, name, concepts), drawn, scored[name], strict=True)
        for index, ((code, settings), image, scores) in enumerate(rows):
            file = f"samples/{file_name(name)}/{code}-seed{settings['seed']}.png"
            write_atomically(run.path / file, lambda partial, image=image: image.save(partial, "PNG"))
            batch = first_batch + index // config.draw.batch_size
            settings |= {"width": image.width, "height": image.height}
            entries.append(
                ManifestEntry(
                    len(entries) + 1, file, "done", batch, settings, file_digest(run.path / file), scores=scores
                )
            )
    write_manifest(run.path, entries)


def image_settings(
    config: EvalDiffusionConfig, row: str, concepts: list[Concept]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The code of the concept and the settings of each image, in the order in which they are drawn."""
    template = config.flat_prompt if row == BARE_FLAT else config.prompt
    adapter = config.adapter.model_dump() if config.adapter and row == ADAPTER else {}
    common = {"adapter": adapter.get("path"), "strength": adapter.get("strength"), "model": config.model.path}
    common |= config.draw.model_dump(exclude={"batch_size"})
    for concept, seed in product(concepts, config.concepts.seeds):
        yield concept.code, {"prompt": fill(template, concept), "thing": concept.name, "seed": seed, **common}


def file_name(row: str) -> str:
    return row.replace(" ", "_").replace(",", "")


def report(
    config: EvalDiffusionConfig,
    run: RunDirectory,
    judge: Judge,
    metrics: dict[str, dict[str, Interval]],
    similarity: dict[str, dict[str, Interval]],
) -> None:
    """Writes table.md and metrics.json, and prints the table."""
    count = judge.choose(config.concepts.role, config.concepts.count)
    lines = [
        f"style {config.style}: {len(count)} things x {len(config.concepts.seeds)} seeds, 95 % intervals over things",
        metrics_table(metrics),
        judge.describe(),
    ]
    if similarity:
        headings = list(next(iter(similarity.values())))
        rows = [[name, *(format_interval(cells[key], False) for key in headings)] for name, cells in similarity.items()]
        lines.insert(2, markdown_table(["", *headings], rows))
    text = "\n\n".join(lines)
    (run.path / "table.md").write_text(text + "\n", encoding="utf-8")
    values = {name: {key: value.as_dict() for key, value in cells.items()} for name, cells in metrics.items()}
    for name, cells in similarity.items():
        values[name] |= {key: value.as_dict() for key, value in cells.items()}
    write_json(run.path / "metrics.json", {"style": config.style, "rows": values, "judge": judge.report})
    print(text)
    print(f"\ntable    {run.path / 'table.md'}")


def save_sheet(
    run: RunDirectory, images: dict[str, list[Image.Image]], concepts: list[Concept], num_seeds: int
) -> None:
    """Saves a sheet with the first concepts and the first seed: one row for each row of the table."""
    columns = concepts[:SHEET_COLUMNS]
    rows = [drawn[: len(columns) * num_seeds : num_seeds] for drawn in images.values()]
    sheet(rows, list(images), [concept.name for concept in columns]).save(run.sheet)
    print(f"sheet    {run.sheet}")
