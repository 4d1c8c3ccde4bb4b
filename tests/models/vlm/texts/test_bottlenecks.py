"""Series and parallel adapters, the baselines of the paper's Table 1: what they compute, their shares, their files."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from dora_mm.adapting.bottlenecks import attach
from dora_mm.adapting.files import load_trained
from dora_mm.adapting.networks import adapt
from dora_mm.cli import main
from dora_mm.config import load_config
from dora_mm.config.models import VLMModelConfig
from dora_mm.config.vl import TrainVLConfig
from dora_mm.models.vlm.family import VLM
from dora_mm.targets import map_of
from tests.models.vlm.texts.test_language_models import BALL, BOXES
from tests.models.vlm.texts.test_table_1 import SEVEN, THIRTEEN
from tests.models.vlm.texts.text_rows import write_texts
from tests.pipelines.killed import assert_same_weights

METHODS = ("series", "parallel")
SMALL = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}


def tiny():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).requires_grad_(False).eval()


@pytest.mark.parametrize(("recipe", "sizes", "shares"), [("7b", SEVEN, (0.99, 3.54)), ("13b", THIRTEEN, (0.80, 2.89))])
def test_the_shares_of_table_1(recipe, sizes, shares):
    for method, share in zip(METHODS, shares, strict=True):
        overrides = [f"adapter.method={method}", "adapter.rank=256", "adapter.alpha=null", "adapter.dropout=0.0"]
        config = load_config(
            f"configs/llm/llama_{recipe}.yaml", [*overrides, "adapter.cache=weights", "adapter.parts={}"]
        )
        assert isinstance(config, TrainVLConfig)
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**sizes)).requires_grad_(False)
        trained = adapt({"model": model}, {"model": map_of(model)}, config.adapter, seed=0, backend="torch")
        assert round(100 * trained.num_trained / trained.num_all, 2) == share


@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_one_changes_no_bit_and_a_trained_one_computes_the_formula(method):
    model, ids = tiny(), torch.arange(10)[None]
    expected = model(ids).logits
    parameters = attach(model, map_of(model), method, 3, seed=1)
    assert torch.equal(model(ids).logits, expected)
    other = tiny()
    assert torch.equal(
        next(iter(attach(other, map_of(other), method, 3, seed=1).values())), next(iter(parameters.values()))
    )
    for parameter in parameters.values():
        parameter.data.normal_()
    mlp, x = model.model.layers[1].mlp, torch.randn(2, 5, 8)

    def beside(layer, x, read):
        y = x @ layer.weight.T
        return y + torch.tanh(read @ layer.bottleneck.down.weight.T) @ layer.bottleneck.up.weight.T

    if method == "parallel":
        gate, up = (beside(layer, x, x) for layer in (mlp.gate_proj, mlp.up_proj))
        reference = (torch.nn.functional.silu(gate) * up) @ mlp.down_proj.weight.T
        assert len(parameters) == 2 * 2 * 2
    else:
        h = (torch.nn.functional.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
        reference = h + torch.tanh(h @ mlp.bottleneck.down.weight.T) @ mlp.bottleneck.up.weight.T
        assert len(parameters) == 2 * 2
    torch.testing.assert_close(mlp(x), reference)


@pytest.mark.parametrize("method", METHODS)
def test_they_train_resume_load_and_are_refused_where_a_weight_is_needed(method, tiny_vlm, tmp_path, capsys):
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
    assert "bottlenecks" in capsys.readouterr().out
    assert main(["train", str(path)]) == 0
    killed = shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for left in ("checkpoints/step-000004", "adapter", "validation", "best"):
        shutil.rmtree(killed / left)
    (killed / "summary.json").unlink()
    assert main(["train", "--resume", str(killed)]) == 0
    assert_same_weights("step-000004", tmp_path / "whole", killed)

    file = tmp_path / "whole" / "adapter" / "trained_weights.safetensors"
    assert all(".bottleneck." in name for name in load_file(file))
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
        assert "holds series or parallel adapters, which dora-mm train, eval and ask read" in capsys.readouterr().err
    save_file({"model.layers.0.mlp.bottleneck.down.weight": torch.zeros(1, 1)}, file, {"dora_mm_bottleneck": method})
    assert main(["ask", str(base), "Is it red?", "--adapter", str(file)]) == 2
    assert "names no bottlenecks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"parts": ["text.attn"]}, "adapter.parts is not for adapter.method series"),
        ({"alpha": 8.0}, "adapter.alpha is not for adapter.method series"),
        ({"dropout": 0.1}, "adapter.dropout has no effect"),
        ({"extra_trainable": ["norms"]}, "adapter.extra_trainable is not for"),
    ],
)
def test_settings_without_effect_are_refused(adapter, message, tmp_path, capsys):
    config = {
        "pipeline": "train_vl",
        "model": {"path": "some"},
        "adapter": {"method": "series", "rank": 4, **adapter},
        "data": write_texts(tmp_path),
        "optimizer": {"lr": 0.05},
        "train": {"steps": 4, "batch_size": 2},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "config.yaml")]) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_mlps_of_their_own_is_refused():
    from transformers import OPTConfig, OPTForCausalLM

    model = OPTForCausalLM(
        OPTConfig(
            hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=20, word_embed_proj_dim=8
        )
    )
    with pytest.raises(ValueError, match=r"fc1 is not a linear layer of an MLP of its own"):
        attach(model, map_of(model), "series", 2, seed=0)
