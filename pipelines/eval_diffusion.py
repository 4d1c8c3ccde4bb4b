"""Scores a style adapter: does it draw in the style, and does it still draw what the prompt names?

A fitted judge (`fit_classifier`) scores images of things that no adapter was trained on, drawn by the bare model (with
prompts that it knows, and with the adapter's prompts) and by the adapter. The table has 95 % intervals over things.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import get_args

from PIL import Image

from dora_mm.config.generation import ClassifiedStyle, EvalDiffusionConfig, ImageGenerationConfig
from dora_mm.config.paths import resolve_adapter, resolve_model, resolve_path
from dora_mm.data.images.pixels import load_rgb
from dora_mm.eval.images.classifier import Classifier
from dora_mm.eval.images.clip import ClipSimilarity, read_references
from dora_mm.eval.images.concepts import Concept
from dora_mm.eval.images.encoder import Encoder
from dora_mm.eval.images.prompts import fill
from dora_mm.eval.images.scores import (
    conclusion,
    format_ci,
    metrics_table,
    scores_per_image,
    summarize,
    write_json,
)
from dora_mm.eval.statistics import ConfidenceInterval, mean_ci
from dora_mm.formats.adapter_file import find_file
from dora_mm.formats.files.tensor_file import read_metadata
from dora_mm.formats.identity import adapter_digest
from dora_mm.models.images.families import identity_of
from dora_mm.sampling.batch.prompt_row import Weights
from dora_mm.sampling.batch.requests import ImageRequest
from dora_mm.sampling.contact_sheets import save_atomically
from dora_mm.sampling.generating import BatchGeneration
from dora_mm.sampling.grids import image_grid
from dora_mm.sampling.manifest import write_manifest
from dora_mm.sampling.model import load_model
from dora_mm.sampling.strengths import as_strength
from dora_mm.train.run import check_reopened, evaluation_run
from dora_mm.utils import yaml12
from dora_mm.utils.atomic import write_text
from dora_mm.utils.digest import files_digest, module_digest
from dora_mm.utils.processes import started_together
from dora_mm.utils.run_directory import RunDirectory
from dora_mm.utils.tables import markdown_table

log = logging.getLogger(__name__)
CONTACT_SHEET_COLUMNS = 10
BARE_FLAT, BARE, ADAPTER = "bare model, flat prompts", "bare model", "adapter"


def main(config: EvalDiffusionConfig, *, resume: Path | None = None) -> None:
    """Draws the images, scores them and prints the table.

    Writes to the run directory: table.md, metrics.json, the scores of single images in scores/, the images in samples/
    with manifest.jsonl, which a gallery shows, and sheet.png. If `output` names that of the same evaluation, which was
    stopped, the pictures that are drawn stay.

    Args:
        config: The config; without `adapter` only the bare model is scored.
        resume: Unused: the same command goes on.

    Raises:
        ValueError: The judge, the model, the adapter or the reference images cannot be used, or the judge was fitted
            for another model. The run directory is created only after these checks. Or `output` is that of another
            evaluation, or some images could not be drawn; all others are then.
    """
    processes, classifier = started_together(), Classifier.load(resolve_path(config.classifier, "judge"))
    concepts = classifier.choose(config.concepts.role, config.concepts.count)
    if processes.is_main:
        check_reopened(config, inputs_of(config))
    loaded = load_model(generation_config(config), [config.adapter.path] if config.adapter else [])
    model, device = loaded.model, loaded.model.device
    model.check_rescale(config.sampling.guidance_rescale, "sampling.guidance_rescale")
    classifier.check_model(model.resolution, module_digest(model.vae))
    requests = requests_of(config, concepts)
    loaded.load(requests)
    loaded.check_adapters([request for request in requests if request.weights])
    encoder = Encoder(device)
    references = read_references(config.clip.images) if config.clip and config.clip.images else []
    clip = ClipSimilarity(resolve_model(config.clip.path, "clip.path"), device) if config.clip else None
    if other := about_style(config):
        log.warning(other)
    with processes.run(evaluation_run(config, inputs_of(config))) as run:
        generation = loaded.generate(run.path, requests, config.sampling.batch_size, processes)
        if not processes.is_main:
            return
        generation.raise_failures()
        score(config, run, classifier, encoder, clip, references, concepts, generation)
    if other:
        log.warning(other)


def inputs_of(config: EvalDiffusionConfig) -> dict[str, str]:
    """Digests of all that the config refers to, by a description of each; of a hub model, once it was downloaded."""
    inputs = identity_of(config.model).inputs
    inputs["the judge"] = files_digest(resolve_path(config.classifier, "judge").glob("judge.*"))
    if config.adapter:
        inputs["the adapter"] = adapter_digest(resolve_path(config.adapter.path, "adapter.path"))
    return inputs


def generation_config(config: EvalDiffusionConfig) -> ImageGenerationConfig:
    """The config of the model that the pictures are drawn with."""
    return ImageGenerationConfig(pipeline=config.pipeline, name=config.name, model=config.model)


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
    styles = ", ".join(get_args(ClassifiedStyle))
    return (
        f"The judge knows the styles {styles} alone: it scores what {config.adapter.path} has learned from {own[0]} as "
        f"{config.style}, so a low share says nothing of a style of your own"
    )


def score(
    config: EvalDiffusionConfig,
    run: RunDirectory,
    classifier: Classifier,
    encoder: Encoder,
    clip: ClipSimilarity | None,
    references: list[Image.Image],
    concepts: list[Concept],
    generation: BatchGeneration,
) -> None:
    """Scores the pictures, writes all files of the run directory but the pictures, and prints the table."""
    seeds = config.concepts.seeds
    images, cosines = images_of(generation, 3 if config.adapter else 2), {}
    if clip and config.clip:
        texts = [fill(config.clip.text, concept) for concept in concepts for _ in seeds]
        cosines = {name: clip.cosines(generated, texts, references) for name, generated in images.items()}
    metrics, scored = {}, []
    for name, generated in images.items():
        scores = classifier.scores(encoder(generated), concepts, seeds)
        scores.save(run.path / "scores" / f"{file_name(name)}.json")
        # Also for the bare model on flat prompts, which should be flat: how much of the style the judge sees in it.
        metrics[name] = summarize(scores, config.style, classifier.style_space, over_seeds=False)
        scored += scores_per_image(scores.cells(config.style) | cosines.get(name, {}))
    generation.scores = dict(enumerate(scored))
    write_manifest(run.path, generation.entries())
    similarity = {
        name: {key: mean_ci(values.reshape(-1, len(seeds)), over_runs=False) for key, values in row.items()}
        for name, row in cosines.items()
    }
    report(config, run, classifier, metrics, similarity)
    save_contact_sheet(run, images, concepts, len(seeds))
    print(f"\n{conclusion(metrics[BARE], metrics.get(ADAPTER))}")


def requests_of(config: EvalDiffusionConfig, concepts: Sequence[Concept]) -> list[ImageRequest]:
    """The pictures of all rows of the table: samples/<row of the table>/<concept>-seed<seed>.png.

    The adapter's are the last ones, since weights of method full replace those of the base.
    """
    sampling = config.sampling
    settings = sampling.negative_prompt, 0, sampling.steps, sampling.guidance, None, None, None
    common = ImageRequest(0, "", *settings, (), 1.0, sampling.guidance_rescale)
    rows: list[tuple[str, str, Weights]] = [(BARE_FLAT, config.flat_prompt, ()), (BARE, config.prompt, ())]
    if config.adapter:
        rows.append((ADAPTER, config.prompt, ((config.adapter.path, as_strength(config.adapter.strength)),)))
    cells = product(rows, concepts, config.concepts.seeds)
    return [
        replace(
            common,
            row=number,
            prompt=fill(prompt, concept),
            seed=seed,
            adapters=adapters,
            file=f"{concept.code}-seed{seed}",
            folder=file_name(row),
        )
        for number, ((row, prompt, adapters), concept, seed) in enumerate(cells, 1)
    ]


def images_of(generation: BatchGeneration, num_rows: int) -> dict[str, list[Image.Image]]:
    """The pictures of a job by the row of the table."""
    names = (BARE_FLAT, BARE, ADAPTER)[:num_rows]
    images = [load_rgb(generation.file(index), "white") for index in range(len(generation.requests))]
    length = len(images) // num_rows
    return {name: images[number * length : (number + 1) * length] for number, name in enumerate(names)}


def file_name(row: str) -> str:
    return row.replace(" ", "_").replace(",", "")


def report(
    config: EvalDiffusionConfig,
    run: RunDirectory,
    classifier: Classifier,
    metrics: dict[str, dict[str, ConfidenceInterval]],
    similarity: dict[str, dict[str, ConfidenceInterval]],
) -> None:
    """Writes table.md and metrics.json, and prints the table."""
    count = classifier.choose(config.concepts.role, config.concepts.count)
    lines = [
        f"style {config.style}: {len(count)} things x {len(config.concepts.seeds)} seeds, 95 % intervals over things",
        metrics_table(metrics),
        classifier.describe(),
    ]
    if similarity:
        headings = list(next(iter(similarity.values())))
        rows = [[name, *(format_ci(cells[key], False) for key in headings)] for name, cells in similarity.items()]
        lines.insert(2, markdown_table(["", *headings], rows))
    text = "\n\n".join(lines)
    write_text(run.path / "table.md", text + "\n")
    values = {name: {key: value.as_dict() for key, value in cells.items()} for name, cells in metrics.items()}
    for name, cells in similarity.items():
        values[name] |= {key: value.as_dict() for key, value in cells.items()}
    write_json(run.path / "metrics.json", {"style": config.style, "rows": values, "classifier": classifier.report})
    print(text)
    print(f"\ntable    {run.path / 'table.md'}")


def save_contact_sheet(
    run: RunDirectory, images: dict[str, list[Image.Image]], concepts: list[Concept], num_seeds: int
) -> None:
    """Saves a sheet with the first concepts and the first seed: one row for each row of the table."""
    columns = concepts[:CONTACT_SHEET_COLUMNS]
    rows = [generated[: len(columns) * num_seeds : num_seeds] for generated in images.values()]
    save_atomically(run.contact_sheet, image_grid(rows, list(images), [concept.name for concept in columns]))
    print(f"sheet    {run.contact_sheet}")
