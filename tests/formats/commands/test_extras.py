"""Norms and biases that LyCORIS trains beside adapters: they load, travel, and are named where there is no place."""

import pytest
import torch
from lycoris.wrapper import LycorisNetwork, create_lycoris
from safetensors.torch import load_file, save_file
from torch import nn

from dora_mm import cli, load_adapter, merge, verify
from dora_mm.formats.adapter_file import AdapterFile
from dora_mm.formats.commands.convert import convert
from dora_mm.formats.commands.inspection import inspect_file
from dora_mm.formats.naming.names import Name
from tests.shared import toy

RESNET = "down_blocks.1.resnets.0"
KINDS = {"lora": {"algo": "lora", "dora_wd": True}, "full": {"algo": "full"}}


def build():
    """Layers with biases, and two norms, under names of SDXL."""
    torch.manual_seed(0)
    model = nn.Module()
    for path, layer in {
        f"{RESNET}.norm1": nn.GroupNorm(2, 8),
        f"{RESNET}.conv1": nn.Conv2d(8, 16, 3, padding=1),
        f"{toy.BLOCK}.norm1": nn.LayerNorm(16),
        f"{toy.BLOCK}.attn1.to_q": nn.Linear(16, 16, bias=False),
        f"{toy.BLOCK}.ff.net.0.proj": nn.Linear(16, 40),
    }.items():
        toy._insert(model, path, torch.zeros(1, 1))
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    return model


def values(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


BASE = {Name("unet", key.removesuffix(".weight")): W for key, W in values(build()).items() if key.endswith(".weight")}


@pytest.fixture(params=KINDS)
def trained(request, tmp_path, monkeypatch):
    """A file that LyCORIS wrote, and the parameters of a model into which LyCORIS has merged it."""
    monkeypatch.setattr(LycorisNetwork, "LORA_PREFIX", "lora_unet")
    model = build()
    sizes = {"linear_dim": 2, "linear_alpha": 2, "conv_dim": 2, "conv_alpha": 2}
    network = create_lycoris(model, 1.0, preset="full", train_norm=True, **sizes, **KINDS[request.param])
    network.apply_to()
    for seed, (name, parameter) in enumerate(sorted(network.named_parameters())):
        moved = toy.wave(parameter.shape, 300 + seed).float()
        parameter.data = parameter.data * (1 + 0.08 * moved) if "dora_scale" in name else parameter.data + 0.3 * moved
    path = tmp_path / "a.safetensors"
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, path)
    assert len([key for key in load_file(path) if key.endswith(("w_norm", "b_norm"))]) == 4
    network.restore()
    network.merge_to(1.0)
    return path, values(model)


def check(path, expected):
    model = build()
    load_adapter({"unet": model}, path)
    merge(model, keep_base=False)
    found = values(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_they_load(trained):
    check(*trained)


@pytest.mark.parametrize("to", ["kohya", "comfy", "diff", "lora"])
def test_they_travel(to, trained, tmp_path):
    path, expected = trained
    settings = {"energy": 1.0} if to == "lora" else {"dtype": "float32"}
    done = convert(path, tmp_path / "b.safetensors", to=to, base=BASE, **settings)
    assert not done.left_out
    check(done.files[0], expected)
    keys = load_file(done.files[0])
    assert {key.rpartition(".")[2] for key in keys} >= {"w_norm", "b_norm"}
    assert any(key.endswith(".diff_b") for key in keys) == any(key.endswith(".diff_b") for key in load_file(path))


def test_a_strength_scales_them(trained, tmp_path):
    path, _ = trained
    (half,) = convert(path, tmp_path / "b.safetensors", to="kohya", base=BASE, strength=0.5).files
    old, new = load_file(path), load_file(half)
    (key,) = (key for key in old if key.endswith("norm1.b_norm") and "resnets" in key)
    (again,) = (key for key in new if key.endswith("in_layers_0.b_norm"))
    torch.testing.assert_close(new[again], 0.5 * old[key])


@pytest.mark.parametrize("to", ["diffusers", "peft", "onetrainer"])
def test_what_has_no_place_is_named_and_left_out_only_if_asked_for(to, trained, tmp_path):
    path, _ = trained
    held = rf"also holds \d differences of norms and biases, .* for which --to {to} has no"
    with pytest.raises(ValueError, match=f"{held}.*--to kohya or"):
        convert(path, tmp_path / "b", to=to, base=BASE)
    if "diff_b" in " ".join(load_file(path)):
        return  # full differences have no low rank
    done = convert(path, tmp_path / "b", to=to, base=BASE, allow_lossy=True)
    assert len(done.left_out) == 4
    assert not any("norm" in key for file in done.files for key in load_file(file))


def test_a_merged_model_has_a_place_for_norms_alone(trained, tmp_path):
    path, _ = trained
    with pytest.raises(ValueError, match="differences of norms and biases.* for which --to merged has no place"):
        convert(path, tmp_path / "b", to="merged", base=BASE)


def test_they_are_judged_or_named(trained, capsys):
    path, _ = trained
    verdicts = {verdict.tool: verdict for verdict in verify(path, "all", BASE)}
    assert set(verdicts["kohya"].findings) == {"right"}
    right = {tool for tool, verdict in verdicts.items() if set(verdict.findings) == {"right"}}
    assert set(inspect_file(path).works_in) == right
    assert "differences of biases, such as" in verdicts["kohya"].note
    assert set(verdicts["onetrainer"].findings) == {"refused"}
    assert set(verdicts["diffusers"].findings) <= {"refused", "not known to this tool"}
    assert "norms and biases" in str(AdapterFile(path).why_not_trainable())
    assert cli.main(["inspect", str(path)]) == 0
    assert "differences of biases" in capsys.readouterr().out
    assert inspect_file(path).biases


def test_a_bias_that_the_model_lacks_is_refused(trained, tmp_path):
    path, _ = trained
    tensors = load_file(path)
    tensors[f"lora_unet_{toy.BLOCK}.attn1.to_q.diff_b".replace(".", "_").replace("_diff_b", ".diff_b")] = torch.ones(16)
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"to_q has none in this model"):
        load_adapter({"unet": build()}, tmp_path / "b.safetensors")


@pytest.mark.parametrize("strength", [0.5])
def test_they_have_no_strength(strength, trained):
    with pytest.raises(ValueError, match="has no strength: load it with strength 1"):
        load_adapter({"unet": build()}, trained[0], strength=strength)
