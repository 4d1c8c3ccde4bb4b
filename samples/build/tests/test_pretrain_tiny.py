"""The pretraining of the small SDXL in a few steps: diffusers loads the model, and resuming gives the same weights."""

import copy
import json
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionXLPipeline
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from dora_mm.eval.images.prompts import with_article
from samples.build.__main__ import main
from samples.build.pretraining.batches import batch_indices
from samples.build.pretraining.icons import ALL_STYLES, DEFAULT_STYLE, STYLE_WORDS, caption, read_icons
from samples.build.recipes import pretrain_tiny

STAGE = {
    "optimizer": {"lr": 1e-3},
    "train": {"steps": 3, "batch_size": 2, "checkpoint_every": 1, "keep_checkpoints": 9},
}

KILLED = {  # the last checkpoint of each stage, as if the run had been killed in the stage's second step
    "in the unet": {"vae": 3, "unet": 1, "decoder": 0},
    "in the decoder": {"vae": 3, "unet": 3, "decoder": 1},
}


@pytest.fixture
def icons(tmp_path):
    folder = tmp_path / "icons"
    concepts = [
        {"code": f"1f68{i}", "name": name, "group": "Things", "split": split}
        | ({"role": "report"} if split == "pretrain" else {})
        for i, (name, split) in enumerate({"bus": "pretrain", "owl": "pretrain", "key": "judge"}.items())
    ]
    for style in ALL_STYLES:
        (folder / style).mkdir(parents=True)
        for index, concept in enumerate(concepts):
            noise = np.random.default_rng(index).integers(0, 256, (48, 48, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / style / f"{concept['code']}.webp")
    (folder / "concepts.json").write_text(json.dumps(concepts))
    return folder


@pytest.fixture
def config(tmp_path, icons):
    def write(name):
        path = tmp_path / f"{name}.yaml"
        values = {
            "pipeline": "pretrain_tiny",
            "output": str(tmp_path / name),
            "icons": str(icons),
            "model": {"resolution": 64, "num_merges": 100, "vae_channels": [8, 8, 8, 8], "unet_channels": [16, 16, 32]},
            "vae": copy.deepcopy(STAGE),  # an alias in the file would be refused
            "unet": copy.deepcopy(STAGE),
            "decoder": STAGE,
            "ema_decay": 0.5,
            "sample": {"prompts": ["a flat icon of a bus"], "steps": 2, "every": 2},
        }
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write


def weights(run):
    return {part: load_file(next((run / "tiny-sdxl" / part).glob("*.safetensors"))) for part in ("unet", "vae")}


@pytest.mark.parametrize("killed", ["in the unet", "in the decoder"])
@pytest.mark.slow
def test_plain_diffusers_loads_the_model_and_resuming_is_exact(config, tmp_path, killed):
    assert main(["train", str(config("whole"))]) == 0
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "whole" / "tiny-sdxl")
    assert pipe.text_encoder.dtype == pipe.unet.dtype == torch.float32
    assert pipe.vae.config.latent_channels == 8
    assert pipe("a flat icon of an owl", num_inference_steps=2).images[0].size == (64, 64)
    assert Image.open(tmp_path / "whole" / "sheet.png").width > 100
    stored = weights(tmp_path / "whole")
    assert {tensor.dtype for part in stored.values() for tensor in part.values()} == {torch.float16}

    assert main(["train", str(config("parts"))]) == 0
    run = tmp_path / "parts"
    for stage, kept in KILLED[killed].items():
        for step in range(kept + 1, 4):
            folder = run / stage / "checkpoints" / f"step-{step:06d}"
            folder.rename(folder.with_name("gone-" + folder.name))
    assert main(["train", "--resume", str(run)]) == 0
    for part, tensors in weights(run).items():
        assert all(torch.equal(tensor, stored[part][name]) for name, tensor in tensors.items())


@pytest.mark.slow
def test_the_encoder_of_vae_from_is_not_trained(config, tmp_path):
    assert main(["train", str(config("first"))]) == 0
    model = tmp_path / "first" / "tiny-sdxl"
    assert main(["train", str(config("second")), "--set", f"vae_from={model}", "seed=1"]) == 0
    one, two = weights(tmp_path / "first"), weights(tmp_path / "second")
    kept = {name: torch.equal(tensor, two["vae"][name]) for name, tensor in one["vae"].items()}
    assert {name.split(".")[0] for name, same in kept.items() if same} == {"encoder", "quant_conv"}
    assert all(same for name, same in kept.items() if name.startswith(("encoder", "quant_conv")))
    assert not all(torch.equal(tensor, two["unet"][name]) for name, tensor in one["unet"].items())


@pytest.mark.slow
def test_a_model_is_trained_further(config, tmp_path):
    assert main(["train", str(config("first"))]) == 0
    model = tmp_path / "first" / "tiny-sdxl"
    further = [
        "--set",
        f"vae_from={model}",
        f"unet_from={model}",
        "decoder=null",
        "seed=1",
        "unet.train.steps=1",
        "ema_decay=0.0",
    ]
    for name, rate in (("still", "1e-30"), ("moved", "1e-3")):
        assert main(["train", str(config(name)), *further, f"unet.optimizer.lr={rate}"]) == 0
    one = weights(tmp_path / "first")
    for part, tensors in weights(tmp_path / "still").items():
        assert all(torch.equal(tensor, one[part][name]) for name, tensor in tensors.items())
    moved = weights(tmp_path / "moved")["unet"]
    assert not all(torch.equal(tensor, one["unet"][name]) for name, tensor in moved.items())


@pytest.mark.slow
def test_the_decoder_alone_is_trained_further(config, tmp_path):
    assert main(["train", str(config("first"))]) == 0
    model = tmp_path / "first" / "tiny-sdxl"
    further = ["--set", f"vae_from={model}", f"unet_from={model}", "unet=null"]
    assert main(["train", str(config("second")), *further]) == 0
    one, two = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(torch.equal(tensor, two["unet"][name]) for name, tensor in one["unet"].items())
    assert {name.split(".")[0] for name, tensor in one["vae"].items() if not torch.equal(tensor, two["vae"][name])} == {
        "decoder",
        "post_quant_conv",
    }
    assert not (tmp_path / "second" / "unet").exists()


@pytest.mark.parametrize("left_out", [["unet=null"], ["unet=null", "unet_from=any", "decoder=null"]])
def test_training_only_the_decoder_requires_a_unet_and_the_decoder_stage(config, tmp_path, capsys, left_out):
    assert main(["train", str(config("run")), "--set", *left_out]) == 2
    assert "unet: null trains only the decoder" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interruption_while_sampling_keeps_the_trained_weights(config, tmp_path, monkeypatch):
    assert main(["train", str(config("whole"))]) == 0
    real = pretrain_tiny.sample

    def interrupted(*args, **kwargs):
        monkeypatch.setattr(pretrain_tiny, "sample", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain_tiny, "sample", interrupted)
    assert main(["train", str(config("parts"))]) == 130
    assert main(["train", "--resume", str(tmp_path / "parts")]) == 0
    stored = weights(tmp_path / "whole")
    for part, tensors in weights(tmp_path / "parts").items():
        assert all(torch.equal(tensor, stored[part][name]) for name, tensor in tensors.items())


def test_a_starting_model_of_other_sizes_is_refused_before_the_run_directory_exists(
    config, tmp_path, tiny_folder, capsys
):
    assert main(["train", str(config("run")), "--set", f"vae_from={tiny_folder}"]) == 2
    assert "latent channels" in capsys.readouterr().err
    assert main(["train", str(config("run")), "--set", "vae_from=nowhere"]) == 2
    assert "vae_from: nowhere does not exist" in capsys.readouterr().err
    assert main(["train", str(config("run")), "--set", f"unet_from={tiny_folder}"]) == 2
    assert "unet_from: the unet in" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_missing_icon_is_named(config, icons, tmp_path, capsys):
    (icons / "noto" / "1f681.webp").unlink()
    assert main(["train", str(config("run"))]) == 2
    assert "1f681.webp" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("unnamed", [0.0, 1.0])
def test_captions_name_the_concept_and_every_style_except_the_default(icons, unnamed):
    stream = torch.Generator().manual_seed(0)
    for icon in read_icons(icons, tuple(STYLE_WORDS), "pretrain") * 20:
        text = caption(icon, stream, unnamed)
        assert with_article(icon.concept.name) in text
        assert (STYLE_WORDS[icon.style] in text) == (icon.style != DEFAULT_STYLE or not unnamed)


def test_the_style_is_unnamed_in_the_given_share_of_captions(icons):
    stream = torch.Generator().manual_seed(0)
    icon = read_icons(icons, [DEFAULT_STYLE], "pretrain")[0]
    texts = [caption(icon, stream, 0.6) for _ in range(2000)]
    assert sum("flat" not in text for text in texts) / 2000 == pytest.approx(0.6, abs=0.04)
    assert len(set(texts)) > 500  # made-up words are drawn again for every caption


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bus", "a bus"),
        ("owl", "an owl"),
        ("hourglass", "an hourglass"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("french fries", "french fries"),
        ("bowl of noodles", "a bowl of noodles"),
        ("cactus", "a cactus"),
        ("compass", "a compass"),
        ("bread", "bread"),
    ],
)
def test_articles(name, expected):
    assert with_article(name) == expected


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 5))
def test_every_item_is_seen_once_per_epoch(num_items, batch_size, seed):
    rows = [i for step in range(num_items) for i in batch_indices(num_items, batch_size, step, seed)]
    assert Counter(rows) == dict.fromkeys(range(num_items), batch_size)
