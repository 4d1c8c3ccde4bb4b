"""What docs/peft.md says that PEFT gets wrong with DoRA, in the installed release, and the ways around it."""

import copy

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import dora_mm
from tests.peft.models import train
from tests.shared.reference import relative_error

X = torch.randn(200, 64, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 48)

    def forward(self, x):
        return self.layer(x)


def adapted(net, *, dora=True, name="default"):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["layer"], use_dora=dora)
    model = peft.get_peft_model(copy.deepcopy(net), config, adapter_name=name)
    train(model)
    return model


def share_lost(found, expected, net):
    """What is missing, as a share of the change of the output."""
    return relative_error(found - net(X), expected - net(X))


@pytest.mark.parametrize("dora", [False, True])
def test_convert_to_lora(dora, tmp_path):
    net = Net()
    model = adapted(net, dora=dora)
    assert model.supports_lora_conversion()
    config, tensors = peft.convert_to_lora(model, rank=48)
    converted = peft.get_peft_model(copy.deepcopy(net), config)
    peft.set_peft_model_state_dict(converted, tensors)
    lost = share_lost(converted(X), model(X), net)
    assert lost > 0.5 if dora else lost < 1e-5
    model.save_pretrained(tmp_path / "adapter")
    base = {name: t.clone() for name, t in net.state_dict().items()}
    save_file(base, tmp_path / "base.safetensors")
    dora_mm.convert(tmp_path / "adapter", tmp_path / "out", to="lora", rank=48, base=tmp_path / "base.safetensors")
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "out")
    assert not plain.peft_config["default"].use_dora
    assert share_lost(plain(X), model(X), net) < 1e-4


def test_add_weighted_adapter(tmp_path):
    net = Net()
    model = adapted(net, name="one")
    expected = model(X)
    model.add_weighted_adapter(["one"], [1.0], adapter_name="weighted", combination_type="linear")
    model.set_adapter("weighted")
    assert share_lost(model(X), expected, net) > 0.4
    model.set_adapter("one")
    model.save_pretrained(tmp_path)
    mixed = copy.deepcopy(net)
    for name in ("first", "second"):
        dora_mm.load_adapter(mixed, tmp_path / "one", strength=0.5, name=name)
    assert share_lost(mixed(X), expected, net) < 1e-5


def test_rows_of_zeros(tmp_path):
    net = Net()
    with torch.no_grad():
        net.layer.weight[:3].zero_()
    model = peft.get_peft_model(
        copy.deepcopy(net), peft.LoraConfig(r=4, target_modules=["layer"], use_dora=True, init_lora_weights=True)
    )
    assert model(X).isnan().any()
    dora_mm.fuse_peft(model)
    assert torch.equal(model(X).isnan().any(), torch.tensor(False))
    model.save_pretrained(tmp_path)
    ours = copy.deepcopy(net)
    dora_mm.load_adapter(ours, tmp_path)
    dora_mm.merge(ours)
    assert relative_error(ours(X), net(X)) < 1e-6
    model.merge_adapter()
    assert model(X).isnan().any()
