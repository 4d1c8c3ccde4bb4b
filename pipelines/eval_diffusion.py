"""Scores a style adapter: does it draw in the style, and does it still draw what the prompt names?

A fitted judge (`fit_judge`) scores images of things that no adapter was trained on, drawn by the bare model (with
prompts that it knows, and with the adapter's prompts) and by the adapter. The table has 95 % intervals over things.
"""

import logging
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, get_args

from PIL import Image

from dora_mm import backend as backends
from dora_mm.config.paths import resolve_adapter, resolve_model, resolve_path
from dora_mm.config.pictures import AdapterChoice, EvalDiffusionConfig, JudgedStyle
from dora_mm.data.images.pixels import load_rgb
from dora_mm.eval.images.clip import ClipSimilarity, read_references
from dora_mm.eval.images.concepts import Concept
from dora_mm.eval.images.encoder import Encoder
from dora_mm.eval.images.judge import Judge
from dora_mm.eval.images.prompts import fill
from dora_mm.eval.images.scores import (
    conclusion,
    format_interval,
    metrics_table,
    scores_per_image,
    summarize,
    write_json,
)
from dora_mm.eval.statistics import Interval, bootstrap
from dora_mm.formats.adapter_file import find_file
from dora_mm.formats.files.tensor_file import read_metadata
from dora_mm.formats.identity import adapter_digest
from dora_mm.models.images import new_tokens
from dora_mm.models.images.families import files_identity, load_image_model
from dora_mm.models.images.image_model import ImageModel
from dora_mm.sampling.before_after import sample_merged
from dora_mm.sampling.grids import sheet
from dora_mm.sampling.manifest import ManifestEntry, read_manifest, recorded_digests, write_manifest
from dora_mm.sampling.sheets import save_atomically
from dora_mm.train.run import check_reopened, evaluation_run
from dora_mm.utils import yaml12
from dora_mm.utils.atomic import write_text
from dora_mm.utils.devices import default_device
from dora_mm.utils.digest import file_digest, files_digest, module_digest
from dora_mm.utils.run_directory import RunDirectory
from dora_mm.utils.tables import markdown_table

log = logging.getLogger(__name__)
SHEET_COLUMNS = 10
BARE_FLAT, BARE, ADAPTER = "bare model, flat prompts", "bare model", "adapter"


def main(config: EvalDiffusionConfig, *, resume: Path | None = None) -> None:
    """Draws the images, scores them and prints the table.

    Writes to the run directory: table.md, metrics.json, the scores of single images in scores/, the images in samples/
    with manifest.jsonl, which a gallery shows, and sheet.png. If `output` names that of the same evaluation, which was
    stopped, the rows of the table that are drawn stay.

    Args:
        config: The config; without `adapter` only the bare model is scored.
        resume: Unused: the same command goes on.

    Raises:
        ValueError: The judge, the model, the adapter or the reference images cannot be used, or the judge was fitted
            for another model. The run directory is created only after these checks. Or `output` is that of another
            evaluation.
    """
    judge = Judge.load(resolve_path(config.judge, "judge"))
    concepts = judge.choose(config.concepts.role, config.concepts.count)
    check_reopened(config, inputs_of(config))
    device = default_device()
    model = load_image_model(config.model).to(device)
    judge.check_model(model.resolution, module_digest(model.networks["vae"]))
    if config.adapter:
        load_adapter(model, config.adapter)
    encoder = Encoder(device)
    references = read_references(config.clip.images) if config.clip and config.clip.images else []
    clip = ClipSimilarity(resolve_model(config.clip.path, "clip.path"), device) if config.clip else None
    if other := about_style(config):
        log.warning(other)
    with evaluation_run(config, inputs_of(config)) as run:
        adapted = {}
        if config.adapter:
            adapted[ADAPTER] = pictures_of(config, run, model, concepts, ADAPTER)
            # again, since weights of method full replace those of the base; the adapted one is freed
            model = load_image_model(config.model).to(device)
        images = {row: pictures_of(config, run, model, concepts, row) for row in (BARE_FLAT, BARE)} | adapted
        score(config, run, judge, encoder, clip, references, concepts, images)
    if other:
        log.warning(other)


def inputs_of(config: EvalDiffusionConfig) -> dict[str, str]:
    """Digests of all that the config refers to, by a description of each; of a hub model, once it was downloaded."""
    inputs = files_identity(config.model)
    inputs["the judge"] = files_digest(resolve_path(config.judge, "judge").glob("judge.*"))
    if config.adapter:
        inputs["the adapter"] = adapter_digest(resolve_path(config.adapter.path, "adapter.path"))
    return inputs


def about_style(config: EvalDiffusionConfig) -> str:
    """What is said of an adapter that was trained on pictures which the judge does not know; empty where it does."""
    if config.adapter is None:
        return ""
    header = read_metadata(find_file(resolve_adapter(config.adapter.path, "adapter.path")))
    trained = yaml12.read(header.get("config", "")).value
    data = trained.get("data", {}) if isinstance(trained, dict) else {}
    folders = [data.get("folder"), *(each.get("path") for each in data.get("folders") or () if isinstance(each, dict))]
    own = [each for each in folders if isinstance(each, str) and Path(each).parts[:1] != ("samples",)]
    if not own:
        return ""
    styles = ", ".join(get_args(JudgedStyle))
    return (
        f"The judge knows the styles {styles} alone: it scores what {config.adapter.path} has learned from {own[0]} as "
        f"{config.style}, so a low share says nothing of a style of your own"
    )


def score(
    config: EvalDiffusionConfig,
    run: RunDirectory,
    judge: Judge,
    encoder: Encoder,
    clip: ClipSimilarity | None,
    references: list[Image.Image],
    concepts: list[Concept],
    images: dict[str, list[Image.Image]],
) -> None:
    """Scores the pictures, writes all files of the run directory but the pictures, and prints the table."""
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
    write_manifest(run.path, entries_of(config, run, images, concepts, scored))
    similarity = {
        name: {key: bootstrap(values.reshape(-1, len(seeds))) for key, values in row.items()}
        for name, row in cosines.items()
    }
    report(config, run, judge, metrics, similarity)
    save_sheet(run, images, concepts, len(seeds))
    print(f"\n{conclusion(metrics[BARE], metrics.get(ADAPTER))}")


def pictures_of(
    config: EvalDiffusionConfig, run: RunDirectory, model: ImageModel, concepts: list[Concept], row: str
) -> list[Image.Image]:
    """The pictures of one row of the table: those that an earlier process has drawn, if all are there, or new ones."""
    chosen = [(picture_file(row, code, each["seed"]), each) for code, each in image_settings(config, row, concepts)]
    recorded = recorded_digests(run.path)
    files = [run.path / name for name, _ in chosen]
    if all(
        file.is_file() and recorded.get(name) == file_digest(file)
        for file, (name, _) in zip(files, chosen, strict=True)
    ):
        log.info("The pictures of the %s are there already.", row)
        return [load_rgb(file, "white") for file in files]
    prompts, seeds = [each["prompt"] for _, each in chosen], [each["seed"] for _, each in chosen]
    images = sample_merged(model, prompts, seeds, config.draw, row)
    for file, image in zip(files, images, strict=True):
        save_atomically(file, image)
    others = read_manifest(run.path) if recorded else []
    write_manifest(run.path, [*others, *entries_of(config, run, {row: images}, concepts)])
    return images


def load_adapter(model: ImageModel, adapter: AdapterChoice) -> None:
    file = resolve_path(adapter.path, "adapter.path")
    strength: Any = adapter.strength
    report = new_tokens.load_adapter(model, file, strength=strength, forward=backends.select("auto"))
    log.info("%d adapted modules, %s parameters.", report.num_modules, f"{report.num_parameters:,}")


def entries_of(
    config: EvalDiffusionConfig,
    run: RunDirectory,
    images: dict[str, list[Image.Image]],
    concepts: list[Concept],
    scored: dict[str, list[dict[str, float]]] | None = None,
) -> list[ManifestEntry]:
    """The manifest's entries of pictures samples/<row of the table>/<concept>-seed<seed>.png, with their scores."""
    entries: list[ManifestEntry] = []
    for name, drawn in images.items():
        first_batch = entries[-1].batch + 1 if entries else 1
        scores_of_row = scored[name] if scored else [{}] * len(drawn)
        rows = zip(image_settings(config, name, concepts), drawn, scores_of_row, strict=True)
        for index, ((code, settings), image, scores) in enumerate(rows):
            file = picture_file(name, code, settings["seed"])
            batch = first_batch + index // config.draw.batch_size
            settings |= {"width": image.width, "height": image.height}
            digest = file_digest(run.path / file)
            entries.append(ManifestEntry(len(entries) + 1, file, "done", batch, settings, digest, scores=scores))
    return entries


def picture_file(row: str, code: str, seed: int) -> str:
    """The path of a picture in the run directory."""
    return f"samples/{file_name(row)}/{code}-seed{seed}.png"


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
    write_text(run.path / "table.md", text + "\n")
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
    save_atomically(run.sheet, sheet(rows, list(images), [concept.name for concept in columns]))
    print(f"sheet    {run.sheet}")
