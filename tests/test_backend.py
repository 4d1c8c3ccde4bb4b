"""Which implementation is chosen, and what happens where Triton does not work."""

import logging

import pytest
import torch
from torch import nn

import dora_mm
from dora_mm import DoRASpec, backend
from dora_mm.core import TORCH


@pytest.fixture(autouse=True)
def uncached(monkeypatch):
    monkeypatch.setattr(backend, "CHOSEN", dict(backend.CHOSEN))
    for cached in (backend._enter_triton, backend.load_triton):
        cached.cache_clear()
    yield
    for cached in (backend._enter_triton, backend.load_triton):
        cached.cache_clear()


def test_names():
    assert backend.select("torch") is TORCH
    with pytest.raises(ValueError, match=r"'cuda': use auto, torch, triton"):
        backend.select("cuda")


def test_a_cpu_runs_plain_torch_which_is_expected(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.INFO, "dora_mm"):
        dora_mm.inject(nn.Sequential(nn.Linear(8, 6)), ["0"], DoRASpec(2))
    assert backend.CHOSEN == {False: TORCH, True: TORCH}
    assert caplog.messages == []


def test_the_choice_compiles_without_graph_breaks():
    net = nn.Sequential(nn.Linear(8, 6))
    dora_mm.inject(net, ["0"], DoRASpec(2))
    x = torch.randn(3, 8)
    torch.testing.assert_close(torch.compile(net, backend="aot_eager", fullgraph=True)(x), net(x))


def test_triton_by_name():
    pytest.importorskip("triton")
    net = nn.Sequential(nn.Linear(8, 6))
    report = dora_mm.inject(net, ["0"], DoRASpec(2), backend="triton")
    assert report.num_modules == 1
    expected = nn.functional.linear(x := torch.randn(3, 8), net[0].weight, net[0].bias)
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_triton_is_tried_whatever_the_mode(mode):
    pytest.importorskip("triton")
    with mode():
        assert backend.load_triton()[1] == ""


def test_a_working_triton_is_taken_for_layers_on_a_gpu(caplog):
    triton = pytest.importorskip("dora_mm.kernels.dora_linear")
    with caplog.at_level(logging.INFO, "dora_mm"):
        backend._enter_triton()
    assert backend.CHOSEN == {False: TORCH, True: triton.TRITON}
    assert not [record for record in caplog.records if record.name == "dora_mm.backend"]


def test_what_runs_has_a_name(monkeypatch):
    triton = pytest.importorskip("triton")
    assert backend.implementation("torch") == "torch"
    assert backend.implementation("triton") == f"triton {triton.__version__}"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.implementation("auto") == "torch"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backend.implementation("auto") == f"triton {triton.__version__}"
    backend.CHOSEN[True] = TORCH  # as where the trial failed
    assert backend.implementation("auto") == "torch"


def test_an_old_gpu_runs_plain_torch_and_logs_why(monkeypatch, caplog):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with caplog.at_level(logging.INFO, "dora_mm"):
        backend._enter_triton()
    assert backend.CHOSEN[True] is TORCH
    (warning,) = caplog.records
    assert "it needs compute capability 8.0, and Tesla T4 has 7.5" in warning.message


@pytest.mark.parametrize("fault", ["raises", "is wrong", "is wrong in half precision"])
def test_a_broken_triton_falls_back_with_one_warning(monkeypatch, caplog, fault):
    triton = pytest.importorskip("dora_mm.kernels.dora_linear")

    def broken(*args, **options):
        if fault == "raises":
            raise RuntimeError("no compiler\nand more")
        y = TORCH(*args, **options)
        return y if fault == "is wrong in half precision" and y.dtype == torch.float32 else 1.1 * y

    monkeypatch.setattr(triton, "TRITON", broken)
    with caplog.at_level(logging.INFO, "dora_mm"):
        for _ in range(2):
            backend._enter_triton()
    assert backend.CHOSEN[True] is TORCH
    (warning,) = caplog.records
    assert ("no compiler" if fault == "raises" else "results are wrong") in warning.message
    with pytest.raises(ValueError, match="backend triton does not work here"):
        backend.select("triton")
