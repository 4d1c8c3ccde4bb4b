"""Everything that is done with images, on a tiny model of each family that predicts velocities."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import dora_mm
from dora_mm import DoRASpec
from dora_mm.cli import main
from dora_mm.config.models import ModelConfig, validated
from dora_mm.core import adapted_layers
from dora_mm.models.images.families import load_image_model
from dora_mm.sampling.image_sampler import sample
from tests.shared import reference
from tests.shared.images.tiny_flows import EACH, NAMES, PROMPT, SIZE

STEPS = 4


@pytest.fixture(scope="module", params=EACH, ids=NAMES)
def flow(request):
    return request.param


@pytest.fixture(scope="module")
def folder(flow, tmp_path_factory):
    return flow.build(tmp_path_factory.mktemp(flow.name) / "model")


@pytest.fixture(scope="module")
def section(flow, folder):
    """The `model` section."""
    return {"path": str(folder), **({flow.name: flow.settings} if flow.settings else {})}


@pytest.fixture(scope="module")
def plain(flow, folder):
    return flow.plain(folder)


@pytest.fixture
def model(section):
    return load_image_model(validated(ModelConfig, section))


@pytest.fixture
def config(tmp_path, section, image_folder):
    def write(name="train", *, model=(), **sections):
        values = {
            "pipeline": "train_diffusion",
            "output": str(tmp_path / name),
            "model": {**section, **dict(model)},
            "adapter": {"rank": 4, "parts": ["transformer.attn", "transformer.ff"]},
            "data": {"folder": str(image_folder), "resolutions": [32, 64], "caption_dropout": 0.2},
            "optimizer": {"lr": 0.02},
            "train": {"steps": STEPS, "batch_size": 2, "checkpoint_every": 2},
            "sample": {"prompts": [PROMPT], "steps": 2, "guidance": 3.0},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**values, **sections}, sort_keys=False))
        return str(path)

    return write


@pytest.fixture(scope="module")
def adapter(section, folder, tmp_path_factory):
    """An adapter as a training would leave it."""
    place = tmp_path_factory.mktemp("trained")
    model = load_image_model(validated(ModelConfig, section))
    dora_mm.inject(model.transformer, model.target_maps["transformer"], DoRASpec(rank=4), parts=["attn", "ff"])
    for seed, layer in enumerate(adapted_layers(model.transformer).values()):
        reference.randomize(layer, size=0.3, seed=seed)
    dora_mm.save_adapter({"transformer": model.transformer}, place, metadata={"base_model": str(folder)})
    return place


def weights_of(run):
    return load_file(run / "adapter" / "pytorch_lora_weights.safetensors")


def difference(one, other):
    return np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max()


def test_training_resumes_by_bits_and_plain_diffusers_draws_the_same(flow, config, tmp_path, plain):
    assert main(["train", config("run", optimizer={"lr": 0.1})]) == 0
    run = tmp_path / "run"
    trained = weights_of(run)
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(losses).all()

    train = {"steps": 2, "batch_size": 2, "checkpoint_every": 2}
    assert main(["train", config("half", optimizer={"lr": 0.1}, train=train)]) == 0
    assert main(["train", "--resume", str(tmp_path / "half"), "--set", f"train.steps={STEPS}"]) == 0
    resumed = weights_of(tmp_path / "half")
    assert all(torch.equal(trained[name], resumed[name]) for name in trained)

    job = tmp_path / "job.csv"
    job.write_text(f"prompt,seed,strength\n{PROMPT},3,1\n{PROMPT},3,0\n")
    settings = [f"adapter.path={run}", f"output={tmp_path / 'job'}", "steps=2", "guidance=5"]
    assert main(["sample", str(job), "--set", *settings]) == 0
    drawn = tmp_path / "job" / "samples"
    with_adapter, without = Image.open(drawn / "0001-seed3.png"), Image.open(drawn / "0002-seed3.png")
    assert difference(flow.drawn(plain, 3), without) <= 2
    plain.load_lora_weights(str(run / "adapter"))
    try:
        assert difference(flow.drawn(plain, 3), with_adapter) <= 2
    finally:
        plain.unload_lora_weights()
    assert difference(with_adapter, without) > 3


def test_peft_reads_what_convert_writes_and_verify_says_so(flow, adapter, folder, tmp_path, model, capsys):
    assert main(["convert", str(adapter), str(tmp_path / "peft"), "--to", "peft", "--base", str(folder)]) == 0
    from peft import PeftModel

    encoded, channels = model.encode_prompts([PROMPT]), 16 if model.patch == 1 else 4  # of patches, or of latents
    x, t = torch.randn(1, channels, 4, 4), torch.tensor([0.5])
    with torch.no_grad():
        bare = model.predict(x, t, encoded, [])
        dora_mm.load_adapter({"transformer": model.transformer}, adapter)
        ours = model.predict(x, t, encoded, [])
        dora_mm.remove(model.transformer)
        theirs = PeftModel.from_pretrained(model.transformer, str(tmp_path / "peft"))
        assert theirs.base_model.model is model.transformer
        torch.testing.assert_close(model.predict(x, t, encoded, []), ours, atol=1e-5, rtol=1e-4)
    assert (ours - bare).abs().max() > 0.01
    files = {"diffusers": adapter}
    if flow.name != "qwen_image_21":  # whose names in ComfyUI are not known
        files["comfy"] = tmp_path / "comfy"
        assert main(["convert", str(adapter), str(files["comfy"]), "--to", "comfy", "--base", str(folder)]) == 0
    for tool, file in files.items():
        capsys.readouterr()
        assert main(["verify", str(file), "--tool", tool, "--base", str(folder), "--json"]) == 0
        (verdict,) = json.loads(capsys.readouterr().out)
        assert set(verdict["findings"]) == {"right"}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_in_half_precision_and_with_checkpointing(config, tmp_path, dtype, checkpointing):
    train = {"steps": 1, "batch_size": 2, "gradient_checkpointing": checkpointing}
    train["mixed_precision"] = "bf16" if dtype == "bfloat16" else "no"
    assert main(["train", config("run", model={"dtype": dtype}, train=train, sample={"prompts": []})]) == 0
    weights = weights_of(tmp_path / "run")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)


@pytest.mark.slow
def test_a_grid_and_a_replayed_image(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = {"pipeline": "grid", "output": "grid", "adapter": {"path": str(adapter)}, "prompt": PROMPT, "steps": 2}
    grid |= {"columns": {"name": "strength", "values": [1.0, 2.0]}, "rows": {"name": "size", "values": [64, "96x64"]}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    assert main(["grid", "grid.yaml"]) == 0
    assert len(list((tmp_path / "grid" / "samples").glob("*.png"))) == 6
    image = tmp_path / "grid" / "samples" / "0003-seed0.png"
    assert main(["sample", "--replay", str(image), "--set", "output=again"]) == 0
    assert difference(Image.open(image), Image.open(tmp_path / "again" / "samples" / image.name)) == 0
    assert main(["gallery", "grid"]) == 0


@pytest.mark.slow
def test_a_dry_run_shows_data_parts_memory_and_time(config, tmp_path, capsys):
    assert main(["train", config("run"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "transformer.attn",
        "transformer.ff",
        "longest   ",
        "sizes     32: 5, 64: 5, 10 in all",  # each image has 90 % of the pixels of both
        "on average; measured: ",
        " s at 64)",
        "together",
    ):
        assert words in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_sampling_without_guidance_needs_no_negative_prompt(flow, model, plain):
    ours = sample(model, [PROMPT], [1], steps=2, guidance=1.0)[0]
    settings = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(1), **SIZE}
    theirs = plain(**flow.unguided(plain, [PROMPT]), **settings).images[0]
    assert difference(ours, theirs) <= 2
