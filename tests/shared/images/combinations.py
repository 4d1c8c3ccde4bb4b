"""Trainings on images with any of what they can be asked for."""

import copy
import json
from pathlib import Path

TEXT = "text_encoders.attn"
# By what is asked for: keys of the config with their values; FOLDER and OTHER stand for two folders
OPTIONS = {
    "text encoders": {"adapter.parts": ["unet.attn", TEXT]},
    "average": {"ema": {"decay": 0.9}},
    "new tokens": {"tokens": {"TOK": {"count": 2, "lr": 0.05}}, "train.stop_tokens_after": 2},
    "flip": {"data.flip": True},
    "float8": {"model.quantization": "float8"},
    "random crop": {"data.crop": "random"},
    "accumulation": {"train.gradient_accumulation_steps": 2},
    "folders": {
        "data.folder": None,
        "data.folders": [
            {"path": "FOLDER", "repeats": 1.5, "weight": 2.0},
            {"path": "OTHER", "prompt": "a plain thing", "resolution": 96, "weight": 0.5},
        ],
    },
    "captions": {
        "data.captions": {
            "prefix": "{a|one} TOK,",
            "alternatives": True,
            "shuffle": True,
            "tag_dropout": 0.3,
            "lines": True,
        },
        "data.caption_dropout": 0.2,
    },
    "masks": {"data.mask": {"floor": 0.2, "outside": "base"}},
    "preservation": {"preserve": {"prompt": "an icon", "weight": 0.5}},
    "caches": {"data.latent_cache": "SCRATCH/latents", "data.text_cache": "SCRATCH/text"},
}
EXCLUDES = {"caches": {"text encoders", "random crop"}}  # and so it is tried without these
ALONE = {  # not with all others: what is compiled takes a minute
    "held-out losses": {"data.valid": {"share": 0.4}, "evaluate": {"every": 2}},
    "rates": {"adapter.parts": {"unet.attn": {"lr": 0.005}, "unet.cross": {"rank": 3}}},
    "compiled": {"train.compile": True},
}
EDITS = {"references": {"data.references": ["REFERENCES"], "data.reference_dropout": 0.3}}  # of models that edit
QUANTIZED = {name: {"model.quantization": name} for name in ("nf4", "int8", "torchao_int8")}


def config_of(names, model, folders, run, section=()):
    """A training of three steps with these options, which saves a checkpoint after each.

    Args:
        names: Those of the options.
        model: The folder of the model.
        folders: Those of images; the last may be of references.
        run: The run directory.
        section: Further keys of `model`, for a flow model.
    """
    config = {
        "pipeline": "train_diffusion",
        "output": str(run),
        "model": {"path": str(model), **dict(section)},
        "adapter": {"rank": 2, "parts": ["unet.attn"]},
        "data": {"folder": "FOLDER", "resolution": 64, "instance_prompt": "a TOK thing"},
        "optimizer": {"lr": 0.01},
        "train": {"steps": 3, "batch_size": 2, "checkpoint_every": 1, "keep_checkpoints": 9},
    }
    left_out = set().union(*(EXCLUDES.get(name, set()) for name in names))
    for name in sorted(names - left_out):
        for key, value in copy.deepcopy((OPTIONS | ALONE | EDITS | QUANTIZED)[name]).items():
            section, _, leaf = key.partition(".")
            if leaf:
                config[section][leaf] = value
            else:
                config[section] = value
    places = {"FOLDER": folders[0], "OTHER": folders[1], "REFERENCES": folders[-1], "SCRATCH": run.parent}
    text = json.dumps(config)
    for name, place in places.items():
        text = text.replace(name, str(place))
    if (Path(model) / "transformer").is_dir():
        text = text.replace("unet.attn", "transformer.attn").replace("unet.cross", "transformer.ff")
    return json.loads(text)
