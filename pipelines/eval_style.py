"""Scores an adapter of one's own style, without a judge: the bare model beside the adapted one.

Pictures of prompts in the style and of prompts that do not ask for it are drawn by both, and compared with the pictures
that the adapter was trained on, as the vectors of an image encoder. The table has 95 % intervals over prompts.
"""

import logging
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dora_mm.config.generation import EvalStyleConfig
from dora_mm.config.images import TrainDiffusionConfig
from dora_mm.config.paths import resolve_path
from dora_mm.data.images.folder import CaptionedImage, digest_of, read_captioned_images
from dora_mm.data.images.pixels import load_rgb
from dora_mm.data.images.shared_words import PLACEHOLDER, THINGS
from dora_mm.eval.images import own_style
from dora_mm.eval.images.scores import scores_per_image, write_json
from dora_mm.formats.identity import adapter_digest
from dora_mm.models.images.families import identity_of
from dora_mm.sampling.batch.requests import ImageRequest, template
from dora_mm.sampling.contact_sheets import label, save_atomically, thumbnail
from dora_mm.sampling.generating import BatchGeneration
from dora_mm.sampling.grids import below, image_grid
from dora_mm.sampling.manifest import write_manifest
from dora_mm.sampling.model import find_adapters, load_model, model_of
from dora_mm.sampling.own_style import Vectors, images_of_training, prompts_in_style, vectors_by
from dora_mm.sampling.reconstructed import reconstructed
from dora_mm.sampling.trainings import training_of, with_usual_settings
from dora_mm.train.run import check_reopened, evaluation_run
from dora_mm.utils.atomic import write_text
from dora_mm.utils.processes import started_together
from dora_mm.utils.run_directory import RunDirectory

log = logging.getLogger(__name__)
BARE, ADAPTER, TRAINING, DIFFERENCE = "bare model", "adapter", "training pictures", "adapter minus bare"
STYLED, STYLE_FREE = "prompts in the style", "prompts without it"
SHOWN = 5  # of the best and the worst
BACKGROUND = "white"  # of transparent pictures
MEANING = (
    "The training pictures went through the model's size and VAE. likeness: mean cosine with them (of these: with the "
    "others); the nearest of them: near 1, one is copied; variety: 1 minus the mean cosine of pictures with each "
    "other; drift: 1 minus the cosine with the bare model's picture of the same prompt and seed, which should be small "
    "without the style."
)


def main(config: EvalStyleConfig, *, resume: Path | None = None) -> None:
    """Draws the pictures, scores them and prints the table.

    Writes to the run directory: table.md, metrics.json, the pictures in samples/ with manifest.jsonl, which a gallery
    shows, and sheet.png with the pictures that are most and least like the training pictures.

    Args:
        config: The config.
        resume: Unused: the same command with the same `output` goes on.

    Raises:
        ValueError: The adapter does not say what it was trained on, or the pictures, the model or the encoder cannot be
            used. The run directory is created only after these checks.
    """
    processes, adapter = started_together(), find_adapters([config.adapter.path])
    config, base = with_usual_settings(config, adapter), config.model or model_of(adapter)
    inputs = {"the adapter": adapter_digest(resolve_path(config.adapter.path, "adapter.path"))}
    if processes.is_main:
        check_reopened(config, inputs | identity_of(base).inputs)
    loaded = load_model(config, {config.adapter.path})
    trained = training_of(loaded.adapters[config.adapter.path])
    images = training_images(config, trained)
    styled, style_free = prompts_of(config, trained, images)
    requests = requests_of(config, styled + style_free)
    loaded.check(requests)
    vectors = vectors_by(loaded.model.device, config.clip_model, config.timm_model)
    inputs |= {**identity_of(base).inputs, "the training pictures": digest_of(images)}
    with processes.run(evaluation_run(config, inputs)) as run:
        generation = loaded.generate(run.path, requests, config.batch_size, processes)
        if not processes.is_main:
            return
        generation.raise_failures()
        training = vectors.of_images(reconstructed(loaded.model, images, BACKGROUND))
        score(config, run, generation, vectors, training, images, styled, style_free)


# --- what is drawn ---------------------------------------------------------------------------------------------------


def training_images(config: EvalStyleConfig, trained: TrainDiffusionConfig | None) -> list[CaptionedImage]:
    """The pictures that the drawn ones are compared with."""
    if config.images is None and trained is None:
        raise ValueError(f"images: {config.adapter.path} does not say what it was trained on: name the folder")
    if config.images is not None:
        return read_captioned_images(config.images, instance_prompt=PLACEHOLDER, key="images")
    assert trained is not None
    try:
        return images_of_training(trained.data)
    except ValueError as error:
        raise ValueError(f"images: {error}") from error


def prompts_of(
    config: EvalStyleConfig, trained: TrainDiffusionConfig | None, images: Sequence[CaptionedImage]
) -> tuple[list[str], list[str]]:
    """The prompts in the style, and those without it: the config's, or what the training and its captions suggest."""
    return list(config.prompts) or prompts_in_style(trained, images), list(config.prompts_without_style or THINGS)


def requests_of(config: EvalStyleConfig, prompts: Sequence[str]) -> list[ImageRequest]:
    """Every prompt with every seed, first by the bare model, then by the adapted one."""
    common = template(config)
    return [
        replace(common, row=row, prompt=prompt, seed=seed, strength=strength)
        for strength in (0.0, 1.0)
        for row, prompt in enumerate(prompts, 1)
        for seed in config.seeds
    ]


# --- scores ----------------------------------------------------------------------------------------------------------


def score(
    config: EvalStyleConfig,
    run: RunDirectory,
    generation: BatchGeneration,
    vectors: Vectors,
    training: np.ndarray,
    images: Sequence[CaptionedImage],
    styled: Sequence[str],
    style_free: Sequence[str],
) -> None:
    """Scores the pictures, and writes and prints the table."""
    num_seeds, cut = len(config.seeds), len(styled) * len(config.seeds)
    generated = vectors.of_images(
        [load_rgb(generation.file(index), BACKGROUND) for index in range(len(generation.requests))]
    )
    bare, adapted = np.split(generated, 2)
    rows, cells = {}, {}
    for part, prompts, chosen in ((STYLED, styled, slice(None, cut)), (STYLE_FREE, style_free, slice(cut, None))):
        texts = np.repeat(vectors.of_texts(prompts), num_seeds, axis=0) if vectors.of_texts else None
        both = {
            BARE: own_style.scores_of(bare[chosen], training, num_seeds, texts),
            ADAPTER: own_style.scores_of(adapted[chosen], training, num_seeds, texts, bare[chosen]),
        }
        cells |= {f"{name}, {part}": found.cells for name, found in both.items()}
        rows |= {f"{name}, {part}": own_style.confidence_intervals(found) for name, found in both.items()}
        rows[f"{DIFFERENCE}, {part}"] = own_style.differences(both[ADAPTER], both[BARE])
    rows[TRAINING] = own_style.confidence_intervals(own_style.among_themselves(training))
    order = [f"{name}, {part}" for name in (BARE, ADAPTER) for part in (STYLED, STYLE_FREE)]
    generation.scores = dict(enumerate(each for name in order for each in scores_per_image(cells[name])))
    write_manifest(run.path, generation.entries())
    report(config, run, rows, vectors.about, len(images))
    likeness = cells[f"{ADAPTER}, {STYLED}"][own_style.LIKENESS]
    save_extremes(run, generation, likeness, images, (adapted[:cut] @ training.T).argmax(axis=1))
    added = [rows[f"{DIFFERENCE}, {part}"] for part in (STYLED, STYLE_FREE)]
    nearest = [rows[name][own_style.NEAREST] for name in (f"{ADAPTER}, {STYLED}", TRAINING)]
    print(f"\n{own_style.conclusion(*added, *nearest)}")


def report(config: EvalStyleConfig, run: RunDirectory, rows: Any, about: str, num_images: int) -> None:
    """Writes table.md and metrics.json, and prints the table."""
    seeds = f"seeds {', '.join(map(str, config.seeds))}"
    head = f"{config.adapter.path}, beside {num_images} training pictures; {seeds}; 95 % intervals over prompts"
    text = "\n\n".join([head, own_style.own_style_table(rows), MEANING, about])
    write_text(run.path / "table.md", text + "\n")
    values = {name: {key: value.as_dict() for key, value in row.items()} for name, row in rows.items()}
    write_json(run.path / "metrics.json", {"adapter": config.adapter.path, "rows": values})
    print(f"{text}\n\ntable    {run.path / 'table.md'}")


def save_extremes(
    run: RunDirectory,
    generation: BatchGeneration,
    scores: np.ndarray,
    images: Sequence[CaptionedImage],
    nearest: np.ndarray,
) -> None:
    """Saves a sheet of the adapter's pictures most and least like the training pictures, with these.

    Args:
        run: The run directory.
        generation: The pictures.
        scores: The likeness of each of the adapter's pictures in the style.
        images: The training pictures.
        nearest: The number of the training picture that is nearest to each.
    """
    first = len(generation.requests) // 2
    order = np.argsort(-scores)
    shown = min(SHOWN, (len(order) + 1) // 2)
    seeds = len({request.seed for request in generation.requests}) > 1
    parts = []
    for title, chosen in (("most like the training", order[:shown]), ("least like the training", order[::-1][:shown])):
        generated = {"no adapter": chosen, f"adapter: {title}": first + chosen}
        rows = [[thumbnail(generation.file(int(index))) for index in indices] for indices in generated.values()]
        rows.append([training_thumbnail(images[int(nearest[index])].path, rows[1][0].size) for index in chosen])
        labels = [label(generation.requests[index], ["seed"] if seeds else []) for index in chosen]
        parts.append(image_grid(rows, [*generated, "the training picture that is nearest to it"], labels))
    save_atomically(run.contact_sheet, below(parts))
    print(f"sheet    {run.contact_sheet}\nto look  dora-mm gallery {shlex.quote(str(run.path))}")


def training_thumbnail(path: Path, size: tuple[int, int]) -> Image.Image:
    """A training picture, as large as the drawn ones at most."""
    request = load_rgb(path, BACKGROUND)
    request.thumbnail(size, Image.Resampling.LANCZOS)
    return request
