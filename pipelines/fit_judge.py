"""Fits the judge of style adapters on real icons, at the size and through the VAE of one model.

A few minutes, once per VAE. What comes out (judge.safetensors, judge.json) is all that `eval_sdxl` needs.
"""

import logging
from pathlib import Path

import torch
from accelerate import Accelerator

from dora_mm.config.loader import dump_config, resolve_model, resolve_path
from dora_mm.config.schema import FitJudgeConfig
from dora_mm.data.latents import module_digest
from dora_mm.eval.encoder import Encoder
from dora_mm.eval.icons import icon_paths, read_icon_concepts, through_vae
from dora_mm.eval.judge import fit_judge
from dora_mm.eval.style import STYLES
from dora_mm.models.sdxl import load_sdxl
from dora_mm.train.run import RunDirectory

log = logging.getLogger(__name__)


def main(config: FitJudgeConfig, *, resume: Path | None = None) -> None:
    folder = resolve_path(config.icons, "icons")
    concepts = read_icon_concepts(folder)
    paths = {style: icon_paths(folder, style, concepts) for style in STYLES}
    device = Accelerator().device
    encoder = Encoder(device)
    model = load_sdxl(
        resolve_model(config.model.path),
        dtype=getattr(torch, config.model.dtype),
        vae=resolve_model(config.model.vae, "model.vae") if config.model.vae else None,
    )
    model.freeze().to(device)
    run = RunDirectory.create(config.name, dump_config(config), config.output)

    features = {}
    for style in STYLES:
        log.info("%s: %d icons", style, len(concepts))
        pictures = through_vae(model, paths[style], progress=f"{style}, VAE")
        features[style] = encoder(pictures, progress=f"{style}, features")
    log.info("fitting")
    origin = {"model": config.model.path, "resolution": model.resolution, "vae": module_digest(model.vae)}
    judge = fit_judge(concepts, features, origin)
    judge.save(run.path)
    print(judge.describe())
    print(f"judge    {run.path}")
