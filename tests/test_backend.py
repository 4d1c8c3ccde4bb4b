"""Which implementation is chosen, and what happens where Triton does not work."""

import logging

import pytest
import torch
from torch import nn

import dora_mm
from dora_mm import DoRASpec, backend
from dora_mm.core import TORCH, Forward


@pytest.fixture(autouse=True)
def forgotten():
    for cached in (backend.for_device, backend.load_triton):
        cached.cache_clear()
    yield
    for cached in (backend.for_device, backend.load_triton):
        cached.cache_clear()


def test_names():
    assert backend.select("torch") is TORCH
    with pytest.raises(ValueError, match=r"no backend 'cuda': use auto, torch, triton"):
        backend.select("cuda")


def test_a_processor_runs_plain_torch_and_says_so_once(caplog):
    net = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    dora_mm.inject(net, ["0", "1"], DoRASpec(2))
    with caplog.at_level(logging.INFO, "dora_mm"):
        net(torch.randn(3, 8))
        net(torch.randn(3, 8))
    assert [record.message for record in caplog.records] == ["The layer runs in plain torch on this device (cpu)."]


def test_triton_by_name():
    pytest.importorskip("triton")
    net = nn.Sequential(nn.Linear(8, 6))
    report = dora_mm.inject(net, ["0"], DoRASpec(2), backend="triton")
    assert report.num_modules == 1
    expected = nn.functional.linear(x := torch.randn(3, 8), net[0].weight, net[0].bias)
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("what", ["raises", "lies"])
def test_a_broken_triton_falls_back_with_one_warning(monkeypatch, caplog, what):
    triton = pytest.importorskip("dora_mm.kernels.dora_linear")

    def broken(*args, **options):
        if what == "raises":
            raise RuntimeError("no compiler\nand more")
        return 1.01 * TORCH.product(*args, **options)

    monkeypatch.setattr(triton, "TRITON", Forward(TORCH.prepare, broken))
    with caplog.at_level(logging.INFO, "dora_mm"):
        assert backend.for_device("cuda") is TORCH
        assert backend.for_device("cuda") is TORCH
    (warning,) = caplog.records
    assert ("no compiler" if what == "raises" else "results are wrong") in warning.message
    with pytest.raises(ValueError, match="backend triton does not work here"):
        backend.select("triton")
