"""Which parameters decay, and which form a group."""

import pytest
import torch
from torch import nn

from dora_mm import DoRASpec, adapter_parameters, inject
from dora_mm.adapting.networks import adapt
from dora_mm.config.adapter import VLAdapterConfig
from dora_mm.config.training import OptimizerConfig
from dora_mm.models.families import Structure
from dora_mm.targets import find
from dora_mm.train.optim import build_optimizer
from tests.models.vl_bart.small import small_vl_bart


def decays(parameters, **settings) -> dict[str, float]:
    """The weight decay of each parameter, by name."""
    optimizer = build_optimizer(parameters, OptimizerConfig(lr=0.1, weight_decay=0.01, **settings))
    found = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    return {name: found[id(parameter)] for name, parameter in parameters.items()}


@pytest.fixture
def vl_bart_parameters():
    """What the paper's image runs train."""
    model = Structure({"model": small_vl_bart()}, {"model": find("bart")})
    extra = ("visual_embedding", "biases", "norms")
    config = VLAdapterConfig.model_validate({"rank": 2, "parts": ["text.qv", "cross.qv"], "extra_trainable": extra})
    return adapt(model.networks, model.target_maps, config, seed=0, backend="torch").parameters


def test_all_but_biases_decay(vl_bart_parameters):
    found = decays(vl_bart_parameters)
    biases = {name for name in found if name.endswith("bias")}
    others = set(found) - biases
    assert len(biases) > 40
    for part in ("magnitude", "layer_norm.weight", "layernorm_embedding.weight", "visual_embedding", ".lora_"):
        assert any(part in name for name in others), part
    assert {found[name] for name in biases} == {0.0}
    assert {found[name] for name in others} == {0.01}


def test_biases_decay_where_the_config_says_so(vl_bart_parameters):
    assert set(decays(vl_bart_parameters, decay_biases=True).values()) == {0.01}


def test_a_bias_without_gradient_stays(vl_bart_parameters):
    """At the paper's settings it would shrink to half otherwise."""
    optimizer = build_optimizer(vl_bart_parameters, OptimizerConfig(lr=0.1, weight_decay=0.01))
    for name, parameter in vl_bart_parameters.items():
        parameter.grad = torch.zeros_like(parameter)
        if name.endswith("bias"):
            nn.init.ones_(parameter)
    before = {name: parameter.clone() for name, parameter in vl_bart_parameters.items()}
    optimizer.step()
    same = {name for name, parameter in vl_bart_parameters.items() if torch.equal(parameter, before[name])}
    assert {name for name in vl_bart_parameters if name.endswith("bias")} <= same
    assert not any("magnitude" in name or "layer_norm.weight" in name for name in same)


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_adapters_alone_are_one_group(method):
    """They hold no biases, so that all of an SDXL adapter decays, as before."""
    network = nn.Sequential(nn.Linear(4, 6), nn.Conv2d(3, 4, 3))
    inject(network, ["0", "1"], DoRASpec(rank=2, alpha=2.0, method=method), backend="torch")
    parameters = adapter_parameters(network)
    assert set(decays(parameters).values()) == {0.01}
    assert len(build_optimizer(parameters, OptimizerConfig(lr=0.1)).param_groups) == 1
