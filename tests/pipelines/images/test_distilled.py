"""Distilled models: training one warns, and they generate with the adapters of their base model."""

import json

import pytest
import torch
import yaml

import dora_mm
from dora_mm import DoRASpec
from dora_mm.cli import main
from dora_mm.config.models import ModelConfig
from dora_mm.models.images.families import distilled_of, load_image_model
from dora_mm.models.images.image_model import Distilled
from tests.shared.images.tiny_flows import FLOWS, PROMPT, SIZE

DISTILLED = [flow for flow in FLOWS if flow.distilled]
ONE_FAST = [*(pytest.param(flow, marks=pytest.mark.slow) for flow in DISTILLED[:-1]), DISTILLED[-1]]  # of Krea 2


@pytest.fixture(params=DISTILLED, ids=lambda flow: flow.name)
def flow(request):
    return request.param


def test_files_say_that_a_model_was_distilled(flow, tmp_path):
    base, distilled = flow.build(tmp_path / "base"), flow.build(tmp_path / "distilled", is_distilled=True)
    assert distilled_of(ModelConfig(path=str(base))) is None
    assert distilled_of(ModelConfig(path=str(distilled))) == Distilled(flow.distilled[0], 1.0, flow.distilled[1])


@pytest.mark.parametrize("flow", ONE_FAST, indirect=True, ids=lambda flow: flow.name)
def test_its_noise_levels_are_those_of_its_pipeline(flow, tmp_path):
    for name in ("base", "distilled"):
        folder = flow.build(tmp_path / name, is_distilled=name == "distilled")
        pipe, model = flow.plain(folder), load_image_model(ModelConfig(path=str(folder)))
        flow.latents(pipe, [PROMPT], [1], steps=4)
        side = SIZE["height"] // (8 if model.patch == 2 else 16)
        levels = torch.tensor(model.noise.schedule(4, (side, side)))
        torch.testing.assert_close(levels, pipe.scheduler.sigmas[:-1], atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_distilled_model_draws_with_the_adapters_of_its_base_in_its_own_steps(flow, tmp_path, caplog):
    base, distilled = flow.build(tmp_path / "base"), flow.build(tmp_path / "distilled", is_distilled=True)
    for name in ("one", "two"):
        model = load_image_model(ModelConfig(path=str(base)))
        dora_mm.inject(model.transformer, model.target_maps["transformer"], DoRASpec(rank=2), parts=["attn"])
        for key, parameter in dora_mm.adapter_parameters(model.transformer).items():
            parameter.data.add_(0.3 * torch.randn(parameter.shape) * ("magnitude" not in key))
        about = {"base_model": str(base), "config": yaml.safe_dump({"sample": {"steps": 28, "guidance": 4.0}})}
        dora_mm.save_adapter({"transformer": model.transformer}, tmp_path / name, metadata=about)
    job = tmp_path / "job.csv"
    job.write_text(f"prompt,adapter\n{PROMPT},{tmp_path / 'one'}\n{PROMPT},{tmp_path / 'two'}\n")
    given = ["--set", f"model.path={distilled}", "contact_sheet=false", "width=64", "height=64"]
    caplog.set_level("INFO")
    assert main(["sample", str(job), *given, f"output={tmp_path / 'drawn'}"]) == 0
    steps, sign = flow.distilled
    assert f"was distilled ({sign}), and so it generates with steps {steps}, guidance 1" in caplog.text
    assert caplog.text.count(f"What was trained on {base} is generated with {distilled}, which was distilled.") == 1
    rows = [json.loads(line) for line in (tmp_path / "drawn" / "manifest.jsonl").read_text().splitlines()]
    assert [(row["settings"]["steps"], row["settings"]["guidance"]) for row in rows] == [(steps, 1.0)] * 2
    assert main(["sample", str(job), *given, f"output={tmp_path / 'given'}", "steps=2"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "given" / "manifest.jsonl").read_text().splitlines()]
    assert [(row["settings"]["steps"], row["settings"]["guidance"]) for row in rows] == [(2, 1.0)] * 2


@pytest.mark.slow
def test_training_one_warns_with_the_reason(flow, tmp_path, image_folder, capsys, caplog):
    config = {
        "pipeline": "train_diffusion",
        "output": str(tmp_path / "run"),
        "data": {"folder": str(image_folder), "resolution": 64},
        "adapter": {"rank": 2},
        "optimizer": {"lr": 0.1},
        "train": {"steps": 1, "batch_size": 1},
    }
    for name in ("base", "distilled"):
        config["model"] = {"path": str(flow.build(tmp_path / name, is_distilled=name == "distilled"))}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(config))
    warning = f"was distilled to {flow.distilled[0]} steps ({flow.distilled[1]}), and a training undoes that"
    for name, command in (("base", ["--dry-run"]), ("distilled", ["--dry-run"]), ("distilled", [])):
        assert main(["train", str(tmp_path / f"{name}.yaml"), *command]) == 0
        assert (warning in capsys.readouterr().out + caplog.text) == (name == "distilled")
        caplog.clear()
    given = ["--dry-run", "--set", "loss.guided_target.scale=3.5"]
    assert main(["train", str(tmp_path / "distilled.yaml"), *given, f"output={tmp_path / 'other'}"]) == 0
    assert warning not in capsys.readouterr().out + caplog.text
