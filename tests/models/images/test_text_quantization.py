"""Text encoders of all families in 8 bits: what is stored so, and who knows of it."""

import csv
import json
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from dora_mm.cli import main
from dora_mm.config.models import ModelConfig
from dora_mm.core.wrappers.float8 import Float8Linear
from dora_mm.models.images.families import load_image_model
from dora_mm.models.streaming import repeated_blocks
from dora_mm.preview.rounding import TEXT_ROUNDING
from dora_mm.sampling.png import read_metadata

FAMILIES = ("tiny_flux2_klein", "tiny_krea2", "tiny_qwen_image", "tiny_qwen_image_21", "tiny_sd3", "tiny_z_image")


@pytest.fixture(params=["tiny_flux2_klein", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES[1:])])
def flow_model(request, tmp_path_factory):
    return str(import_module(f"tests.shared.images.{request.param}").build(tmp_path_factory.mktemp("flow") / "model"))


def test_text_encoders_are_stored_in_8_bits(flow_model):
    as_it_is, rounded = (
        load_image_model(ModelConfig(path=flow_model, text_quantization=kind)) for kind in (None, "float8")
    )
    planned = load_image_model(ModelConfig(path=flow_model, text_quantization="float8"), empty=True)
    for name in rounded.text_encoders:
        network = rounded.components[name]
        blocks = [m for block in repeated_blocks(network) for m in block.modules()]
        kinds = {type(m) for m in blocks if isinstance(m, nn.Linear)}
        assert kinds - {nn.Linear} == {Float8Linear}
        assert bytes_of(network) == bytes_of(planned.components[name]) < bytes_of(as_it_is.components[name])
    with torch.no_grad():
        one, other = (model.encode_prompts(["a red bus"])[0]["text"] for model in (as_it_is, rounded))
    assert 0 < (one - other).norm() / one.norm() < 0.15
    assert as_it_is.text_identity != rounded.text_identity
    assert not any(isinstance(m, Float8Linear) for m in rounded.networks[rounded.denoiser].modules())


def bytes_of(network):
    return sum(t.nbytes for t in (*network.parameters(), *network.buffers()))


def test_trainings_and_images_know_of_rounded_text_encoders(tmp_path, monkeypatch, image_folder, capsys):
    monkeypatch.chdir(tmp_path)
    model = import_module("tests.shared.images.tiny_flux2_klein").build(tmp_path / "model")
    values = {
        "pipeline": "train_diffusion",
        "model": {"path": str(model), "text_quantization": "float8"},
        "adapter": {"rank": 2, "parts": ["transformer.attn"]},
        "data": {"folder": str(image_folder), "resolution": 64, "text_cache": "texts"},
        "optimizer": {"lr": 0.01},
        "train": {"steps": 1, "batch_size": 1},
        "output": "run",
    }
    (tmp_path / "a.yaml").write_text(json.dumps(values))
    assert main(["train", "a.yaml", "--dry-run"]) == 0
    said = r"^rounded   text encoders in float8, .* off by (\d+\.\d)% of their length \(4 captions of this training\)"
    (share,) = re.findall(said, capsys.readouterr().out, re.M)
    assert 0 < float(share) < 10
    assert main(["train", "a.yaml"]) == 0
    cached = len(list(Path("texts").rglob("*.safetensors")))
    assert main(["train", "a.yaml", "--set", "model.text_quantization=null", "output=other"]) == 0
    assert len(list(Path("texts").rglob("*.safetensors"))) == 2 * cached > 0  # none of the first ones was taken
    sampled = ["sample", "--set", "prompts=[a bus]", "steps=1", "guidance=1", "width=64", "height=64"]
    assert main([*sampled, "adapter.path=run", "output=drawn"]) == 0
    (image,) = Path("drawn/samples").glob("*.png")
    assert main(["sample", "--replay", str(image)]) == 0
    assert read_metadata(image).model.settings["text_quantization"] == "float8"
    said = "model.text_quantization rounds what adapter.parts or tokens train"
    assert main(["train", "a.yaml", "--set", "tokens={TOK: {}}", "output=third"]) == 2
    assert said in capsys.readouterr().err
    assert main(["train", "--resume", "run", "--set", "train.steps=2", "model.text_quantization=null"]) == 2


def test_the_dry_run_says_what_was_measured():
    with Path("tests/benchmarks/results/text_rounding/differences.csv").open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    for kind, (random, trained) in TEXT_ROUNDING.items():
        values = {row["what"]: float(row["value"]) for row in rows if row["kind"] == kind}
        assert values["Qwen3 4B, random weights, layer 12 of 36"] == pytest.approx(random, abs=0.006)
        assert values["embedded SDXL, trained"] == pytest.approx(trained, abs=0.005)
