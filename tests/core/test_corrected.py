"""bf16 on a CPU: the update is added to the product before it is rounded, in either form."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dora_mm.core import DoRASpec, adapt_layer, corrected, fused
from dora_mm.core import functional as dora
from dora_mm.core.corrected import CORRECTED
from tests.core import reference
from tests.core.reference import make

pytestmark = pytest.mark.skipif(
    not corrected.is_added_before_rounding(), reason="this processor's oneDNN has no bf16 products"
)
UNIT = 2.0**-8


@pytest.fixture(params=["split", "merged"], autouse=True)
def form(request, monkeypatch):
    monkeypatch.setattr(fused, "stays_split", lambda *_: request.param == "split")
    return request.param


def bf16(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def share(y, x, W0, W):
    """How much of the update x (W - W0)^T is in y."""
    base, update = x.double() @ W0.double().T, x.double() @ (W - W0.double()).T
    return (((y.double() - base) * update).sum() / update.square().sum()).item()


@pytest.mark.parametrize("kind", ["dora", "lora", "magnitude"])
@pytest.mark.parametrize("autocast", [False, True])
def test_small_updates_survive(kind, autocast):
    """An update of 4e-4 of the weight, over four million outputs and without a bias."""
    W0, adapter = make(1024, 256, 16, dtype=torch.float32, scaling=1.0, size=1e-4)
    W0 = W0.bfloat16().float() if autocast else W0.bfloat16()
    adapter = dict(reference.variants(adapter._replace(magnitude=dora.row_norm(W0) * (1 + 4e-4))))[kind]
    x = bf16(4096, 256, seed=1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = fused.adapted_product(x, W0, None, [adapter])
    assert y.dtype == torch.bfloat16
    assert abs(share(y, x, W0, reference.merged_weight(W0, adapter)) - 1) <= 0.01


@pytest.mark.parametrize("scale", [1e-3, 1.0])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients(scale, bias):
    W0, adapter = make(48, 64, 4, dtype=torch.float32, size=0.05 * scale)
    with torch.no_grad():
        adapter.magnitude.copy_(W0.norm(dim=1) * (1 + 0.05 * scale * torch.randn(48)))
    W0, x, dY = W0.bfloat16(), bf16(5, 40, 64).requires_grad_(), bf16(5, 40, 48, seed=2)
    b = bf16(48, seed=3) if bias else None
    y = fused.adapted_product(x, W0, b, [adapter])
    exact_x = x.detach().double().requires_grad_()
    exact = F.linear(exact_x, reference.merged_weight(W0, adapter), None if b is None else b.double())
    assert y.shape == (5, 40, 48)
    assert reference.relative_error(y, exact) < UNIT / 2
    wanted = (adapter.A, adapter.B, adapter.magnitude)
    found = torch.autograd.grad(y, (x, *wanted), dY)
    for ours, right in zip(found, torch.autograd.grad(exact, (exact_x, *wanted), dY.double()), strict=True):
        assert reference.relative_error(ours, right) < UNIT


def cancelling(kind):
    """(W0, adapters) whose correction is as large as the product, or larger."""
    W0, adapter = make(32, 64, 4, dtype=torch.float32, size=0.02)
    norm = W0.norm(dim=1)
    if kind == "strength":
        return W0, [adapter._replace(magnitude=0.8 * norm, strength=4.0)]
    if kind == "many":
        return W0, 4 * [adapter._replace(A=None, B=None, magnitude=0.76 * norm)]
    lora = adapter._replace(B=10 * adapter.B.detach(), magnitude=None)
    return W0, [lora, lora._replace(strength=-1.0)] if kind == "opposite" else [lora]


@pytest.mark.parametrize("kind", ["strength", "many", "opposite", "large"])
def test_large_corrections(kind):
    """They run in the merged form: as a correction c they would be rounded in addition to y."""
    W0, adapters = cancelling(kind)
    W0, x = W0.bfloat16(), bf16(200, 64)
    W = W0.double() + sum(reference.merged_weight(W0, adapter) - W0.double() for adapter in adapters)
    y = fused.adapted_product(x, W0, None, adapters)
    assert reference.relative_error(y, x.double() @ W.T) < UNIT / 2


def test_opposite_branches_leave_nothing(monkeypatch):
    """They are added before they are rounded, whichever form is chosen."""
    monkeypatch.setattr(fused, "changes_little", lambda *_: True)
    W0, adapters = cancelling("opposite")
    W0, x = W0.bfloat16(), bf16(200, 64)
    y = fused.adapted_product(x, W0, None, adapters)
    assert reference.relative_error(y, x.double() @ W0.double().T) < UNIT / 2


def test_magnitudes_far_from_the_norm(form):
    """Their correction is as large as the product: they run in the merged form."""
    W0, adapter = make(32, 64, 4, dtype=torch.float32)
    with torch.no_grad():
        adapter.magnitude[:4] *= torch.tensor([0.0, -1.0, 3.0, 1e-3])
    W0, x = W0.bfloat16(), bf16(100, 64)
    y = fused.adapted_product(x, W0, None, [adapter])
    exact = x.double() @ reference.merged_weight(W0, adapter).T
    assert torch.equal(y[:, 0], torch.zeros_like(y[:, 0]))
    for row in range(5):
        assert reference.relative_error(y[:, row], exact[:, row]) < UNIT / 2 or row == 0


def test_layouts():
    """Views of wider rows, transposed weights, biases with gaps, no tokens: oneDNN misreads some of them."""
    W0, adapter = make(24, 40, 3, dtype=torch.float32, size=0.02)
    with torch.no_grad():
        adapter.magnitude.copy_(W0.norm(dim=1) * 1.05)
    W0, x = W0.bfloat16(), bf16(30, 40)
    wide = torch.zeros(24, 80, dtype=torch.bfloat16)
    wide[:, 40:] = W0
    expected = fused.adapted_product(x, W0, None, [adapter])
    for weight in (wide[:, 40:], W0.T.contiguous().T):
        assert torch.equal(fused.adapted_product(x, weight, None, [adapter]), expected)
    assert torch.equal(fused.adapted_product(x.T.contiguous().T, W0, None, [adapter]), expected)
    for bias in (bf16(48)[::2], bf16(1).expand(24)):
        found = fused.adapted_product(x, W0, bias, [adapter])
        assert torch.equal(found, fused.adapted_product(x, W0, bias.clone(), [adapter]))
        assert reference.relative_error(found, expected.double() + bias.double()) < 2 * UNIT
    assert fused.adapted_product(x[:0], W0, None, [adapter]).shape == (0, 24)


def test_several_adapters():
    W0, one = make(24, 40, 3, dtype=torch.float32, size=0.05)
    _, two = make(24, 40, 2, dtype=torch.float32, size=0.05, seed=1, strength=-0.5)
    adapters = [a._replace(magnitude=W0.norm(dim=1) * 1.02) for a in (one, two)] + [one._replace(magnitude=None)]
    W0, x = W0.bfloat16(), bf16(30, 40)
    exact = W0.double() + sum(reference.merged_weight(W0, adapter) - W0.double() for adapter in adapters)
    y = fused.adapted_product(x, W0, None, adapters)
    assert reference.relative_error(y, x.double() @ exact.T) < UNIT / 2


def test_which_form_ran(form, monkeypatch):
    """The fixture decides the form for the small changes of the other tests."""
    ran = []
    for name in ("split", "concatenated"):
        real = getattr(CORRECTED, name)
        monkeypatch.setattr(type(CORRECTED), name, lambda self, *a, n=name, real=real: ran.append(n) or real(*a))
    W0, adapter = make(24, 40, 3, dtype=torch.float32, size=0.02)
    adapter = adapter._replace(magnitude=W0.norm(dim=1) * 1.05)
    fused.adapted_product(bf16(30, 40), W0.bfloat16(), None, [adapter])
    assert ran == ["split" if form == "split" else "concatenated"]


def test_nothing_of_the_size_of_the_weight_is_kept(form):
    layer = adapt_layer(nn.Linear(256, 256).bfloat16(), DoRASpec(4), path="layer")
    reference.randomize(layer, size=0.01)
    with torch.no_grad():
        layer.magnitude.copy_(layer.weight.float().norm(dim=1) * 1.1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(bf16(16, 256))
    large = [t for t in kept if t.numel() == 256 * 256 and t is not layer.weight]
    assert len(large) == (1 if form == "merged" else 0)  # W(t), rounded, for dX


def test_only_bf16_linear_layers_on_a_processor():
    x = bf16(3, 4)
    assert corrected.can_correct(x, torch.bfloat16, fused.LINEAR)
    assert not corrected.can_correct(x.half(), torch.float16, fused.LINEAR)
    assert not corrected.can_correct(x.to("meta"), torch.bfloat16, fused.LINEAR)
    assert not corrected.can_correct(x, torch.bfloat16, CORRECTED)


def test_the_trial_runs_on_the_processor():
    corrected.is_added_before_rounding.cache_clear()
    with torch.device("meta"):
        assert corrected.is_added_before_rounding()
