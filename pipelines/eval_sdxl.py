"""Scores a style adapter: does it draw in the style, and does it still draw the thing?

Pictures of things that are in no adapter's images, drawn by the bare model (on prompts that it knows, and on the
adapter's) and by the adapter, go to a fitted judge (`fit_judge`); the table carries 95 % intervals over things.
"""

import logging
from pathlib import Path

from PIL import Image

import dora_mm
from dora_mm.config.loader import resolve_model, resolve_path
from dora_mm.config.sdxl import AdapterFile, ClipConfig, EvalSDXLConfig
from dora_mm.data.images.folder import load_rgb
from dora_mm.eval.images.clip import ClipSimilarity
from dora_mm.eval.images.concepts import Concept
from dora_mm.eval.images.encoder import Encoder
from dora_mm.eval.images.judge import Judge
from dora_mm.eval.images.prompts import fill
from dora_mm.eval.images.scores import format_interval, metrics_table, summarize, write_json
from dora_mm.eval.statistics import Interval, bootstrap
from dora_mm.models.sdxl.loading import SDXL, load_configured
from dora_mm.sampling.before_after import built_once
from dora_mm.sampling.grids import sheet
from dora_mm.sampling.sdxl import sample
from dora_mm.train.run import RunDirectory, open_run
from dora_mm.utils.devices import default_device
from dora_mm.utils.digest import module_digest
from dora_mm.utils.tables import markdown_table

log = logging.getLogger(__name__)
SHEET_COLUMNS = 10
BARE_FLAT, BARE, ADAPTER = "bare model, flat prompts", "bare model", "adapter"


def main(config: EvalSDXLConfig, *, resume: Path | None = None) -> None:
    judge = Judge.load(resolve_path(config.judge, "judge"))
    concepts = judge.choose(config.concepts.role, config.concepts.count)
    device = default_device()
    model = load_configured(config.model).to(device)
    judge.check_model(model.resolution, module_digest(model.vae))
    if config.adapter:
        load_adapter(model, config.adapter)
    encoder = Encoder(device)
    references = read_references(config.clip) if config.clip else []
    clip = ClipSimilarity(resolve_model(config.clip.path, "clip.path"), device) if config.clip else None
    # All that can be wrong has been read by now: minutes of drawing follow.
    run = open_run(config)

    pictures = draw_all(config, model, concepts)
    seeds = config.concepts.seeds
    found = {}
    for name, drawn in pictures.items():
        scores = judge.scores(encoder(drawn), concepts, seeds)
        scores.save(run.path / "scores" / f"{name.replace(' ', '_').replace(',', '')}.json")
        # A bare model on flat prompts is to be flat; beside it stands how much of the style is seen in it.
        found[name] = summarize(scores, config.style, judge.space, over_seeds=False)
    similarity = clip_similarity(config, clip, references, pictures, concepts) if clip and config.clip else {}
    report(config, run, judge, found, similarity)
    draw_sheet(run, pictures, concepts, len(seeds))


def draw_all(config: EvalSDXLConfig, model: SDXL, concepts: list[Concept]) -> dict[str, list[Image.Image]]:
    """Pictures by row of the table, concepts outside, seeds inside.

    `model` is adapted where there is an adapter. The bare model is then loaded anew: weights that were trained whole
    keep none.
    """
    adapted = {}
    if config.adapter:
        device = model.device
        adapted[ADAPTER] = draw(config, model, concepts, config.prompt, ADAPTER)
        del model
        model = load_configured(config.model).to(device)
    return {
        BARE_FLAT: draw(config, model, concepts, config.flat_prompt, BARE_FLAT),
        BARE: draw(config, model, concepts, config.prompt, BARE),
        **adapted,
    }


def draw(
    config: EvalSDXLConfig, model: SDXL, concepts: list[Concept], template: str, description: str
) -> list[Image.Image]:
    seeds = config.concepts.seeds
    with built_once(model.networks.values()):
        return sample(
            model.pipeline(),
            [fill(template, concept) for concept in concepts for _ in seeds],
            [seed for _ in concepts for seed in seeds],
            steps=config.draw.steps,
            guidance=config.draw.guidance,
            negative_prompt=config.draw.negative_prompt,
            batch_size=config.draw.batch_size,
            description=description,
        )


def load_adapter(model: SDXL, adapter: AdapterFile) -> None:
    file = resolve_path(adapter.path, "adapter.path")
    report = dora_mm.load_adapter(model.adaptable, file, strength=adapter.strength)
    log.info("%d adapted modules, %s parameters.", report.num_modules, f"{report.num_parameters:,}")


def clip_similarity(
    config: EvalSDXLConfig,
    clip: ClipSimilarity,
    references: list[Image.Image],
    pictures: dict[str, list[Image.Image]],
    concepts: list[Concept],
) -> dict[str, dict[str, Interval]]:
    """Cosine with the thing's own text, and with the reference pictures where there are any."""
    assert config.clip is not None
    seeds = config.concepts.seeds
    texts = [fill(config.clip.text, concept) for concept in concepts for _ in seeds]
    found: dict[str, dict[str, Interval]] = {}
    for name, drawn in pictures.items():
        values = {"CLIP text similarity": clip.to_texts(drawn, texts)}
        if references:
            values["CLIP image similarity"] = clip.to_images(drawn, references)
        found[name] = {key: bootstrap(cosines.reshape(len(concepts), len(seeds))) for key, cosines in values.items()}
    return found


def read_references(config: ClipConfig) -> list[Image.Image]:
    if config.images is None:
        return []
    folder = resolve_path(config.images, "clip.images")
    known = {".webp", ".png", ".jpg", ".jpeg"}
    found = [load_rgb(path, "white") for path in sorted(folder.iterdir()) if path.suffix.lower() in known]
    if not found:
        raise ValueError(f"clip.images: {folder} holds no pictures (.webp, .png, .jpg): name a folder that does")
    return found


def report(
    config: EvalSDXLConfig,
    run: RunDirectory,
    judge: Judge,
    found: dict[str, dict[str, Interval]],
    similarity: dict[str, dict[str, Interval]],
) -> None:
    """table.md and metrics.json, and the same on the screen."""
    count = judge.choose(config.concepts.role, config.concepts.count)
    lines = [
        f"style {config.style}: {len(count)} things x {len(config.concepts.seeds)} seeds, 95 % intervals over things",
        metrics_table(found),
        judge.describe(),
    ]
    if similarity:
        headings = list(next(iter(similarity.values())))
        rows = [[name, *(format_interval(cells[key], False) for key in headings)] for name, cells in similarity.items()]
        lines.insert(2, markdown_table(["", *headings], rows))
    text = "\n\n".join(lines)
    (run.path / "table.md").write_text(text + "\n", encoding="utf-8")
    metrics = {name: {key: value.as_dict() for key, value in cells.items()} for name, cells in found.items()}
    for name, cells in similarity.items():
        metrics[name] |= {key: value.as_dict() for key, value in cells.items()}
    write_json(run.path / "metrics.json", {"style": config.style, "rows": metrics, "judge": judge.report})
    print(text)
    print(f"\ntable    {run.path / 'table.md'}")


def draw_sheet(
    run: RunDirectory, pictures: dict[str, list[Image.Image]], concepts: list[Concept], num_seeds: int
) -> None:
    """The first things of the list, first seed, a row per line of the table."""
    columns = concepts[:SHEET_COLUMNS]
    rows = [drawn[: len(columns) * num_seeds : num_seeds] for drawn in pictures.values()]
    sheet(rows, list(pictures), [concept.name for concept in columns]).save(run.sheet)
    print(f"sheet    {run.sheet}")
