"""What others wrap around an adapted layer: replicas, parametrizations, tied weights, casts, default devices, meta."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from dora_mm import DoRASpec, adapter_parameters, fixed_parameters, inject, load_adapter, merge, remove, save_adapter
from tests.shared import reference

TOKENS = [2, 3000]  # either form
METHODS = ["dora", "lora"]


def trained(model, targets, *, size=0.05, **spec):
    inject(model, targets, DoRASpec(**{"rank": 4, **spec}))
    for seed, name in enumerate(targets):
        reference.randomize(model.get_submodule(name), size=size, seed=seed)
    return model


def linear(**spec):
    return trained(nn.Sequential(nn.Linear(32, 24)), ["0"], **spec)


# --- parameters that are held in another way ---


class Twice(nn.Module):
    def forward(self, parameter):
        return 2 * parameter


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "magnitude"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_parametrization_of_an_adapter_is_applied(name, tokens):
    model, x = linear(), torch.randn(tokens, 32)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        getattr(expected[0], name).mul_(2)
    parametrize.register_parametrization(model[0], name, Twice())
    torch.testing.assert_close(model(x), expected(x))
    model(x).square().sum().backward()
    exact = reference.doubled(expected)
    for net in (expected, exact):
        net(x.to(net[0].weight)).square().sum().backward()
    found = model[0].parametrizations[name].original.grad
    reference.check_error(found, *(2 * getattr(net[0], name).grad for net in (expected, exact)))


def test_a_parametrization_that_changes_nothing_keeps_the_trained_adapter():
    model, x = linear(), torch.randn(5, 32)
    expected = model(x)
    for name in ("lora_B", "magnitude"):
        parametrize.register_parametrization(model[0], name, nn.Identity())
    assert torch.equal(model(x), expected)


LAYERS = {
    "linear": (lambda: nn.Linear(16, 8), lambda: torch.randn(6, 16)),
    "many tokens": (lambda: nn.Linear(16, 8), lambda: torch.randn(3000, 16)),
    "convolution": (lambda: nn.Conv2d(3, 8, 3), lambda: torch.randn(2, 3, 7, 7)),
    "embedding": (lambda: nn.Embedding(10, 8), lambda: torch.randint(10, (4, 5))),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("method", [*METHODS, "magnitude"])
def test_a_replica_of_data_parallel_computes_what_the_layer_does(kind, method):
    build, draw = LAYERS[kind]
    model = trained(nn.Sequential(build()), ["0"], method=method)
    layer, x = model[0], draw()
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer.named_parameters(recurse=False):
        setattr(replica, name, parameter.clone())  # nn.parallel.replicate holds copies as plain attributes
    y = layer(x)
    assert torch.equal(replica(x), y)
    expected = torch.autograd.grad(y.square().sum(), list(adapter_parameters(model).values()))
    replica(x).square().sum().backward()
    for (name, parameter), grad in zip(adapter_parameters(model).items(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, msg=name)


def replicate(model, copied):
    """What nn.parallel.replicate makes of a model on one more device."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module.named_children():
            setattr(replica, name, replicas[child])
        for name, parameter in module.named_parameters(recurse=False):
            setattr(replica, name, copied(parameter))
    return replicas[model]


def pairs(model):
    """A model and its double in float64, each with one of its parameters."""
    return [(net, next(net.parameters())) for net in (model, reference.doubled(model))]


def test_a_replica_of_an_attention_reads_its_own_copies():
    """On another device it could not read the others."""
    targets = ["attn.q_proj", "attn.v_proj", "attn.out_proj"]
    model = trained(nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2)}), targets)
    changed, x = copy.deepcopy(model), torch.randn(5, 2, 16)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.5)
    found = replicate(model, lambda p: 1.5 * p)["attn"](x, x, x)[0]
    reference.check_error(found, *(net["attn"](*[x.to(p)] * 3)[0] for net, p in pairs(changed)))


@pytest.mark.parametrize("method", METHODS)
def test_functional_call_uses_the_given_parameters(method):
    model, other, x = linear(method=method), linear(method=method, size=0.2), torch.randn(5, 32)
    assert torch.equal(functional_call(model, dict(other.named_parameters()), x), other(x))


# --- a frozen adapter ---


def second_adapter(folder, **spec):
    """The file of another adapter of a model like `frozen`'s, and the layer that it was trained on."""
    donor = trained(nn.Sequential(nn.Linear(12, 32), nn.Linear(32, 24)), ["1"], size=0.1, **spec)
    save_adapter(donor, folder, format="peft")
    return donor[1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("stacked", [False, True])
def test_gradients_flow_through_a_frozen_adapter(method, tokens, stacked, tmp_path):
    model = trained(nn.Sequential(nn.Linear(12, 32), nn.Linear(32, 24)), ["1"], method=method)
    first, layer = model
    weights = {dtype: reference.weight_of(layer, dtype=dtype) for dtype in (torch.float32, torch.float64)}
    if stacked:
        other = second_adapter(tmp_path, method=method)
        load_adapter(model, tmp_path, name="second")
        change = reference.Adapter(other.lora_A, other.lora_B, other.magnitude, 1.0)
        for dtype, W in weights.items():
            weights[dtype] = W + reference.merged_weight(layer.weight, change, dtype) - layer.weight.to(dtype)
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad_(False)
    x, dY = torch.randn(tokens, 12), torch.randn(tokens, 24)
    model(x).backward(dY)
    usual, exact = (dY.to(W) @ W.detach() for W in weights.values())
    reference.check_error(first.weight.grad, *(dX.T @ x.to(dX) for dX in (usual, exact)))
    reference.check_error(first.bias.grad, usual.sum(0), exact.sum(0))


# --- weights that two modules share ---


class Tied(nn.Module):
    def __init__(self, order):
        super().__init__()
        made = {"embed": nn.Embedding(50, 16), "head": nn.Linear(16, 50, bias=False)}
        for name in order:
            self.add_module(name, made[name])
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


ORDERS = [("embed", "head"), ("head", "embed")]
ADAPTED = [["head"], ["embed"], ["embed", "head"]]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("adapted", ADAPTED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_casting_a_tied_weight_keeps_a_fresh_adapter_a_no_op(order, adapted, dtype):
    model, ids = Tied(order), torch.arange(50)
    base = copy.deepcopy(model).to(dtype)
    inject(model, adapted, DoRASpec(rank=4))
    model.to(dtype)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model(ids), base(ids))


@pytest.mark.parametrize("adapted", ADAPTED)
def test_casting_a_tied_weight_keeps_a_trained_adapter(adapted):
    model = trained(Tied(ORDERS[0]), adapted)
    before = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    model.bfloat16()
    assert all(torch.equal(p, before[name]) for name, p in adapter_parameters(model).items())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("trainable", [True, False])
def test_remove_restores_requires_grad_of_a_tied_weight(order, trainable):
    model = Tied(order).requires_grad_(trainable)
    weight = model.embed.weight
    inject(model, ["embed", "head"], DoRASpec(rank=4))
    assert not weight.requires_grad
    remove(model)
    assert model.embed.weight is model.head.weight is weight
    assert weight.requires_grad is trainable


# --- meta models and defaults of the process ---


def build():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def test_a_meta_model_takes_a_base_state_dict():
    base, x = build(), torch.randn(5, 16)
    with torch.device("meta"):
        model = build()
    inject(model, ["0", "2"], DoRASpec(rank=4), seed=3)
    model.load_state_dict(base.state_dict(), assign=True)
    assert torch.equal(model(x), base(x))
    normal = copy.deepcopy(base)
    inject(normal, ["0", "2"], DoRASpec(rank=4), seed=3)
    for name, parameter in adapter_parameters(normal).items():
        assert torch.equal(adapter_parameters(model)[name], parameter), name


def test_a_meta_model_takes_a_whole_state_dict():
    source, x = trained(build(), ["0", "2"]), torch.randn(5, 16)
    with torch.device("meta"):
        model = build()
        inject(model, ["0", "2"], DoRASpec(rank=4))
    model.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(model(x), source(x))
    model(x).sum().backward()
    assert all(p.grad is not None for p in adapter_parameters(model).values())


def test_merging_does_not_depend_on_the_default_device():
    model = linear().bfloat16()
    twin = copy.deepcopy(model)
    with torch.device("meta"):  # as torch.set_default_device does
        found = merge(model)
    expected = merge(twin)
    assert found == expected
    assert torch.equal(model[0].weight, twin[0].weight)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_do_not_depend_on_the_default_device(tokens, dtype):
    model, x = linear().to(dtype), torch.randn(tokens, 32).to(dtype)
    expected = model(x)
    with torch.device("meta"):
        y = model(x)
        y.sum().backward()
    assert torch.equal(y, expected)


def test_drawing_does_not_depend_on_the_default_dtype():
    layers = [nn.Sequential(nn.Linear(16, 8, dtype=torch.float32)) for _ in range(2)]
    inject(layers[0], ["0"], DoRASpec(rank=4))
    torch.set_default_dtype(torch.float64)
    try:
        inject(layers[1], ["0"], DoRASpec(rank=4))
    finally:
        torch.set_default_dtype(torch.float32)
    assert layers[1][0].lora_A.dtype == torch.float32
    assert torch.equal(layers[0][0].lora_A, layers[1][0].lora_A)


# --- inference mode ---


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("promise", [{}, {"num_passes": 2}, {"base_only": True}], ids=["all", "passes", "base"])
def test_training_after_inference_mode_inside_fixed_parameters(tokens, dtype, promise):
    model, x = linear().to(dtype), torch.randn(tokens, 32).to(dtype)
    twin, exact, inputs = copy.deepcopy(model), reference.doubled(model), [x.clone().requires_grad_() for _ in range(2)]
    inputs.append(x.double().requires_grad_())
    with fixed_parameters(model, **promise):
        with torch.inference_mode():
            model(x)
        model(inputs[0]).square().sum().backward()
    twin(inputs[1]).square().sum().backward()
    exact(inputs[2]).square().sum().backward()
    reference.check_error(*(each.grad for each in inputs))
    found = ({n: p.grad for n, p in adapter_parameters(m).items()} for m in (model, twin, exact))
    reference.check_errors(*found, dtype=dtype)


# --- autocast, compilers ---


@pytest.mark.parametrize("spec", [{}, {"norm_grad": "exact", "cache": "norms"}, {"method": "lora"}])
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_backward_pass_inside_autocast(spec, tokens):
    model, x = linear(**spec), torch.randn(tokens, 32)
    parameters = list(adapter_parameters(model).values())
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    y = model(x).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, parameters)
    twin = reference.doubled(model)
    exact = torch.autograd.grad(twin(x.double()).square().sum(), list(adapter_parameters(twin).values()))
    reference.check_errors(*map(reference.numbered, (found, expected, exact)))


def test_autocast_does_not_reach_the_norms_of_an_embedding():
    model = trained(nn.Sequential(nn.Embedding(30, 16)), ["0"], norm_grad="exact")
    x = torch.arange(30)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_compiled_model_inside_fixed_parameters(tokens):
    model, x = linear(), torch.randn(tokens, 32)
    expected = model(x)
    with fixed_parameters(model):
        found = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)(x)
    torch.testing.assert_close(found, expected)


def test_a_model_on_meta_computes_shapes():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 6), nn.Embedding(5, 6))
        inject(model, ["0", "1"], DoRASpec(rank=2))
        assert model[0](torch.empty(3, 8)).shape == (3, 6)
        assert model[1](torch.zeros(3, dtype=torch.int64)).shape == (3, 6)


# --- weights that arrive in other ways than load_state_dict of the whole model ---


def test_trained_values_that_are_set_one_by_one_stay_after_a_move():
    """As accelerate's load_checkpoint_and_dispatch does."""
    source, x = linear(), torch.randn(5, 32)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(32, 24))
        inject(model, ["0"], DoRASpec(rank=4))
    for name, value in source.named_parameters():
        setattr(model[0], name.removeprefix("0."), nn.Parameter(value.detach().clone()))
    model.to("cpu")
    assert torch.equal(model(x), source(x))


def test_a_base_loaded_by_the_distributed_checkpoint_keeps_a_fresh_adapter_a_no_op():
    """It fills the keys that the state dict lacks with the model's own values."""
    from torch.distributed.checkpoint.state_dict import set_model_state_dict

    base, model, x = nn.Sequential(nn.Linear(32, 24)), nn.Sequential(nn.Linear(32, 24)), torch.randn(5, 32)
    inject(model, ["0"], DoRASpec(rank=4), backend="torch")
    state = {**model.state_dict(), **base.state_dict()}
    set_model_state_dict(model, state)
    assert torch.equal(model(x), base(x))


def test_a_fresh_adapter_that_was_loaded_is_still_fresh():
    first, second, x = nn.Sequential(nn.Linear(32, 24)), nn.Sequential(nn.Linear(32, 24)), torch.randn(5, 32)
    for model in (first, second):
        inject(model, ["0"], DoRASpec(rank=4), backend="torch")
    second.load_state_dict(first.state_dict())
    bare = nn.Sequential(nn.Linear(32, 24)).bfloat16()
    bare.load_state_dict({k: v for k, v in first.state_dict().items() if k in ("0.weight", "0.bias")})
    assert torch.equal(second.bfloat16()(x.bfloat16()), bare(x.bfloat16()))


def test_a_tied_weight_that_is_loaded_by_its_other_name():
    model = nn.ModuleDict({"embed": nn.Embedding(24, 32), "head": nn.Linear(32, 24, bias=False)})
    model["head"].weight = model["embed"].weight
    inject(model, ["head"], DoRASpec(rank=4), backend="torch")
    weight, x = torch.randn(24, 32), torch.randn(5, 32)
    model.load_state_dict({"embed.weight": weight}, strict=False)
    assert torch.equal(model["head"](x), nn.functional.linear(x, weight))


def test_a_parametrization_has_to_go_before_the_adapter_does():
    model = trained(nn.Sequential(nn.Linear(32, 24), nn.Linear(24, 8)), ["0", "1"])
    parametrize.register_parametrization(model[1], "lora_B", Twice())
    with pytest.raises(ValueError, match="lora_B of 1 is parametrized"):
        remove(model)
    assert type(model[0]).__name__ == "DoRALinear"
