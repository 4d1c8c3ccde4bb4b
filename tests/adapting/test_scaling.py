"""`adapter.scaling: sqrt` against PEFT's own use_rslora, in float64: in memory, and from a file without that flag."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from dora_mm import inject, save_adapter
from dora_mm.adapting.networks import spec_of
from dora_mm.config.adapter import ImageAdapterConfig
from dora_mm.core import adapted_layers

PART = "unet.attn"


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 12)).double()


def drawn_by_peft(rank: int, alpha: int, *, use_dora: bool):
    """PEFT's model with numbers that float32 has exactly, so that a file loses none."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0", "1"], use_rslora=True, use_dora=use_dora)
    model = get_peft_model(base(), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.copy_((parameter * 1.1).float().double())
            elif "lora_" in name:
                parameter.copy_((torch.randn(parameter.shape) / 4).double())
    return model


def spec(**settings):
    config = ImageAdapterConfig(parts={PART: settings.pop("part", {})}, scaling="sqrt", **settings)
    return spec_of(config, config.all_parts()[PART])


@pytest.mark.parametrize("method", ["dora", "lora"])
@pytest.mark.parametrize("part", [{}, {"rank": 6}, {"rank": 6, "alpha": 5.0}])
def test_it_computes_what_peft_computes(method, part, tmp_path):
    settings = {"rank": 4, "alpha": 8.0} | part
    theirs = drawn_by_peft(settings["rank"], int(settings["alpha"]), use_dora=method == "dora")
    ours = base()
    inject(ours, ["0", "1"], spec(method=method, rank=4, alpha=8.0, part=part))
    with torch.no_grad():
        for path, layer in adapted_layers(ours).items():
            peft = theirs.base_model.model.get_submodule(path)
            layer.lora_A.copy_(peft.lora_A["default"].weight)
            layer.lora_B.copy_(peft.lora_B["default"].weight)
            if method == "dora":
                layer.magnitude.copy_(peft.lora_magnitude_vector["default"].weight)
    x = torch.randn(5, 24, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-13, atol=1e-13)

    save_adapter(ours, tmp_path, format="peft")
    assert "use_rslora" not in json.loads((tmp_path / "adapter_config.json").read_text())
    loaded = PeftModel.from_pretrained(base(), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(loaded.double()(x), theirs(x), rtol=1e-13, atol=1e-13)


def test_alpha_stays_at_other_ranks_and_alpha_over_rank_without_it():
    config = ImageAdapterConfig(rank=4, alpha=8.0)
    assert config.alpha_at(16) == 32.0
    assert config.model_copy(update={"scaling": "sqrt"}).alpha_at(16) == 8.0
    assert spec(rank=16, alpha=8.0).scaling == 2.0


def test_it_needs_an_alpha():
    with pytest.raises(ValueError, match=r"scaling sqrt needs alpha: alpha=2.83 scales the update by 1 at rank 8"):
        ImageAdapterConfig(rank=8, scaling="sqrt")
