"""Pretrains the embedded FLUX.2 klein from scratch, around the VAE of the embedded SDXL model.

Transformer and text encoder learn the flat icons of some things from text, and edits of all icons: an icon is kept,
mirrored, made grey or put on another background, or one of two is chosen. They never see a brick: adapters learn those.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKLFlux2
from PIL import Image
from torch import Tensor

from dora_mm.config.loader import dump_config
from dora_mm.config.paths import resolve_path
from dora_mm.data.images.buckets import Framing
from dora_mm.models.images.components import load_vae
from dora_mm.models.images.flux2_klein import Flux2Klein
from dora_mm.sampling.grids import image_grid
from dora_mm.sampling.image_sampler import sample
from dora_mm.tasks.diffusion import ConditionedLatents
from dora_mm.utils.randomness import generator
from dora_mm.utils.run_directory import RunDirectory
from samples.build.pretraining import pairs
from samples.build.pretraining.batches import batch_indices
from samples.build.pretraining.flow_training import (
    encode_icons,
    encode_pixels,
    of_things,
    sheet_path,
    short_caption,
    show_samples,
    train_flow,
)
from samples.build.pretraining.icons import DEFAULT_STYLE, Icon, caption, load_pixels, read_icons
from samples.build.pretraining.pairs import Pair
from samples.build.pretraining.tiny_flow import save
from samples.build.pretraining.tiny_klein import build_tiny_klein, encode
from samples.build.schema import PretrainTinyKleinConfig

log = logging.getLogger(__name__)
CAPTIONS = 40  # of each icon, which the tokenizer is trained on
INSTRUCTIONS = 2000  # which it is trained on as well
TWO_REFERENCES = 0.25  # share of the batches of pairs whose rows have two references
SHOWN = 4  # pairs in a contact sheet with one reference, and with two


def main(config: PretrainTinyKleinConfig, *, resume: Path | None = None) -> None:
    """Trains the model.

    Writes to the run directory: checkpoints, metrics, sample images in samples/, the model in tiny-klein/, sheet.png,
    and sheet_edits.png with references, results and targets.

    Args:
        config: The config.
        resume: The run directory to resume; None: a new run.
    """
    everything = read_icons(resolve_path(config.icons, "icons"), [DEFAULT_STYLE], split="pretrain")
    drawn = of_things(everything, config.reported)
    vae = load_vae(AutoencoderKLFlux2, resolve_path(config.vae, "vae"))
    model = build_tiny_klein(
        vae,
        _texts(config, drawn),
        seed=config.seed,
        num_merges=config.model.num_merges,
        max_tokens=config.model.max_tokens,
        text_width=config.model.text_width,
        width=config.model.width,
        layers=config.model.layers,
        single_layers=config.model.single_layers,
        heads=config.model.heads,
        mlp_ratio=config.model.mlp_ratio,
    )
    run = (
        RunDirectory.resume(resume) if resume else RunDirectory.create(config.name, dump_config(config), config.output)
    )
    model.to(Accelerator(mixed_precision=config.train.mixed_precision).device).freeze()
    train(config, model, drawn, everything, run)
    show(config, model, everything, run)
    log.info("The model is in %s, sample images are in %s.", run.path / "tiny-klein", run.contact_sheet)


def train(
    config: PretrainTinyKleinConfig, model: Flux2Klein, drawn: list[Icon], everything: list[Icon], run: RunDirectory
) -> None:
    """Trains transformer and text encoder on batches of icons from text, and on batches of pairs."""
    latents, edits = model.normalized(encode_icons(model, drawn)), encode_variants(model, everything)
    side = model.resolution
    framing = Framing((side, side), (side, side), 0, 0, (side, side), False)

    def from_text(number: int) -> dict[str, Any]:
        rows = batch_indices(len(drawn), config.train.batch_size, number, config.seed)
        stream = generator(config.seed, number, "captions")
        longest = config.model.max_tokens
        captions = [short_caption(model, drawn[row], stream, config.unnamed_style, longest) for row in rows]
        return {"latents": latents[rows], "captions": dropped(config, captions, stream), "references": []}

    def of_pairs(number: int) -> dict[str, Any]:
        stream = generator(config.seed, number, "pairs")
        found = draw_pairs(len(everything), config.pairs_batch_size, number, config.seed)
        seen = zip(*(pair.references for pair in found), strict=True)  # the first references of all, then the second
        return {
            "latents": torch.stack([edits[pair.target] for pair in found]),
            "captions": dropped(config, [pair.instruction for pair in found], stream),
            "references": [torch.stack([edits[each] for each in references]) for references in seen],
        }

    def batch_at(number: int) -> dict[str, Any]:
        turn, place = divmod(number, config.pairs_every)
        return from_text(turn * (config.pairs_every - 1) + place - 1) if place else of_pairs(turn)

    def conditioned(batch: dict[str, Any]) -> ConditionedLatents:
        framings = [framing] * len(batch["latents"])
        prompts = encode(model, batch["captions"])
        return ConditionedLatents(batch["latents"], prompts, framings, references=batch["references"])

    trained = {"transformer": model.transformer, "text_encoder": model.text_encoder}
    train_flow(
        config, model, trained, batch_at, conditioned, run, lambda step: show(config, model, everything, run, step)
    )


def dropped(config: PretrainTinyKleinConfig, captions: list[str], stream: torch.Generator) -> list[str]:
    """The captions, some of them empty, for guidance."""
    kept = torch.rand(len(captions), generator=stream) >= config.caption_dropout
    return [caption if keep else "" for caption, keep in zip(captions, kept, strict=True)]


def draw_pairs(num_icons: int, batch_size: int, number: int, seed: int) -> list[Pair]:
    """Draws batch `number` of pairs, all of which have equally many references."""
    stream = generator(seed, number, "kinds of pairs")
    if torch.rand((), generator=stream) >= TWO_REFERENCES:
        return [pairs.one_reference(icon, stream) for icon in batch_indices(num_icons, batch_size, number, seed)]
    chosen = (torch.randperm(num_icons, generator=stream)[:2].tolist() for _ in range(batch_size))
    return [pairs.two_references(icons, stream) for icons in chosen]


def encode_variants(model: Flux2Klein, icons: list[Icon]) -> Tensor:
    """The normalized latents (N, NUM_VARIANTS, C, h, w) of all variants of icons."""
    pixels = load_pixels(icons, model.resolution)
    return torch.stack([model.normalized(encode_pixels(model, pairs.variants(icon))) for icon in pixels])


def show(
    config: PretrainTinyKleinConfig, model: Flux2Klein, icons: list[Icon], run: RunDirectory, step: int | None = None
) -> None:
    """Saves the current model, images generated from text, and edits; `step` is None at the end."""
    save(model, run.path / "tiny-klein")
    show_samples(config, model, run, step)
    show_edits(config, model, icons, run, step)


def show_edits(
    config: PretrainTinyKleinConfig, model: Flux2Klein, icons: list[Icon], run: RunDirectory, step: int | None
) -> None:
    """Saves a contact sheet of pairs: references, result and target."""
    drawn = [draw_pairs(len(icons), 1, number, config.seed + 1)[0] for number in range(4 * SHOWN)]
    shown = [pair for count in (1, 2) for pair in [each for each in drawn if len(each.references) == count][:SHOWN]]
    references = [[_image(model, icons, key) for key in pair.references] for pair in shown]
    settings = {"steps": config.sample.steps, "guidance": config.sample.guidance}
    results = [
        sample(model, [pair.instruction], [0], references=[seen], **settings)[0]
        for pair, seen in zip(shown, references, strict=True)
    ]
    rows = {
        "first reference": [seen[0] for seen in references],
        "last reference": [seen[-1] for seen in references],
        "result": results,
        "target": [_image(model, icons, pair.target) for pair in shown],
    }
    sheet = image_grid(list(rows.values()), list(rows), [pair.instruction for pair in shown])
    sheet.save(sheet_path(run, step, "_edits"))


def _image(model: Flux2Klein, icons: list[Icon], key: tuple[int, int]) -> Image.Image:
    """A variant of an icon."""
    pixels = pairs.variants(load_pixels([icons[key[0]]], model.resolution)[0])[key[1]]
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _texts(config: PretrainTinyKleinConfig, drawn: list[Icon]) -> list[str]:
    """The texts that the tokenizer is trained on."""
    stream = generator(config.seed, 0, "tokenizer captions")
    captions = [caption(icon, stream, config.unnamed_style) for icon in drawn for _ in range(CAPTIONS)]
    draws = (pairs.one_reference(0, stream) if number % 4 else pairs.two_references((0, 1), stream)
             for number in range(INSTRUCTIONS))  # fmt: skip
    return [*captions, *(pair.instruction for pair in draws)]
