"""Trainings over an assistant, on a tiny model of each family: what is trained, resumed, sampled, saved and refused."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import dora_mm
from dora_mm import DoRASpec
from dora_mm.cli import main
from dora_mm.config import load_config
from dora_mm.config.models import ModelConfig, validated
from dora_mm.core import adapted_layers
from dora_mm.models.images.families import load_image_model
from dora_mm.sampling.manifest import read_manifest
from dora_mm.train.metrics import read_metrics
from dora_mm.train.resuming import check_changes
from tests.shared import reference
from tests.shared.images.tiny_flows import FAST, FLOWS, PROMPT
from tests.shared.pages import data_of

STEPS = 2
STRENGTH = 0.7
NAMES = [*(flow.name for flow in FLOWS if flow.distilled), "sdxl"]


@dataclass(frozen=True)
class Family:
    """A tiny model, the `model` and `adapter` sections, and an assistant of more modules than are trained."""

    model: dict[str, Any]
    adapter: dict[str, Any]
    assistant: Path


@pytest.fixture(scope="module")
def family(request, tmp_path_factory, tiny_folder):
    place = tmp_path_factory.mktemp(request.param)
    flow = next((flow for flow in FLOWS if flow.name == request.param), None)
    section = {"path": str(flow.build(place / "model") if flow else tiny_folder)}
    section |= {flow.name: flow.settings} if flow and flow.settings else {}
    model = load_image_model(validated(ModelConfig, section))
    network = model.networks[model.denoiser]
    dora_mm.inject(network, model.target_maps[model.denoiser], DoRASpec(rank=2), parts=["attn", "ff"])
    for seed, layer in enumerate(adapted_layers(network).values()):
        reference.randomize(layer, size=0.3, seed=seed)
    dora_mm.save_adapter({model.denoiser: network}, place / "assistant", metadata={"base_model": section["path"]})
    return Family(section, {"rank": 4, "parts": [f"{model.denoiser}.attn"]}, place / "assistant")


@pytest.fixture
def config(tmp_path, family, image_folder):
    """Writes the config of a training with an assistant, and returns its path."""

    def write(name, assistant=(), **sections):
        assistant = {"path": str(family.assistant), "strength": STRENGTH, **dict(assistant)}
        values = {
            "pipeline": "train_diffusion",
            "output": str(tmp_path / name),
            "model": family.model,
            "adapter": {**family.adapter, "assistant": assistant},
            "data": {"folder": str(image_folder), "resolution": 64, "caption_dropout": 0.2},
            "loss": {"guided_target": {"scale": 2.5}},
            "optimizer": {"lr": 0.05},
            "train": train_section(STEPS),
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**values, **sections}, sort_keys=False))
        return str(tmp_path / f"{name}.yaml")

    return write


def train_section(steps):
    return {"steps": steps, "batch_size": 2, "checkpoint_every": 1, "gradient_accumulation_steps": 2}


def weights_of(folder):
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def difference(one, other):
    a, b = (np.asarray(Image.open(path), dtype=int) for path in (one, other))
    return np.abs(a - b).max()


def over_all(test):
    """Runs a test with the family that everything is tried on, and as a slow test with the others."""
    marked = [pytest.param(name, marks=[] if name == FAST else pytest.mark.slow) for name in NAMES]
    return pytest.mark.parametrize("family", marked, indirect=True)(test)


def over_one(test):
    return pytest.mark.parametrize("family", [FAST], indirect=True)(test)


@over_all
def test_a_training_resumes_by_bits(config, tmp_path):
    assert main(["train", config("whole")]) == 0
    assert main(["train", config("half", train=train_section(1))]) == 0
    assert main(["train", "--resume", str(tmp_path / "half"), "--set", f"train.steps={STEPS}"]) == 0
    trained, resumed = (weights_of(tmp_path / name / "adapter") for name in ("whole", "half"))
    assert trained.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in trained.items())


@pytest.mark.slow
@pytest.mark.parametrize("family", NAMES, indirect=True)
def test_the_files_have_what_is_trained_alone_and_the_loss_the_assistant(config, family, tmp_path):
    data = {"folder": str(tmp_path / "pictures"), "resolution": 64, "valid": {"share": 0.3, "limit": 1}}
    assert main(["train", config("assisted", data=data)]) == 0
    assert main(["train", config("alone", adapter=family.adapter, data=data)]) == 0
    assisted, alone = (weights_of(tmp_path / name / "adapter") for name in ("assisted", "alone"))
    assert {name: tensor.shape for name, tensor in alone.items()} == {n: t.shape for n, t in assisted.items()}
    assert not all(torch.equal(tensor, assisted[name]) for name, tensor in alone.items())
    checkpoint = load_file(tmp_path / f"assisted/checkpoints/step-{STEPS:06d}/trained_weights.safetensors")
    assert len(checkpoint) == len(assisted)
    before, other = (
        read_metrics(tmp_path / name / "validation" / "metrics.jsonl")[0] for name in ("assisted", "alone")
    )
    assert before["held_out_loss"] != other["held_out_loss"]  # of what is trained over, ahead of the first step


@pytest.mark.slow
@pytest.mark.parametrize("in_samples", [True, False])
@pytest.mark.parametrize("family", NAMES, indirect=True)
def test_images_during_the_training_and_after_it(config, family, tmp_path, in_samples):
    """A contact sheet on the way has the assistant by choice, the last one never; jobs add it as any adapter."""
    settings = {"sample": {"prompts": [PROMPT], "steps": 2, "guidance": 1.0, "every": 1}, "optimizer": {"lr": 0.5}}
    assert main(["train", config("run", {"in_samples": in_samples}, **settings)]) == 0
    assert main(["train", config("early", train=train_section(1), optimizer={"lr": 0.5})]) == 0
    found = {
        (entry.settings["step"], entry.settings["adapter"] is None): entry for entry in read_manifest(tmp_path / "run")
    }
    assert found.keys() == {(None, True), (1, False), (STEPS, False), *([(0, False)] if in_samples else [])}
    assistant = f"{family.assistant}:{STRENGTH}"
    early, late, base = (found[key] for key in ((1, False), (STEPS, False), (None, True)))
    assert early.settings.get("assistant") == (assistant if in_samples else None)
    assert "assistant" not in late.settings
    assert len(data_of(tmp_path / "run" / "gallery" / "index.html")["images"]) == len(found)
    with_it = f"{tmp_path / 'early'}+{assistant}"
    chosen = [with_it if in_samples else f"{tmp_path / 'early'}", f"{tmp_path / 'run'}", ""]
    rows = [f"{PROMPT},{early.settings['seed']},{adapter}\n" for adapter in chosen]
    (tmp_path / "job.csv").write_text("prompt,seed,adapter\n" + "".join(rows))
    size = [f"{key}={early.settings[key]}" for key in ("width", "height")]
    given = [
        "--set",
        f"output={tmp_path / 'job'}",
        f"model.path={family.model['path']}",
        "steps=2",
        "guidance=1",
        *size,
    ]
    given += [f"model.{key}={json.dumps(value)}" for key, value in family.model.items() if key != "path"]
    assert main(["sample", str(tmp_path / "job.csv"), *given]) == 0
    images = [tmp_path / "job" / entry.file for entry in read_manifest(tmp_path / "job")]
    for entry, image in zip((early, late, base), images, strict=True):
        assert difference(tmp_path / "run" / entry.file, image) <= 2
    assert difference(images[0], images[1]) > 2


@over_one
def test_a_dry_run_says_what_it_is_and_what_the_target_takes(config, family, capsys):
    loss = {"guided_target": {"scale": 2.5, "prompt": "a blur"}}
    assert (
        main(["train", config("run", {"in_samples": True}, loss=loss, sample={"prompts": [PROMPT]}), "--dry-run"]) == 0
    )
    printed = capsys.readouterr().out
    assert "guided    target u + 2.5 (v - u), u the prediction under 'a blur': one more forward pass" in printed
    line = next(line for line in printed.splitlines() if line.startswith("assistant "))
    count = len(weights_of(family.assistant)) // 3  # A, B and the magnitude of each module
    assert line.startswith(f"assistant {family.assistant}, strength 0.7, {count} modules: at work in training")
    assert line.endswith("in contact sheets but the last, not in the result")


BAD = {
    "of other sizes": "outputs, and the model has",
    "of parts that do not fit": "file.safetensors: the shapes (4, 64) of A and (32, 2) of B do not fit each other",
    "of another model": "does not fit this model: it adapts nothing of the transformer of FLUX.2 klein",
    "of more": "has more than adapters of the transformer",
    "missing": "adapter.assistant.path: nowhere.safetensors does not exist",
    "a model": "is a model, or a part of one, and no adapter",
}


@over_one
@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_in_one_sentence_before_anything_is_written(
    config, family, tmp_path, name, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    tensors = weights_of(family.assistant)
    made = {
        "of other sizes": {k: torch.cat([t, t], 1) if "lora_A" in k else t for k, t in tensors.items()},
        "of parts that do not fit": {name: torch.cat([tensor, tensor]) for name, tensor in tensors.items()},
        "of another model": {f"unet.mid_block.attentions.0.proj_in.lora_{s}.weight": torch.zeros(4, 4) for s in "AB"},
        "of more": {**tensors, "text_encoder.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(2, 24)},
        "a model": {"transformer.weight": torch.zeros(4, 4)},
        "missing": {},
    }
    made["of more"] |= {"text_encoder.layers.0.mlp.up_proj.lora_B.weight": torch.zeros(32, 2)}
    save_file(made[name], tmp_path / "file.safetensors")
    path = "nowhere.safetensors" if name == "missing" else "file.safetensors"
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", config("bad", {"path": path})]) == 2
    *_, error = capsys.readouterr().err.strip().splitlines()
    assert BAD[name] in error
    assert "adapter.assistant" in error
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "bad.yaml"])


REFUSED = {
    "adapter.assistant needs the base weights, which adapter.method full changes": {"adapter": {"method": "full"}},
    "must not be 0, at which the assistant has no effect": {"assistant": {"strength": 0.0}},
    "adapter.assistant.in_samples has no effect: sample.prompts is empty": {"assistant": {"in_samples": True}},
}


@over_one
@pytest.mark.parametrize("message", REFUSED)
def test_settings_without_a_meaning_are_refused(config, tmp_path, message, capsys):
    changes = REFUSED[message]
    path = config("bad", changes.get("assistant", ()))
    values = yaml.safe_load((tmp_path / "bad.yaml").read_text())
    values["adapter"] |= changes.get("adapter", {})
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", path]) == 2
    assert message in capsys.readouterr().err


@over_one
def test_a_resumed_run_may_change_what_its_contact_sheets_have_but_not_what_it_is_trained_over(config):
    sample = {"prompts": [PROMPT]}
    paths = [config(str(number), each, sample=sample) for number, each in enumerate(({}, {"in_samples": True}))]
    before, after, other = (load_config(path) for path in (*paths, config("other", {"strength": 0.5}, sample=sample)))
    same = {"name": before.name, "output": before.output}
    check_changes("it", before, after.model_copy(update=same))
    with pytest.raises(ValueError, match=r"adapter\.assistant\.strength cannot change from 0\.7 to 0\.5"):
        check_changes("it", before, other.model_copy(update=same))
