"""Which parameters decay, which form a group, what options there are, and where the result of a training is."""

import importlib.util

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from dora_mm import DoRASpec, adapter_parameters, inject
from dora_mm.adapting.networks import adapt
from dora_mm.config.adapter import VLAdapterConfig
from dora_mm.config.training import OptimizerConfig
from dora_mm.models.vl.vl_model import Structure
from dora_mm.targets import find
from dora_mm.train import optim
from dora_mm.train.optim import OPTIMIZERS, averaged_point, build_optimizer, check_optimizer
from dora_mm.train.state_file import read_state, write_state
from dora_mm.train.weights import result_of, swapped
from tests.shared.vl.small_vl_bart import small_vl_bart


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


def test_b_has_a_rate_of_its_own_also_in_parts_with_one():
    parameters = {f"{part}.{name}": nn.Parameter(torch.zeros(1)) for part in "xy" for name in ("lora_A", "lora_B")}
    rates = {name: 0.01 for name in parameters if name.startswith("y")}
    optimizer = build_optimizer(parameters, OptimizerConfig(lr=0.1, b_lr_ratio=16.0), rates)
    found = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: found[id(p)] for name, p in parameters.items()} == pytest.approx(
        {"x.lora_A": 0.1, "x.lora_B": 1.6, "y.lora_A": 0.01, "y.lora_B": 0.16}
    )
    assert optimizer.param_groups[0]["lr"] == 0.1  # the one that metrics have


def test_under_adam_the_ratio_is_alpha_over_rank_by_another_name():
    """Bit for bit, for a power of two, and without what looks at the size of parameters or gradients."""
    results = []
    for alpha, ratio in ((16.0, 1.0), (2.0, 8.0)):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 6))
        inject(network, ["0"], DoRASpec(rank=2, alpha=alpha), backend="torch")
        names = adapter_parameters(network)
        config = OptimizerConfig(lr=0.01, b_lr_ratio=ratio, eps=1e-30, weight_decay=0.0)
        optimizer, x = build_optimizer(names, config), torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
        for _ in range(20):
            mse_loss(network(x), x.new_ones(5, 6)).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(network(x).detach())
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"options": {"amsgrat": True}},
            "options.amsgrat: adamw has no such argument, did you mean 'amsgrad'",
        ),
        ({"options": {"lr": 0.1}}, "optimizer.options.lr is the key optimizer.lr"),
        ({"name": "adafactor", "betas": (0.9, 0.99)}, "optimizer.betas has no effect: adafactor has none"),
        ({"name": "adafactor", "eps": 1e-8}, r"optimizer.eps: adafactor has two, \(None, 0.001\): leave it out"),
        ({"options": {"fused": "no", "foreach": True}}, "optimizer.name adamw: "),
    ],
)
def test_settings_are_checked_against_the_signature(settings, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer({"w": nn.Parameter(torch.ones(2))}, OptimizerConfig(lr=0.1, **settings))
    with pytest.raises(ValueError, match=message):  # before anything is loaded
        check_optimizer(OptimizerConfig(lr=0.1, **settings), torch.device("cpu"))


def test_options_reach_the_optimizer():
    config = OptimizerConfig(name="adafactor", lr=0.1, options={"d": 2.0})
    assert build_optimizer({"w": nn.Parameter(torch.ones(2))}, config).param_groups[0]["d"] == 2.0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_those_of_8_bits_are_refused_without_a_gpu(name):
    config = OptimizerConfig(name=name, lr=1.0)
    if name.endswith("8bit"):
        with pytest.raises(ValueError, match=f"optimizer.name {name} needs a GPU"):
            check_optimizer(config, torch.device("cpu"))
    else:
        check_optimizer(config, torch.device("cpu"))


def test_those_of_8_bits_are_refused_on_a_gpu_that_bitsandbytes_does_not_run_on(monkeypatch):
    """`meta` stands for the GPU; a package that is not there is named by `build_optimizer`."""

    class Broken(torch.optim.AdamW):
        def step(self):
            raise RuntimeError("no kernel image is available\nand more")

    config, device = OptimizerConfig(name="adamw_8bit", lr=1.0), torch.device("meta")
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(ValueError, match="needs the package bitsandbytes: pip install"):
            check_optimizer(config, device)
    monkeypatch.setattr(optim, "_imported", lambda kind: Broken)
    with pytest.raises(ValueError, match=r"does not run on this GPU \(no kernel image is available\): choose"):
        check_optimizer(config, device)
    monkeypatch.setattr(optim, "_imported", lambda kind: torch.optim.AdamW)
    check_optimizer(config, device)


def test_an_optimizer_whose_state_cannot_be_saved_is_refused_when_a_training_starts(monkeypatch):
    class Remembers(torch.optim.AdamW):
        def state_dict(self):
            return {**super().state_dict(), "seen": {1, 2}}

    monkeypatch.setattr(optim, "_imported", lambda kind: Remembers)
    with pytest.raises(ValueError, match=r"adamw: its state.seen is a set, which a checkpoint cannot hold, so that"):
        check_optimizer(OptimizerConfig(name="adamw", lr=1.0), torch.device("cpu"))


def test_the_result_of_a_schedule_free_training_is_beside_it():
    """As its own `eval` computes it, which rounds what it trains."""
    pytest.importorskip("schedulefree")
    parameter = nn.Parameter(torch.randn(50))
    optimizer = build_optimizer({"w": parameter}, OptimizerConfig(name="schedule_free", lr=0.1))
    for step in range(5):
        parameter.grad = torch.randn(50, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    trained = parameter.detach().clone()
    with result_of(optimizer):
        inside = parameter.detach().clone()
        assert not torch.equal(inside, trained)
    assert torch.equal(parameter, trained)
    optimizer.eval()  # type: ignore[attr-defined]
    assert torch.equal(parameter, inside)
    assert averaged_point(build_optimizer({"w": parameter}, OptimizerConfig(lr=0.1))) is None


def test_swapped_parameters_come_back_after_an_error():
    parameter = nn.Parameter(torch.zeros(2))
    before = parameter.data_ptr()

    @swapped({parameter: torch.ones(2)})
    def fail():
        raise KeyError(float(parameter.detach().sum()))

    with pytest.raises(KeyError, match=r"2\.0"):
        fail()
    assert parameter.data_ptr() == before


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name.endswith("8bit")])
def test_those_of_8_bits_go_on_to_the_same_bits(name, tmp_path):
    pytest.importorskip("bitsandbytes")
    shape = (128, 64)  # smaller ones are kept in float32

    def train(parameter, optimizer, steps):
        for step in steps:
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(step))
            parameter.grad = noise.to(parameter.device)
            optimizer.step()

    def start():
        parameter = nn.Parameter(torch.ones(shape, device="cuda"))
        return parameter, build_optimizer({"w": parameter}, OptimizerConfig(name=name, lr=0.01))

    whole, first, second = start(), start(), start()
    train(*whole, range(8))
    train(*first, range(4))
    write_state(tmp_path / "state.safetensors", {"optimizer": first[1].state_dict()})
    second[0].data.copy_(first[0].data)
    second[1].load_state_dict(read_state(tmp_path / "state.safetensors")["optimizer"])
    train(*second, range(4, 8))
    assert torch.equal(whole[0], second[0])
