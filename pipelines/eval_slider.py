"""Scores a slider: how far images move along its attribute, how far they leave the neutral image, and how linearly.

The axis of the attribute is that between the base model's images of the plus and of the minus caption, or between the
two folders of images, as the vectors of an image encoder. The table has 95 % intervals over prompts.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dora_mm.adapting.control import random_adapter
from dora_mm.config.paths import resolve_path
from dora_mm.config.slider import EvalSliderConfig, Side, TrainSliderConfig
from dora_mm.data.images.pixels import load_rgb
from dora_mm.eval.images import slider
from dora_mm.eval.images.scores import scores_per_image, write_json
from dora_mm.formats.identity import adapter_digest
from dora_mm.models.images.families import identity_of
from dora_mm.sampling.batch.requests import ImageRequest, template
from dora_mm.sampling.contact_sheets import column_label, save_atomically, thumbnail
from dora_mm.sampling.generating import BatchGeneration
from dora_mm.sampling.grids import image_grid
from dora_mm.sampling.manifest import write_manifest
from dora_mm.sampling.model import LoadedModel, find_adapters, load_model, model_of
from dora_mm.sampling.own_style import Vectors, vectors_by
from dora_mm.sampling.reconstructed import reconstructed
from dora_mm.sampling.trainings import slider_of, with_usual_settings
from dora_mm.tasks.slider import Pairs, read_pairs
from dora_mm.train.run import check_reopened, evaluation_run
from dora_mm.utils.atomic import write_text
from dora_mm.utils.processes import started_together
from dora_mm.utils.run_directory import RunDirectory
from dora_mm.utils.shell import quoted

log = logging.getLogger(__name__)
SLIDER, CONTROL = "slider", "control"
SHOWN = 6  # rows of the contact sheet
MEANING = (
    "attribute: 1 as the base model's images of the plus caption on average, -1 as those of the minus caption; the "
    "axis of a prompt is made of the images of the others. likeness: cosine with the base model's image of the same "
    "prompt and seed. control: a random adapter, each of whose updates has the norm and rank of the slider's."
)


def main(config: EvalSliderConfig, *, resume: Path | None = None) -> None:
    """Generates the images, scores them and prints the table.

    Writes to the run directory: table.md, metrics.json, the images in samples/ with manifest.jsonl, which a gallery
    shows, sheet.png with a row per prompt and a column per strength, and the control in control/.

    Args:
        config: The config.
        resume: Unused: the same command with the same `output` goes on.

    Raises:
        ValueError: The adapter is no slider, or the model, its images or the encoder cannot be used. The run directory
            is created only after these checks.
    """
    processes, adapter = started_together(), find_adapters([config.adapter.path])
    config, base = with_usual_settings(config, adapter), config.model or model_of(adapter)
    trained = trained_slider(config, adapter[config.adapter.path])
    prompts = captions_of(config, trained, "neutral")
    inputs = {"the adapter": adapter_digest(resolve_path(config.adapter.path, "adapter.path"))}
    inputs |= identity_of(base).inputs
    if processes.is_main:
        check_reopened(config, inputs)
    pairs = read_pairs(trained.slider)
    loaded = load_model(config, {config.adapter.path})
    requests = requests_of(config, trained, prompts)
    loaded.check(requests)
    vectors = vectors_by(loaded.model.device, config.clip_model, config.timm_model)
    with processes.run(evaluation_run(config, inputs)) as run:
        if config.control:
            requests += control_requests(config, run, loaded, requests)
        generation = loaded.generate(run.path, requests, config.batch_size, processes)
        if processes.is_main:
            generation.raise_failures()
            score(config, run, loaded, generation, vectors, pairs, len(prompts))


# --- what is generated -----------------------------------------------------------------------------------------------


def trained_slider(config: EvalSliderConfig, file: Path) -> TrainSliderConfig:
    """The config that a slider was trained with.

    Raises:
        ValueError: The adapter is no slider, or has no things that could be replaced.
    """
    if (trained := slider_of(file)) is None:
        raise ValueError(f"adapter.path: {config.adapter.path} does not say that it is a slider of dora-mm: name one")
    if config.things and not trained.slider.things:
        raise ValueError(f"things: the captions of {config.adapter.path} have no {{thing}}: leave it out")
    return trained


def captions_of(config: EvalSliderConfig, trained: TrainSliderConfig, side: Side) -> list[str]:
    """A caption of the training, about each thing."""
    return [trained.slider.caption(side, thing) for thing in config.things or trained.slider.things or (None,)]


def requests_of(config: EvalSliderConfig, trained: TrainSliderConfig, prompts: Sequence[str]) -> list[ImageRequest]:
    """Every prompt with every seed at every strength, then by the base model, and with both captions of the axis."""
    common, found = template(config), [(strength, prompts) for strength in config.strengths]
    found.append((0.0, prompts))
    if trained.slider.images is None:
        found += [(0.0, captions_of(config, trained, side)) for side in ("plus", "minus")]
    return [
        replace(common, row=row, prompt=prompt, seed=seed, strength=strength, folder=f"{number:02d}")
        for number, (strength, texts) in enumerate(found)
        for row, prompt in enumerate(texts, 1)
        for seed in config.seeds
    ]


def control_requests(
    config: EvalSliderConfig, run: RunDirectory, loaded: LoadedModel, requests: Sequence[ImageRequest]
) -> list[ImageRequest]:
    """The images of a random adapter at all strengths, which is written to the run directory and made known."""
    path = run.path / CONTROL
    file = random_adapter(loaded.model.adaptable, loaded.adapters[config.adapter.path], path)
    loaded.adapters = {**loaded.adapters, str(path): file}
    loaded.__dict__.pop("new_tokens", None)  # they are kept for the adapters that were known
    folders = {f"{number:02d}" for number in range(len(config.strengths))}
    own = [request for request in requests if request.folder in folders]
    return [replace(each, adapters=((str(path), 1.0),), folder=f"{CONTROL}-{each.folder}") for each in own]


# --- scores ----------------------------------------------------------------------------------------------------------


def score(
    config: EvalSliderConfig,
    run: RunDirectory,
    loaded: LoadedModel,
    generation: BatchGeneration,
    vectors: Vectors,
    pairs: Pairs | None,
    num_prompts: int,
) -> None:
    """Scores the images, and writes and prints the table."""
    count, strengths = num_prompts * len(config.seeds), config.strengths  # images of one strength
    images = [load_rgb(generation.file(index), "white") for index in range(len(generation.requests))]
    # with a single prompt the intervals are over seeds
    shape = (num_prompts, len(config.seeds)) if num_prompts > 1 else (len(config.seeds), 1)
    found_vectors, T = vectors.of_images(images), len(strengths)
    blocks = found_vectors.reshape(-1, *shape, found_vectors.shape[1])
    own, neutral = blocks[:T], blocks[T]
    axis = (blocks[T + 1], blocks[T + 2]) if pairs is None else pair_axis(loaded, vectors, pairs)
    found = {SLIDER: slider.score_slider(strengths, own, neutral, axis)}
    if config.control:
        found[CONTROL] = slider.score_slider(strengths, blocks[-T:], neutral, axis)
    cells = {name: scores for name, (scores, _) in found.items()}
    generation.scores = dict(enumerate(scores_per_image(cells[SLIDER])))
    if config.control:
        first = len(generation.requests) - T * count
        generation.scores |= dict(enumerate(scores_per_image(cells[CONTROL]), first))
    write_manifest(run.path, generation.entries())
    report(config, run, cells, {name: summary for name, (_, summary) in found.items()}, vectors.about)
    save_contact_sheet(config, run, generation, count)


def pair_axis(loaded: LoadedModel, vectors: Vectors, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """The vectors of both folders' images through the model's VAE, (1, N, D) each: one axis for all prompts."""
    plus, minus = (vectors.of_images(reconstructed(loaded.model, side, "white"))[None] for side in pairs)
    return plus, minus


def report(config: EvalSliderConfig, run: RunDirectory, cells: Any, summaries: Any, about: str) -> None:
    """Writes table.md and metrics.json, and prints the table."""
    names = [slider.SLOPE, slider.LINEARITY]
    shown = {name: [f"{who} {row[name].text('{:.3f}')}" for who, row in summaries.items()] for name in names}
    lines = [f"{name}: {'; '.join(texts)}" for name, texts in shown.items()]
    table = slider.slider_table(config.strengths, cells)
    text = "\n\n".join([f"{config.adapter.path}; 95 % intervals over prompts", table, "\n".join(lines), MEANING, about])
    write_text(run.path / "table.md", text + "\n")
    values = {who: {name: row[name].as_dict() for name in names} for who, row in summaries.items()}
    images = {who: {name: score.tolist() for name, score in scores.items()} for who, scores in cells.items()}
    rows = {"adapter": config.adapter.path, "strengths": config.strengths, "rows": values, "images": images}
    write_json(run.path / "metrics.json", rows)
    print(f"{text}\n\n{slider.conclusion(summaries[SLIDER], summaries.get(CONTROL))}\n")
    print(f"table    {run.path / 'table.md'}")


def save_contact_sheet(config: EvalSliderConfig, run: RunDirectory, generation: BatchGeneration, count: int) -> None:
    """Saves a contact sheet: a row per prompt and seed by the slider, and with the control below it."""
    T = len(config.strengths)
    starts = {SLIDER: 0} | ({CONTROL: len(generation.requests) - T * count} if config.control else {})
    rows, labels = [], []
    for index in range(min(SHOWN, count)):
        for name, start in starts.items():
            rows.append([thumbnail(generation.file(start + column * count + index)) for column in range(T)])
            labels.append(f"{name}: {generation.requests[index].prompt}")
    heads = [column_label(None, strength, ["strength"]) for strength in config.strengths]
    save_atomically(run.contact_sheet, image_grid(rows, labels, heads))
    print(f"sheet    {run.contact_sheet}\nto look  dora-mm gallery {quoted(run.path)}")
