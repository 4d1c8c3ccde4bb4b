"""The baselines of the paper's Table 1 that change no weight: trained, resumed, loaded, asked, scored and refused."""

import json
import shutil

import pytest
import torch
import yaml

from dora_mm.adapting.files import load_trained
from dora_mm.adapting.networks import METHOD_MODULES
from dora_mm.cli import main
from dora_mm.config.adapter import EXTRA_WEIGHT_MODULES
from dora_mm.config.models import VLMModelConfig
from dora_mm.models.vl.vlm.family import VLM
from tests.shared.data.text_rows import BALL, BOXES, write_texts
from tests.shared.killed import assert_same_weights

SERIES_OR_PARALLEL = "holds series or parallel adapters, not LoRA or DoRA: dora-mm train, eval and ask read such a file"


def test_every_method_of_the_config_has_its_module():
    assert tuple(METHOD_MODULES) == EXTRA_WEIGHT_MODULES


@pytest.mark.parametrize(
    ("method", "row", "file_name", "refusal"),
    [
        ("series", "bottleneck", "trained_weights.safetensors", SERIES_OR_PARALLEL),
        ("parallel", "bottleneck", "trained_weights.safetensors", SERIES_OR_PARALLEL),
        ("prefix", "prefix", "adapter_model.safetensors", "holds a learned prefix or prompt, not LoRA or DoRA"),
    ],
)
def test_they_train_resume_load_and_are_refused_where_a_weight_is_needed(
    method, row, file_name, refusal, tiny_vlm, tmp_path, capsys
):
    base = tiny_vlm("llama")
    config = {
        "pipeline": "train_vl",
        "model": {"path": str(base)},
        "adapter": {"method": method, "rank": 4},
        "data": {**write_texts(tmp_path), "tables": str(tmp_path / "tables")},
        "optimizer": {"lr": 0.05},
        "train": {"steps": 4, "batch_size": 2, "checkpoint_every": 2},
        "evaluate": {"max_new_tokens": 3},
        "output": str(tmp_path / "whole"),
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["train", str(path), "--dry-run"]) == 0
    assert f"\n{row} " in capsys.readouterr().out
    assert main(["train", str(path)]) == 0
    killed = shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for left in ("checkpoints/step-000004", "adapter", "validation", "best"):
        shutil.rmtree(killed / left)
    (killed / "summary.json").unlink()
    assert main(["train", "--resume", str(killed)]) == 0
    assert_same_weights("step-000004", tmp_path / "whole", killed)

    file = tmp_path / "whole" / "adapter" / file_name
    bare, ours = (VLM(VLMModelConfig(path=str(base))) for _ in range(2))
    load_trained(ours, tmp_path / "whole", backend="torch")
    batch = bare.batch("chat", [BALL, BOXES], None, [("red", 1.0), ("blue", 1.0)])
    before, after = (
        torch.cat([vlm.network.row_losses(inputs, labels)[0] for inputs, labels, _ in batch.groups])
        for vlm in (bare, ours)
    )
    assert (before - after).abs().max() > 1e-3
    capsys.readouterr()
    assert main(["ask", str(base), "Is it red?", "--adapter", str(tmp_path / "whole"), "--max-new-tokens", "2"]) == 0
    assert "with adapter:" in capsys.readouterr().out
    scores = {key: config[key] for key in ("model",)} | {"pipeline": "eval_vl", "decode": {"max_new_tokens": 2}}
    scores |= {"data": {"valid": config["data"]["valid"], "tables": str(tmp_path / "tables")}}
    scores |= {"adapter": str(tmp_path / "whole"), "output": str(tmp_path / "scores")}
    path.write_text(yaml.safe_dump(scores))
    assert main(["eval", str(path)]) == 0
    assert "accuracy" in json.loads((tmp_path / "scores" / "scores.json").read_text())["chat"]["metrics"]

    for command in (
        ["convert", str(file), str(tmp_path / "x"), "--to", "peft"],
        ["merge", str(base), str(file), str(tmp_path / "merged")],
        ["verify", str(file)],
    ):
        capsys.readouterr()
        assert main(command) == 2
        assert refusal in capsys.readouterr().err


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"parts": ["text.attn"]}, "adapter.parts is not for adapter.method series"),
        ({"alpha": 8.0}, "adapter.alpha is not for adapter.method series"),
        ({"dropout": 0.1}, "adapter.dropout has no effect"),
        ({"extra_trainable": ["norms"]}, "adapter.extra_trainable is not for"),
        ({"method": "prefix"}, "train.gradient_checkpointing is not for adapter.method prefix"),
    ],
)
def test_settings_without_effect_are_refused(adapter, message, tmp_path, capsys):
    config = {
        "pipeline": "train_vl",
        "model": {"path": "some"},
        "adapter": {"method": "series", "rank": 4, **adapter},
        "data": write_texts(tmp_path),
        "optimizer": {"lr": 0.05},
        "train": {"steps": 4, "batch_size": 2, "gradient_checkpointing": True},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "config.yaml")]) == 2
    assert message in capsys.readouterr().err
