"""Scores an adapter of a model that edits on pairs of images: references and what should become of them.

Each pair is edited by the adapted model, by the bare one and, where the model can, by the adapted one without its
references. The results are compared with the targets, beside copies of the references. The table has 95 % intervals
over pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dora_mm.config.generation import EvalEditConfig
from dora_mm.config.images import TrainDiffusionConfig
from dora_mm.config.paths import resolve_path
from dora_mm.data.images.buckets import choose_bucket, frame
from dora_mm.data.images.folder import CaptionedImage, digest_of, read_captioned_images, read_training_images
from dora_mm.data.images.held_out import hold_out
from dora_mm.data.images.masks import ALPHA, load_mask
from dora_mm.data.images.pixels import crop_box
from dora_mm.data.images.wording import unchanged
from dora_mm.eval.images import edit
from dora_mm.eval.images.scores import scores_per_image, write_json
from dora_mm.formats.identity import adapter_digest
from dora_mm.models.images.editing import EditingModel
from dora_mm.models.images.families import identity_of
from dora_mm.models.images.image_model import ImageModel
from dora_mm.sampling.batch.requests import ImageRequest, template
from dora_mm.sampling.contact_sheets import save_atomically
from dora_mm.sampling.generating import BatchGeneration
from dora_mm.sampling.grids import image_grid
from dora_mm.sampling.manifest import write_manifest
from dora_mm.sampling.model import find_adapters, load_model, model_of
from dora_mm.sampling.own_style import Vectors, vectors_by
from dora_mm.sampling.reconstructed import through_vae
from dora_mm.sampling.trainings import training_of, with_usual_settings
from dora_mm.train.run import check_reopened, evaluation_run
from dora_mm.utils.atomic import write_text
from dora_mm.utils.folders import FOLLOW, Links
from dora_mm.utils.processes import started_together
from dora_mm.utils.run_directory import RunDirectory
from dora_mm.utils.shell import quoted

BARE, ADAPTER, TEXT, COPY, TARGET = "bare model", "adapter", "adapter, no references", "the reference", "the target"
DIFFERENCE = "adapter minus bare"
SHOWN = 6  # pairs on the contact sheet
MEANING = (
    "Targets and references went through the model's VAE at the target's size. likeness: the cosine of result and "
    "target. nearer: 1 - |result - target| / |reference - target|: 0 for a copy of the reference, 1 for the target. "
    "change: the mean difference of result and reference, from 0 to 1, where the target is as the reference "
)


class Pair(NamedTuple):
    """A target and its first reference as the model could generate them."""

    target: Image.Image
    reference: Image.Image
    kept: np.ndarray  # (H, W), boolean: where the reference should stay


def main(config: EvalEditConfig, *, resume: Path | None = None) -> None:
    """Generates the images, scores them and prints the table.

    Writes to the run directory: table.md, metrics.json, the images in samples/ with manifest.jsonl, which a gallery
    shows, and sheet.png with some pairs and what became of their references.

    Args:
        config: The config.
        resume: Unused: the same command with the same `output` goes on.

    Raises:
        ValueError: There are no pairs, or the model, the adapter or the encoder cannot be used. The run directory is
            created only after these checks.
    """
    processes, adapter = started_together(), find_adapters([config.adapter.path])
    config, base = with_usual_settings(config, adapter), config.model or model_of(adapter)
    inputs = {"the adapter": adapter_digest(resolve_path(config.adapter.path, "adapter.path"))}
    if processes.is_main:
        check_reopened(config, inputs | identity_of(base).inputs)
    loaded = load_model(config, {config.adapter.path})
    model, trained = loaded.model, training_of(loaded.adapters[config.adapter.path])
    pairs = pairs_of(config, trained)
    by_text = isinstance(model, EditingModel) and not model.needs_references
    resolution = trained.data.all_resolutions[-1] if trained else model.resolution
    requests = requests_of(config, pairs, resolution, by_text=by_text)
    loaded.check(requests)
    vectors = vectors_by(model.device, config.clip_model, config.timm_model)
    inputs |= {**identity_of(base).inputs, "the pairs": digest_of(pairs)}
    with processes.run(evaluation_run(config, inputs)) as run:
        generation = loaded.generate(run.path, requests, config.batch_size, processes)
        if not processes.is_main:
            return
        generation.raise_failures()
        shown = [as_generated(model, pair, resolution, config.threshold) for pair in pairs]
        score(config, run, generation, vectors, shown)


# --- what is generated -----------------------------------------------------------------------------------------------


def pairs_of(config: EvalEditConfig, trained: TrainDiffusionConfig | None) -> list[CaptionedImage]:
    """The pairs that are scored: those of a folder, or those that the training held out; captions as it reads them."""
    if config.images is not None:
        found = read_captioned_images(
            config.images,
            instance_prompt=config.prompt or (trained.data.instance_prompt if trained else None),
            key="images",
            prompt_key="prompt",
            references=config.references,
            reference_key="references",
            masks="file" if config.masks else None,
            mask_folder=config.masks,
            mask_key="masks",
            links=Links(config.follow_links, FOLLOW),
        )
        source = f"images: {config.images}"
    elif trained is None:
        raise ValueError(f"images: {config.adapter.path} does not say what it was trained on: name the folder")
    else:
        try:
            found = hold_out(read_training_images(trained.data), trained.data)[1]
        except ValueError as error:
            raise ValueError(f"images: {error}") from error
        source = f"images: the training of {config.adapter.path} held out"
    pairs = [image for image in found if image.references]
    if not pairs:
        raise ValueError(f"{source} no images with references: name a folder with images and references")
    captions = trained.data.captions if trained else None
    return [pair._replace(caption=unchanged(pair, captions)) for pair in pairs]


def requests_of(
    config: EvalEditConfig, pairs: Sequence[CaptionedImage], resolution: int, *, by_text: bool
) -> list[ImageRequest]:
    """Every pair with every seed, by the bare model, by the adapted one and, `by_text`, by it without references."""
    common = template(config)
    sides = [(0.0, True), (1.0, True), *([(1.0, False)] if by_text else [])]
    found = []
    for strength, with_references in sides:
        # Files are named by row and strength
        for row, pair in enumerate(pairs, 1 if with_references else 1 + len(pairs)):
            height, width = choose_bucket(pair.size, resolution)
            images = tuple(str(each.path) for each in pair.references) if with_references else ()
            settings = {"prompt": pair.caption, "width": width, "height": height, "images": images}
            if images:
                settings["reference_area"] = config.reference_area
            found += [replace(common, row=row, seed=seed, strength=strength, **settings) for seed in config.seeds]
    return found


def as_generated(model: ImageModel, pair: CaptionedImage, resolution: int, threshold: float) -> Pair:
    """A pair at the size of its target's bucket and through the model's VAE, and where the reference should stay."""
    bucket = choose_bucket(pair.size, resolution)
    first = pair.references[0]
    framing = frame(pair.size, bucket)
    target = through_vae(model, pair.path, framing)
    reference = through_vae(model, first.path, frame(first.size, bucket))
    if pair.mask:
        mask = load_mask(pair.path, None if pair.mask == ALPHA else pair.mask_file)
        assert mask is not None
        size = target.size
        kept = np.asarray(mask.resize(size, Image.Resampling.BILINEAR, box=crop_box(mask, framing))) < 0.5
    else:
        kept = edit.kept_pixels(pixels(target), pixels(reference), threshold)
    return Pair(target, reference, kept)


def pixels(image: Image.Image) -> np.ndarray:
    """The pixels (H, W, 3), from 0 to 1."""
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


# --- scores ----------------------------------------------------------------------------------------------------------


def score(
    config: EvalEditConfig, run: RunDirectory, generation: BatchGeneration, vectors: Vectors, pairs: Sequence[Pair]
) -> None:
    """Scores the images, and writes and prints the table."""
    num, seeds = len(pairs), len(config.seeds)
    sides = dict(zip((BARE, ADAPTER, TEXT), range(len(generation.requests) // (num * seeds)), strict=False))
    targets, references = [pair.target for pair in pairs], [pair.reference for pair in pairs]
    of_targets, of_references = vectors.of_images(targets), vectors.of_images(references)
    results = [Image.open(generation.file(index)).convert("RGB") for index in range(len(generation.requests))]
    found = vectors.of_images(results).reshape(len(sides), num, seeds, -1)
    cells = {}
    for name, side in sides.items():
        shown = [results[(side * num + pair) * seeds :][:seeds] for pair in range(num)]
        cells[name] = scores_of(shown, found[side], of_targets, of_references, pairs)
    for name, images, of_images in ((COPY, references, of_references), (TARGET, targets, of_targets)):
        shown = [[image] for image in images]
        cells[name] = scores_of(shown, of_images[:, None], of_targets, of_references, pairs)
    rows = {name: edit.confidence_intervals(scores) for name, scores in cells.items()}
    rows[DIFFERENCE] = edit.differences(cells[ADAPTER], cells[BARE])
    per_image = [{key: values.ravel() for key, values in cells[name].items()} for name in sides]
    generation.scores = dict(enumerate(each for scores in per_image for each in scores_per_image(scores)))
    write_manifest(run.path, generation.entries())
    report(config, run, rows, vectors.about, num)
    save_contact_sheet(run, generation, pairs, list(sides), seeds)
    by_reference = edit.differences(cells[ADAPTER], cells[TEXT]).get(edit.NEARER) if TEXT in cells else None
    print(f"\n{edit.conclusion(rows[ADAPTER].get(edit.NEARER), rows[DIFFERENCE].get(edit.NEARER), by_reference)}")


def scores_of(
    images: Sequence[Sequence[Image.Image]],
    vectors_KSD: np.ndarray,
    targets_KD: np.ndarray,
    references_KD: np.ndarray,
    pairs: Sequence[Pair],
) -> dict[str, np.ndarray]:
    """All scores of the results of pairs, (K, S) each."""
    changed = [
        [edit.changed_pixels(pixels(image), pixels(pair.reference), pair.kept) for image in of_pair]
        for of_pair, pair in zip(images, pairs, strict=True)
    ]
    return {**edit.vector_scores(vectors_KSD, targets_KD, references_KD), edit.CHANGED: np.array(changed)}


def report(config: EvalEditConfig, run: RunDirectory, rows: Mapping, about: str, num_pairs: int) -> None:
    """Writes table.md and metrics.json, and prints the table."""
    seeds = f"seeds {', '.join(map(str, config.seeds))}"
    head = f"{config.adapter.path} on {num_pairs} pairs; {seeds}; 95 % intervals over pairs"
    meaning = MEANING + f"(no channel {config.threshold:g} or more apart), or outside of its mask."
    text = "\n\n".join([head, edit.edit_table(rows), meaning, about])
    write_text(run.path / "table.md", text + "\n")
    values = {name: {key: value.as_dict() for key, value in row.items()} for name, row in rows.items()}
    write_json(run.path / "metrics.json", {"adapter": config.adapter.path, "rows": values})
    print(f"{text}\n\ntable    {run.path / 'table.md'}")


def save_contact_sheet(
    run: RunDirectory, generation: BatchGeneration, pairs: Sequence[Pair], sides: Sequence[str], seeds: int
) -> None:
    """Saves a contact sheet of some pairs, evenly spaced: reference, results with the first seed, target."""
    chosen = sorted({round(index) for index in np.linspace(0, len(pairs) - 1, min(SHOWN, len(pairs)))})
    rows = [[pairs[index].reference for index in chosen]]
    for side in range(len(sides)):
        files = [generation.file((side * len(pairs) + index) * seeds) for index in chosen]
        rows.append([Image.open(file).convert("RGB") for file in files])
    rows.append([pairs[index].target for index in chosen])
    labels = [generation.requests[index * seeds].prompt for index in chosen]
    save_atomically(run.contact_sheet, image_grid(rows, [COPY, *sides, TARGET], labels))
    print(f"sheet    {run.contact_sheet}\nto look  dora-mm gallery {quoted(run.path)}")
