"""FSDP2: a sharded model trains, merges and is saved as an unsharded one is. Two processes, gloo, no GPU."""

import multiprocessing
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from dora_mm import DoRASpec, adapter_parameters, fixed_parameters, inject, load_adapter, merge, save_adapter, unmerge
from tests.core import reference

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
METHODS = ("dora", "lora")


@pytest.fixture
def in_two_processes(tmp_path):
    """Runs a function of this file with (rank, *arguments) in two processes of one group; errors in them are raised."""
    # A server that has imported torch forks each pair in no time, where a new interpreter takes seconds.
    multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.tensor", "dora_mm.core"])

    def run(function, *arguments):
        store = tmp_path / f"store-{time.monotonic_ns()}"
        torch.multiprocessing.start_processes(
            _in_group, (str(store), function, arguments), nprocs=2, start_method="forkserver"
        )

    return run


def _in_group(rank, store, function, arguments):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        function(rank, *arguments)
    finally:
        dist.destroy_process_group()


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


def shard(model, **options):
    """Each layer and then the model, as torch's tutorial does."""
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh, **options)
    return model


def sharded(method="dora", **options):
    return shard(trained(method), **options)


def data(tokens=64):
    return torch.randn(tokens, 12, generator=torch.Generator().manual_seed(1))


def gradients(model):
    """The whole gradients of the adapters by name."""
    found = {name: parameter.grad for name, parameter in adapter_parameters(model).items()}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}


def _trains(rank, tokens, num_passes):
    for method in METHODS:
        whole, model, x = trained(method), sharded(method), data(tokens)
        whole(x).square().mean().backward()
        with fixed_parameters(model, num_passes=num_passes):
            for some in x[rank::2].chunk(num_passes):
                (model(some).square().mean() / num_passes).backward()  # FSDP averages over the processes
        found = gradients(model)
        for name, expected in gradients(whole).items():
            assert reference.relative_error(found[name], expected) < 1e-5, (method, name)


@pytest.mark.parametrize(("tokens", "num_passes"), [(4, 1), (2000, 2)])  # either form
def test_gradients_are_those_of_the_unsharded_model(in_two_processes, tokens, num_passes):
    in_two_processes(_trains, tokens, num_passes)


def _merges(rank, keep_base):
    for method in METHODS:
        model, x = sharded(method), data()
        expected = trained(method)(x)
        report = merge(model, keep_base=keep_base)
        assert report.num_modules == 2
        assert reference.relative_error(model(x), expected) < 1e-5, method
        if keep_base:
            unmerge(model)
            assert reference.relative_error(model(x), expected) < 1e-6, method


@pytest.mark.parametrize("keep_base", [True, False])
def test_merged_outputs_are_those_of_the_adapted_model(in_two_processes, keep_base):
    in_two_processes(_merges, keep_base)


def _computes_in_bf16(rank, method):
    whole, x = trained(method), data()
    model = sharded(method, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    y, expected = model(x[rank::2]), whole(x)
    assert y.dtype == torch.bfloat16
    assert reference.relative_error(y, expected[rank::2]) < 2e-2
    y.float().square().mean().backward()
    expected.square().mean().backward()
    found = gradients(model)
    for name, grad in gradients(whole).items():
        assert found[name].dtype == torch.float32, name  # of the sharded parameter, which stays in fp32
        assert reference.relative_error(found[name], grad) < 5e-2, name


@pytest.mark.parametrize("method", METHODS)
def test_mixed_precision_is_close_to_fp32(in_two_processes, method):
    in_two_processes(_computes_in_bf16, method)


def _saves(rank, folder, merged):
    model = sharded()
    if merged:
        merge(model)
    for format in ("diffusers", "peft"):
        save_adapter(model, f"{folder}/{format}", format=format)
        dist.barrier()  # only one process writes
        plain, expected, x = bare(), trained(), data()
        load_adapter(plain, f"{folder}/{format}")
        assert torch.equal(plain(x), expected(x)), format
        assert reference.relative_error(model(x), expected(x)) < 1e-5, format  # saving changed nothing


@pytest.mark.parametrize("merged", [False, True])
def test_the_whole_adapter_is_saved(in_two_processes, tmp_path, merged):
    in_two_processes(_saves, str(tmp_path), merged)


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
