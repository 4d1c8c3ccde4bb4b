"""FSDP2: a sharded model trains, merges and is saved as an unsharded one is. Two processes, gloo, no GPU."""

import importlib
import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from dora_mm import DoRASpec, adapter_parameters, fixed_parameters, inject, load_adapter, merge, save_adapter, unmerge
from dora_mm.core.wrappers.sharded import shard_frozen
from tests.shared import reference
from tests.shared.two_processes import needs_fsdp, run_in_two

pytestmark = needs_fsdp
METHODS = ("dora", "lora")


@pytest.fixture
def in_two_processes(tmp_path):
    return partial(run_in_two, tmp_path)


def bare():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 6))


def trained(method="dora"):
    """The same adapted model in every process."""
    model = bare()
    inject(model, ["0", "2"], DoRASpec(rank=4, method=method))
    for seed, index in enumerate((0, 2)):
        reference.randomize(model[index], seed=seed)
    return model


def shard(model, *, by_layer=True, **options):
    """As torch's tutorial does, or in one piece, which stays whole after a forward pass."""
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2]) if by_layer else ():
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def sharded(method="dora", **options):
    return shard(trained(method), **options)


def data(tokens=64):
    return torch.randn(tokens, 12, generator=torch.Generator().manual_seed(1))


def gradients(model):
    """The whole gradients of the adapters by name."""
    found = {name: parameter.grad for name, parameter in adapter_parameters(model).items()}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}


def check_gradients(model, whole, rank, x, num_passes=1):
    exact = reference.doubled(whole)
    for each in (whole, exact):
        each(x.to(each[0].weight)).square().mean().backward()
    with fixed_parameters(model, num_passes=num_passes):
        for some in x[rank::2].chunk(num_passes):
            (model(some).square().mean() / num_passes).backward()  # FSDP averages over the processes
    reference.check_errors(gradients(model), gradients(whole), gradients(exact))


def _trains(rank):
    for method in METHODS:
        for tokens, num_passes in ((4, 1), (2000, 2)):  # either form
            check_gradients(sharded(method), trained(method), rank, data(tokens), num_passes)


@pytest.mark.slow
def test_gradients_are_those_of_the_unsharded_model(in_two_processes):
    in_two_processes(_trains)


def outputs(method, x):
    """Those of the unsharded model, in float32 and in float64."""
    whole = trained(method)
    return whole(x), reference.doubled(whole)(x.double())


def _merges(rank, by_layer):
    for method, keep_base in itertools.product(METHODS, (True, False)):
        model, x = sharded(method, by_layer=by_layer), data()
        expected, exact = outputs(method, x)
        model(x)
        report = merge(model, keep_base=keep_base)
        assert report.num_modules == 2
        assert report.surviving_share > 0.999
        for _ in range(2):
            reference.check_error(model(x), expected, exact, (method, keep_base))
            model.reshard()  # as a backward pass does
        if keep_base:
            unmerge(model)
            reference.check_error(model(x), expected, exact, method)
            check_gradients(model, trained(method), rank, x)


@pytest.mark.parametrize("by_layer", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_merged_outputs_are_those_of_the_adapted_model(in_two_processes, by_layer):
    in_two_processes(_merges, by_layer)


def _computes_in_bf16(rank):
    for method in METHODS:
        whole, x = trained(method), data()
        model = sharded(method, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        y, expected = model(x[rank::2]), whole(x)
        assert y.dtype == torch.bfloat16
        # FSDP casts A, B and m as well, which the layer by itself never does: five units of 2^-8, in gradients twelve
        assert reference.relative_error(y, expected[rank::2]) < 2e-2, method
        y.float().square().mean().backward()
        expected.square().mean().backward()
        found = gradients(model)
        for name, grad in gradients(whole).items():
            assert found[name].dtype == torch.float32, name  # of the sharded parameter, which stays in fp32
            assert reference.relative_error(found[name], grad) < 5e-2, (method, name)


def test_mixed_precision_is_close_to_fp32(in_two_processes):
    in_two_processes(_computes_in_bf16)


def _saves(rank, folder):
    for format, merged in itertools.product(("diffusers", "peft"), (False, True)):
        model, plain, expected, x = sharded(), bare(), trained(), data()
        model(x)
        if merged:
            merge(model)
        path = f"{folder}/{format}-{merged}"
        save_adapter({"unet": model}, path, format=format)
        load_adapter(plain, path)
        assert torch.equal(plain(x), expected(x)), (format, merged)
        reference.check_error(model(x), *outputs("dora", x), (format, merged))  # saving changed nothing


def test_the_whole_adapter_is_saved(in_two_processes, tmp_path):
    in_two_processes(_saves, str(tmp_path))


def _divides_what_is_frozen(rank, folder):
    for method in METHODS:
        whole, model, x = trained(method), trained(method), data()
        exact = reference.doubled(whole)
        parameters = adapter_parameters(model)
        shard_frozen(model, [model[0]], parameters.values(), torch.device("cpu"))
        local = [p.to_local() for p in model.parameters() if isinstance(p, DTensor)]
        assert 2 * sum(p.numel() for p in local) == sum(p.numel() for p in bare().parameters())
        assert not any(isinstance(p, DTensor) for p in parameters.values())
        for _ in range(2):  # FSDP averages nothing here
            y, expected, right = model(x), whole(x), exact(x.double())
            reference.check_error(y, expected, right)
            for each in (y, expected, right):
                each.square().mean().backward()
        reference.check_errors({name: p.grad for name, p in parameters.items()}, gradients(whole), gradients(exact))
        merge(model)
        reference.check_error(model(x), expected, right)
        unmerge(model)
        reference.check_error(model(x), expected, right)
        save_adapter({"unet": model}, folder, format="diffusers")
        again = bare()
        load_adapter(again, folder)
        assert torch.equal(again(x), expected), method


def test_what_is_trained_stays_whole(in_two_processes, tmp_path):
    in_two_processes(_divides_what_is_frozen, str(tmp_path))


class Quantized(nn.Module):
    """A block of bitsandbytes' layers, of which one is adapted; its norm is float32."""

    def __init__(self, kind):
        super().__init__()
        layers = importlib.import_module("bitsandbytes.nn")
        torch.manual_seed(0)
        for name in ("first", "second"):
            layer = layers.Linear4bit(64, 64, quant_type=kind, compute_dtype=torch.float32)
            setattr(self, name, layer.to("cpu"))
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        return self.second(self.first(self.norm(x)).relu())


def quantized(kind):
    model = nn.Sequential(Quantized(kind).requires_grad_(False))
    inject(model, ["first"], DoRASpec(rank=4, cache="norms"))
    reference.randomize(model[0].first, seed=0)
    return model


def _divides_4_bits(rank, kind):
    whole, model = quantized(kind), quantized(kind)
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    shard_frozen(model, [model[0]], adapter_parameters(model).values(), torch.device("cpu"))
    assert model[0].first.weight.to_local().numel() == 64 * 64 // 4
    for _ in range(2):
        y, expected = model(x), whole(x)
        y.square().mean().backward()
        expected.square().mean().backward()
    # the same weights, dequantised by the same code on either side: nothing but the order of some sums may differ
    assert reference.relative_error(y, expected) < 1e-6
    found = gradients(model)
    for name, grad in gradients(whole).items():
        assert reference.relative_error(found[name], grad) < 1e-6, name
    with torch.no_grad(), fixed_parameters(model.eval()):
        for _ in range(2):
            assert reference.relative_error(model(x), expected) < 1e-2  # a kernel of its own, which rounds to bf16


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_weights_of_4_bits_are_divided(in_two_processes, kind):
    pytest.importorskip("bitsandbytes")
    in_two_processes(_divides_4_bits, kind)


def _refuses_to_inject(rank):
    model = shard(bare())
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match="(?s)(?=.*shard)(?=.*before)"):
        inject(model, ["0", "2"], DoRASpec(rank=4))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is p and p.requires_grad for name, p in before.items())


def test_a_sharded_model_is_refused(in_two_processes):
    in_two_processes(_refuses_to_inject)
