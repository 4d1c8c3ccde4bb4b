"""A file that is loaded into a model with other base weights than it was trained on."""

import logging

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dora_mm import DoRASpec, inject, load_adapter, merge, save_adapter
from dora_mm.formats.base_samples import KEY


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 40), nn.Embedding(9, 40)).requires_grad_(False)


@pytest.fixture
def trained(tmp_path):
    net = network(0)
    inject(net, ["0", "2", "3"], DoRASpec(rank=2))
    for path in ("0", "2"):
        nn.init.normal_(net.get_submodule(path).lora_B)
    return save_adapter(net, tmp_path)


def warnings_of_loading(file, model, caplog) -> list[str]:
    with caplog.at_level(logging.WARNING):
        load_adapter(model, file)
    return [record.getMessage() for record in caplog.records]


def test_another_base_is_reported(trained, caplog):
    (message,) = warnings_of_loading(trained, network(1), caplog)
    assert message.startswith(f"{trained} was trained on a base model with other weights (")
    assert "(model." not in message
    assert message.endswith("(0, 2, 3 differ): load those into the model first")


def test_the_table_of_a_single_model_has_no_component(trained):
    assert str(load_adapter(network(0), trained)).split()[:3] == ["module", "class", "weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_base_is_not_in_any_dtype(trained, caplog, dtype):
    assert warnings_of_loading(trained, network(0).to(dtype), caplog) == []


def test_a_base_that_was_trained_further_is_not(trained, caplog):
    net = network(0)
    for parameter in net.parameters():
        parameter.mul_(1.2).add_(0.1 * parameter.std() * torch.randn_like(parameter))
    assert warnings_of_loading(trained, net, caplog) == []


def test_a_merged_model_records_its_base(tmp_path, caplog):
    net = network(0)
    inject(net, ["2"], DoRASpec(rank=2))
    nn.init.normal_(net[2].lora_B, std=30)
    merge(net)
    assert warnings_of_loading(save_adapter(net, tmp_path / "kept"), network(0), caplog) == []


def test_without_a_base_nothing_is_recorded(tmp_path, caplog):
    net = network(0)
    inject(net, ["2"], DoRASpec(method="full"))
    assert warnings_of_loading(save_adapter(net, tmp_path), network(1), caplog) == []


@pytest.mark.parametrize(
    "entry", ["[1]", '{"model.2": "abcdefghijklmnop"}', '{"model.2": [1e999]}', '{"model.2": [[1]]}']
)
def test_a_damaged_entry_is_an_error_and_changes_nothing(tmp_path, entry):
    net = network(0)
    inject(net, ["2"], DoRASpec(rank=2))
    file = save_adapter(net, tmp_path)
    with safe_open(file, "pt") as opened:
        header = {**opened.metadata(), KEY: entry}
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (it is no mapping)
    save_file(tensors, file, header)
    other = network(0)
    with pytest.raises(ValueError, match=KEY):
        load_adapter(other, file)
    assert type(other[2]) is nn.Linear
