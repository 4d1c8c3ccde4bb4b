"""Everything that a training on pictures can be asked for, of each family and in any combination, resumed by bits."""

import copy
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from dora_mm.adapting import compiled
from dora_mm.cli import main
from dora_mm.models.quantization import QUANTIZATIONS
from tests.data.images.pictures import write_pictures
from tests.models.images.tiny_flows import EACH, FLOWS, NAMES

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
QUANTIZED = {name: {"model.quantization": name} for name in ("nf4", "int8", "torchao_int8")}
OF_FLOWS = OPTIONS.keys() - {"text encoders", "new tokens"}  # whose text encoders are frozen
MAY_BE = st.sets(st.sampled_from(sorted(OPTIONS)))


def config_of(names, model, folders, run, section=()):
    """A training of three steps with these options, which saves a checkpoint after each.

    Args:
        names: Those of the options.
        model: The folder of the model.
        folders: Those of pictures.
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
        for key, value in copy.deepcopy((OPTIONS | ALONE | QUANTIZED)[name]).items():
            section, _, leaf = key.partition(".")
            if leaf:
                config[section][leaf] = value
            else:
                config[section] = value
    places = {"FOLDER": folders[0], "OTHER": folders[1], "SCRATCH": run.parent}
    text = json.dumps(config)
    for name, place in places.items():
        text = text.replace(name, str(place))
    if (Path(model) / "transformer").is_dir():
        text = text.replace("unet.attn", "transformer.attn").replace("unet.cross", "transformer.ff")
    return json.loads(text)


def check_resumed(names, model, folders, section=()):
    """A run is put back to where a kill after its first checkpoint leaves it, resumed, and compared."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        file = Path(scratch) / "train.yaml"
        file.write_text(json.dumps(config_of(names, model, folders, run, section)))
        assert main(["train", str(file), "--dry-run"]) == 0
        assert main(["train", str(file)]) == 0
        whole = {path.relative_to(run): load_file(path) for path in run.glob("adapter*/*.safetensors")}
        assert len(whole) == (1 + ("average" in names)) * (1 + ("new tokens" in names))
        checkpoints = sorted((run / "checkpoints").iterdir())
        assert len(checkpoints) == 3
        for folder in (*checkpoints[1:], *run.glob("adapter*")):
            shutil.rmtree(folder)
        assert main(["train", "--resume", str(run)]) == 0
        for path, tensors in whole.items():
            resumed = load_file(run / path)
            assert tensors.keys() == resumed.keys()
            assert all((tensors[key] == resumed[key]).all() for key in tensors), (path, names)


@pytest.fixture(autouse=True)
def without_a_compiler(monkeypatch):
    """Blocks are traced, forward and backward, and run by torch: that needs no C++ compiler."""
    monkeypatch.setattr(compiled, "COMPILER", {"backend": "aot_eager"})


@pytest.fixture(scope="module", params=FLOWS, ids=NAMES)
def flow(request, tmp_path_factory):
    """A tiny model of each family of flow models, and the keys of its section."""
    folder = request.param.build(tmp_path_factory.mktemp(request.param.name) / "model")
    return folder, {request.param.name: request.param.settings} if request.param.settings else {}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = [tmp_path_factory.mktemp(name) for name in ("style", "plain")]
    write_pictures(found[0])
    write_pictures(found[1], count=2, captions=False)
    for folder in found:
        Image.fromarray(np.tri(64, dtype=np.uint8) * 255).save(folder / "0.mask.png")
    return found


SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}


WITHOUT_CACHES = pytest.param(set(OPTIONS) - set(EXCLUDES), id="without caches", marks=pytest.mark.slow)


@pytest.mark.parametrize("names", [WITHOUT_CACHES, pytest.param(set(OPTIONS), id="with caches")])
@pytest.mark.slow
def test_all_at_once_is_resumed_bit_for_bit(tiny_folder, folders, names):
    check_resumed(names, tiny_folder, folders)


@pytest.mark.slow
@settings(max_examples=30, **SETTINGS)
@given(MAY_BE)
def test_any_combination_is_resumed_bit_for_bit(tiny_folder, folders, names):
    check_resumed(names, tiny_folder, folders)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(OF_FLOWS | ALONE.keys()))
def test_each_is_resumed_bit_for_bit_over_a_flow_model(flow, folders, name):
    model, section = flow
    check_resumed({name}, model, folders, section)


WITH_QUANTIZED = {"masks", "preservation", "average", "caches"}


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_bases_are_resumed_bit_for_bit(flow, folders, name):
    pytest.importorskip(QUANTIZATIONS[name].package)
    model, section = flow
    check_resumed({name, *WITH_QUANTIZED}, model, folders, section)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_bases_of_sdxl_are_resumed_bit_for_bit(tiny_folder, folders, name):
    pytest.importorskip(QUANTIZATIONS[name].package)
    check_resumed({name, *WITH_QUANTIZED}, tiny_folder, folders)


@pytest.mark.slow
@pytest.mark.parametrize("flow", FLOWS[-1:], indirect=True, ids=NAMES[-1:])
def test_quantized_blocks_are_compiled(flow, folders):
    pytest.importorskip("bitsandbytes")
    model, section = flow
    check_resumed({"nf4", "compiled"}, model, folders, section)


@pytest.mark.parametrize("flow", EACH, indirect=True, ids=NAMES)
def test_all_at_once_over_a_flow_model_is_resumed_bit_for_bit(flow, folders):
    model, section = flow
    check_resumed(OF_FLOWS - {"random crop", "folders"}, model, folders, section)
