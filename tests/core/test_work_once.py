"""Norms and W' are computed once per change and never stale, however a parameter changes; and what is read back."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dora_mm.core import DoRASpec, adapt_layer, adapter_parameters, fixed_parameters, inject, merge
from tests.shared import reference


def trained(layer):
    return list(layer.adapter_tensors().values())


def optimizer_step(**how):
    def change(layer):
        layer(torch.ones(2, 32)).sum().backward()
        torch.optim.AdamW(trained(layer), lr=0.1, **how).step()

    return change


def data_write(layer):
    layer.lora_B.data.add_(0.3)
    layer.magnitude.data.mul_(1.5)


def swap_in_average(layer):
    average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    data_write(layer)
    average.update_parameters(layer)
    with torch.no_grad():
        for parameter, mean in zip(layer.parameters(), average.module.parameters(), strict=True):
            parameter.data.copy_(mean)


@torch.no_grad()
def update_without_gradient(layer):
    layer.lora_A.mul_(-2)


def replace_scaling(layer):
    layer.adaptation.spec = DoRASpec(rank=4, alpha=12)


def edit_base(layer):
    layer.weight.data[:, :3] += 1


CHANGES = {
    "for-loop optimizer": optimizer_step(foreach=False),
    "foreach optimizer": optimizer_step(foreach=True),
    "fused optimizer": optimizer_step(fused=True),
    ".data": data_write,
    "no_grad": update_without_gradient,
    "average": swap_in_average,
    "load_state_dict": lambda layer: layer.load_state_dict({k: 1.1 * v for k, v in layer.state_dict().items()}),
    "strength": lambda layer: layer.set_strength(0.4),
    "scaling": replace_scaling,
    "base": edit_base,
    "to": lambda layer: layer.to(torch.float64),
    "device": lambda layer: layer.to("meta").to_empty(device="cpu").load_state_dict(other_state()),
}


def other_state():
    _, other = reference.linear(32, 24, seed=5)
    return reference.randomize(other, seed=5).state_dict()


def expected(layer, x, dtype=torch.float64):
    W = reference.merged_weight(layer.weight, layer.adapters()[0], dtype)
    return x.to(dtype) @ W.T + layer.bias.to(dtype)


def check_output(y, layer, x):
    """Asserts that y is what the parameters are now, as exactly as the formula in the layer's dtype has it."""
    reference.check_error(y, expected(layer, x, layer.weight.dtype), expected(layer, x))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("tokens", [3, 400])  # either form
def test_a_change_between_passes_has_an_effect(change, tokens):
    for num_passes in (1.0, 100.0):
        _, layer = reference.linear(32, 24)
        reference.randomize(layer)
        x = torch.randn(tokens, 32)
        with fixed_parameters(layer, num_passes=num_passes):
            layer(x)
        CHANGES[change](layer)
        check_output(layer(x.to(layer.weight.dtype)), layer, x)


IN_SCOPE = {
    **{name: CHANGES[name] for name in ("strength", "load_state_dict", "to", "device")},
    "merge": lambda layer: merge(layer),
    "stack": lambda layer: layer.stack("x", layer.adaptation.spec, layer.adapter_tensors(), 1.0),
}


@pytest.mark.parametrize("change", IN_SCOPE)
@pytest.mark.parametrize("base_only", [False, True])
def test_a_change_through_the_interface_has_an_effect_inside_fixed_parameters(change, base_only):
    layer = reference.randomize(reference.linear(32, 24)[1])
    twin, x = copy.deepcopy(layer), torch.randn(30, 32)
    with torch.no_grad(), fixed_parameters(layer, base_only=base_only):
        layer(x)
        IN_SCOPE[change](layer)
        IN_SCOPE[change](twin)
        x = x.to(layer.weight.dtype)
        assert torch.equal(layer(x), twin(x))


def test_adapters_may_change_where_only_the_base_is_fixed():
    _, layer = reference.linear(32, 24)
    reference.randomize(layer)
    x = torch.randn(30, 32)
    with fixed_parameters(layer, base_only=True):
        for change in ("foreach optimizer", "fused optimizer", ".data", "no_grad", "average", "scaling"):
            layer(x)
            CHANGES[change](layer)
            check_output(layer(x), layer, x)


def test_the_parameters_of_a_copy_are_not_fixed():
    _, layer = reference.linear(32, 24)
    reference.randomize(layer)
    x = torch.randn(30, 32)
    with fixed_parameters(layer):
        layer(x)
        twin = copy.deepcopy(layer)
        data_write(twin)
        edit_base(twin)
        check_output(twin(x), twin, x)


# --- how often ---


def model(depth=3):
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(32, 32) for _ in range(depth)))
    inject(net, [str(index) for index in range(depth)], DoRASpec(rank=4))
    for seed, layer in enumerate(net):
        reference.randomize(layer, seed=seed)
    return net


def accumulate(net, batches, *, checkpointing, fixed=True):
    for parameter in adapter_parameters(net).values():
        parameter.grad = None
    with fixed_parameters(net, num_passes=len(batches) if fixed else 1):
        for x in batches:
            x = x.clone().requires_grad_()
            for layer in net:
                x = checkpoint(layer, x, use_reentrant=False) if checkpointing else layer(x)
            x.square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in adapter_parameters(net).items()}


@pytest.mark.parametrize("tokens", [5, 100, 300])
@pytest.mark.parametrize("passes", [1, 4])
def test_accumulation_gives_the_same_bits_with_and_without_checkpointing(tokens, passes):
    net, batches = model(), [torch.randn(tokens, 32) for _ in range(passes)]
    plain = accumulate(net, batches, checkpointing=False)
    again = accumulate(net, batches, checkpointing=True)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize(("tokens", "shape"), [(5, (4, 4)), (3000, (24, 32))])  # A A^T for the norm, or W'
def test_fixed_parameters_compute_once_what_depends_on_them(tokens, shape):
    layer = reference.randomize(reference.linear(32, 24)[1])
    x = torch.randn(tokens, 32)
    counts = []
    for passes in (1, 4):
        with fixed_parameters(layer, num_passes=passes), reference.NewTensors() as allocated:
            for _ in range(passes):
                layer(x)
        counts.append(allocated.shapes.count(shape))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(("checkpointing", "num_kept"), [(True, 0), (False, 3)])
def test_checkpointing_keeps_no_weight(checkpointing, num_kept):
    """Between the passes a checkpointed layer holds its inputs, and no W' for the backward pass."""
    net, x = model(), torch.randn(3000, 32, requires_grad=True)
    with reference.NewTensors() as allocated:
        y = checkpoint(net, x, use_reentrant=False) if checkpointing else net(x)
    assert allocated.shapes.count((32, 32)) >= 3
    assert allocated.num_alive((32, 32)) == num_kept
    y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_passes", [1, 4])
def test_checkpoints_of_few_and_of_many_tokens(dtype, num_passes):
    """The second pass builds W'; the first, when it is repeated, has to save the same tensors as before."""
    layer = reference.randomize(adapt_layer(nn.Linear(48, 64).to(dtype), DoRASpec(4), path="layer"))
    few, many = (torch.randn(tokens, 48).to(dtype).requires_grad_() for tokens in (2, 5000))
    with fixed_parameters(layer, num_passes=num_passes):
        total = checkpoint(layer, few, use_reentrant=False).sum() + checkpoint(layer, many, use_reentrant=False).sum()
        total.backward()
    found = layer.lora_B.grad.clone()
    layer.lora_B.grad = None
    (layer(few).sum() + layer(many).sum()).backward()
    assert reference.relative_error(found, layer.lora_B.grad.double()) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_a_trained_layer_does_not_ask_again_in_each_step():
    """Whether there is an update takes waiting for a GPU to know."""
    layer = adapt_layer(nn.Linear(8, 6, dtype=torch.bfloat16), DoRASpec(2))
    x = torch.ones(3, 8, dtype=torch.bfloat16)
    for is_trained in (False, True):
        if is_trained:
            reference.randomize(layer)
        with fixed_parameters(layer, num_passes=1):
            layer(x)
        assert layer.adaptation.checks_update is not is_trained
    layer.reset_adapter()
    assert layer.adaptation.checks_update


def another_parameter(layer):
    layer.lora_B = nn.Parameter(2 * layer.lora_B.detach())


def parametrized(layer):
    class Doubled(nn.Module):
        def forward(self, t):
            return 2 * t

    parametrize.register_parametrization(layer, "lora_A", Doubled())


UNANNOUNCED = {
    "another parameter": another_parameter,
    "parametrized": parametrized,
    "evaluation": lambda layer: layer.eval(),
}


@pytest.mark.parametrize("change", UNANNOUNCED)
def test_what_a_layer_is_made_of_may_change_where_only_the_base_is_fixed(change):
    """The next pass computes what a layer that made none before does; and so does the one after that."""
    _, layer = reference.linear(32, 24, dropout=0.5)
    reference.randomize(layer)
    new, x = copy.deepcopy(layer), torch.randn(5, 32)
    with fixed_parameters(layer, base_only=True):
        for _ in range(2):
            layer(x)
        for each in (layer, new):
            UNANNOUNCED[change](each)
        for _ in range(2):
            found = []
            for each in (layer, new):
                each.magnitude.data.mul_(1.1)
                torch.manual_seed(1)  # of dropout
                y = each(x)
                learned = [parameter for parameter in each.parameters() if parameter.requires_grad]
                found.append([y, *torch.autograd.grad(y.square().sum(), learned)])
            for one, other in zip(*found, strict=True):
                assert torch.equal(one, other)


def test_other_tensors_may_take_the_place_of_parameters():
    _, layer = reference.linear(32, 24)
    reference.randomize(layer)
    x, others = torch.randn(5, 32), {name: 2 * p.detach() for name, p in adapter_parameters(layer).items()}
    with fixed_parameters(layer, base_only=True):
        before = layer(x)
        swapped = torch.func.functional_call(layer, others, (x,))
        after = layer(x)
    assert torch.equal(before, after)
    assert torch.equal(swapped, torch.func.functional_call(layer, others, (x,)))
    assert not torch.allclose(before, swapped)


@pytest.mark.parametrize("base_only", [True, False])
def test_autocast_and_inference_may_change_from_pass_to_pass(base_only):
    _, layer = reference.linear(32, 24)
    reference.randomize(layer)
    x, found = torch.randn(400, 32), []
    with fixed_parameters(layer, base_only=base_only):
        for _ in range(2):
            with torch.inference_mode():
                found.append(layer(x))
            with torch.autocast("cpu", torch.bfloat16):
                assert layer(x).dtype == torch.bfloat16
            found.append(layer(x))
        found[1].sum().backward()
    assert all(torch.equal(y, found[0]) for y in found)


def test_whether_lora_in_half_precision_is_fresh_is_read_once_per_step():
    _, layer = reference.linear(32, 24, dtype=torch.bfloat16, method="lora")
    x = torch.randn(5, 32).bfloat16()
    with fixed_parameters(layer, num_passes=3), reference.Names() as seen:
        fresh = [layer(x) for _ in range(3)]
    assert seen.names.count("aminmax") == 1
    reference.randomize(layer, size=1.0)
    with fixed_parameters(layer, num_passes=2):
        assert not torch.allclose(layer(x), fresh[0])
        layer.lora_B.data.zero_()
        layer.set_strength(0.5)  # which is a change of the adapter
        assert torch.equal(layer(x), fresh[0])


# --- what is read back ---


class NoReading(TorchDispatchMode):
    """Fails where a value is read back, and where a shape depends on values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in ("_local_scalar_dense", "is_nonzero", "nonzero")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("base", "x"), [(nn.Linear(12, 10), torch.randn(6, 12)), (nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5))]
)
@pytest.mark.parametrize("is_fresh", [False, True])
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_nothing_is_read_back_while_a_cuda_graph_is_captured(base, x, dtype, is_fresh, method, monkeypatch):
    layer, x = adapt_layer(copy.deepcopy(base).to(dtype), DoRASpec(rank=3, method=method)), x.to(dtype)
    if not is_fresh:
        reference.randomize(layer)
    trained = list(layer.adapter_tensors().values())
    y = layer(x)
    expected = [y.detach(), *torch.autograd.grad(y, trained, torch.ones_like(y))]
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with NoReading():
        y = layer(x)
        found = [y.detach(), *torch.autograd.grad(y, trained, torch.ones_like(y))]
    for a, b in zip(found, expected, strict=True):
        assert reference.relative_error(a, b) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_whether_dm_needs_a_product_is_asked_before_the_products_of_dA_and_dB_and_read_behind_them():
    """On a GPU, which then has work while the program waits for the answer."""
    layer = reference.randomize(adapt_layer(nn.Conv2d(8, 12, 3, padding=1), DoRASpec(rank=2)))
    y = layer(torch.randn(2, 8, 16, 16))
    with reference.Names() as seen:
        y.sum().backward()
    asked, read = seen.names.index("any"), seen.names.index("_local_scalar_dense")
    assert seen.names[asked:read].count("convolution_backward") == 2
    assert "convolution_backward" not in seen.names[:asked]
