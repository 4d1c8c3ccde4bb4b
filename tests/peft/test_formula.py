"""A fused pass agrees with the formula in float64 at least as well as PEFT's own does."""

import copy
import csv
import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dora_mm import backend, fuse_peft
from dora_mm.core.functional import Adapter, row_gains
from dora_mm.peft import fixed_norms, layers
from dora_mm.peft.formula import row_norms
from tests.benchmarks.timing import saved_bytes
from tests.peft.models import KINDS, adapted, assert_as_exact, computed, example, fused
from tests.shared.reference import relative_error

CROSSING = layers.crossing  # the fixture of this folder replaces it
DTYPES = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16, "upcast": False},
    "bfloat16, adapters in float32": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients(kind, dtype):
    """With autocast or not, one adapter or two, with checkpointing or not."""
    x = example(kind, DTYPES[dtype].get("dtype", torch.float32))
    for adapters in (1, 2):
        theirs = adapted(kind, adapters, **DTYPES[dtype])
        ours = fused(theirs)
        exact = computed(copy.deepcopy(theirs).double(), x.detach().double().requires_grad_() if x.requires_grad else x)
        for autocast, recomputed in itertools.product((False, True), repeat=2):
            run = partial(checkpoint, ours, use_reentrant=False) if recomputed else None
            assert_as_exact(computed(ours, x, autocast, run), computed(theirs, x, autocast), exact)


class Mask(nn.Module):
    """Dropout that drops the same entries in each pass and dtype."""

    def forward(self, x):
        kept = torch.rand(x.shape, generator=torch.Generator().manual_seed(7)) > 0.3
        return x * kept.to(x.dtype) / 0.7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "Embedding"])
def test_outputs_and_gradients_with_dropout(kind, dtype):
    """Not of embeddings, where PEFT leaves dropout out, nor where its own convolutions multiply bfloat16 by float32."""
    x = example(kind, DTYPES[dtype].get("dtype", torch.float32))
    for adapters in (1, 2):
        theirs = adapted(kind, adapters, lora_dropout=0.3, **DTYPES[dtype])
        for number in range(adapters):
            theirs.base_model.model.layer.lora_dropout[str(number)] = Mask()
        ours = fused(theirs)
        exact = computed(copy.deepcopy(theirs).double(), x.detach().double().requires_grad_())
        for autocast in (False, True):
            if autocast or dtype != "bfloat16, adapters in float32" or kind[:4] != "Conv" or kind == "Conv1D":
                assert_as_exact(computed(ours, x, autocast), computed(theirs, x, autocast), exact)


def test_dropout_drops_what_peft_drops():
    theirs, x = adapted("Linear", 2, lora_dropout=0.4), example("Linear")
    ours, found = fused(theirs), []
    for model in (theirs, ours):
        torch.manual_seed(3)
        found.append(computed(model, x))
    assert max(map(relative_error, *found)) < 1e-6


def test_norms_are_kept_with_dropout_and_a_bias_that_is_trained():
    theirs, x = adapted("Linear", bias="all", lora_dropout=0.3), example("Linear")
    theirs.base_model.model.layer.lora_dropout["0"] = Mask()
    ours = fused(theirs)
    exact = computed(copy.deepcopy(theirs).double(), x.detach().double().requires_grad_())
    with fixed_norms(ours):
        for _ in range(2):
            assert_as_exact(computed(ours, x), computed(theirs, x), exact)


@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_reentrant_checkpointing(kind):
    theirs, x = adapted(kind), example(kind)
    for model in (theirs, ours := fused(theirs)):
        checkpoint(model, x, use_reentrant=True).square().sum().backward()
    for own, given in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert not given.requires_grad or relative_error(own.grad, given.grad) < 1e-5


@pytest.mark.parametrize("bias", [1.0, 100.0])
def test_a_large_bias(bias):
    layer, x = nn.Linear(160, 128), example("Linear")
    nn.init.constant_(layer.bias, bias)
    theirs = adapted(layer)
    exact = computed(copy.deepcopy(theirs).double(), x.detach().double().requires_grad_())
    assert_as_exact(computed(fused(theirs), x), computed(theirs, x), exact)


def test_a_bias_that_is_trained():
    theirs, x = adapted("Linear", bias="all"), example("Linear")
    assert any(p.requires_grad for name, p in theirs.named_parameters() if name.endswith("bias"))
    exact = computed(copy.deepcopy(theirs).double(), x.detach().double().requires_grad_())
    assert_as_exact(computed(fused(theirs), x), computed(theirs, x), exact)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("in_triton", [False, True])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Embedding", "Conv2d"])
def test_rows_of_zeros_stay_finite(kind, in_triton, dropout, monkeypatch):
    """Whatever the size of the layer; PEFT's outputs are NaN."""
    monkeypatch.setattr(layers, "crossing", CROSSING)
    if in_triton:
        pytest.importorskip("triton")
        from dora_mm.kernels.dora_linear import TRITON

        monkeypatch.setitem(backend.CHOSEN, False, TRITON)
    layer = KINDS[kind]()
    with torch.no_grad():
        (layer.weight[:, :5] if kind in ("Conv1D", "Embedding") else layer.weight[:5]).zero_()
    theirs = adapted(layer, fan_in_fan_out=kind == "Conv1D", init_lora_weights=True, lora_dropout=dropout)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name or "embedding_A" in name:
            nn.init.zeros_(parameter)
    x = example(kind)
    assert theirs(x).isnan().any()
    ours = fused(theirs)
    assert all(t.isfinite().all() for t in computed(ours, x))
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        ours(x).square().mean().backward()
        optimizer.step()
    assert all(t.isfinite().all() for t in (*computed(ours, x), *ours.parameters()))


def test_norms_of_large_weights_are_those_of_their_blocks(monkeypatch):
    drawn = torch.Generator().manual_seed(0)
    W0, A, B = (torch.randn(size, generator=drawn) for size in ((70, 50), (3, 50), (70, 3)))
    expected = (W0.double() + 2.5 * B.double() @ A.double()).norm(dim=1)
    monkeypatch.setattr("dora_mm.peft.formula.BLOCK", 500)
    for weight in (W0, W0.bfloat16()):
        found = row_norms(weight, A, B, 2.5, False), row_norms(weight.t().contiguous(), A, B, 2.5, True)
        for norm in found:
            assert relative_error(norm, expected) < (3e-3 if weight.dtype == torch.bfloat16 else 3e-7)
        assert relative_error(*found) < 3e-7
    rows = row_gains(W0, Adapter(A, B, torch.ones(70), 2.5))
    assert relative_error(row_norms(W0, A, B, 2.5, False), rows.norm) < 3e-7


def test_it_keeps_one_output_for_the_backward_pass_where_peft_keeps_two():
    """What of PEFT's graph is freed within the pass does not count; whether it did depended on addresses of memory."""
    theirs, x = adapted(nn.Linear(256, 512)), torch.randn(1024, 256, requires_grad=True)
    kept = [saved_bytes(lambda m=m: m(x), m, x) for m in (theirs, fused(theirs))]
    output, small = 4 * 1024 * 512, 4 * 1024 * 8
    assert kept[0] > 2 * output + small
    assert kept[1] < 1.02 * (output + small)


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("kind", ["Linear", "Linear without bias", "Conv1D"])
def test_the_kernels_agree_with_plain_torch(kind, adapters, monkeypatch):
    pytest.importorskip("triton")
    from dora_mm.kernels.dora_linear import TRITON

    theirs, x = adapted(kind, adapters), example(kind)
    ours = fused(theirs)
    plain = computed(ours, x)
    monkeypatch.setitem(backend.CHOSEN, False, TRITON)
    for found, expected in zip(computed(ours, x), plain, strict=True):
        assert relative_error(found, expected) < 2e-6


def test_one_graph_without_breaks():
    ours, x = fused(adapted("Linear")), example("Linear")
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    for found, expected in zip(computed(ours, x, run=compiled), computed(ours, x), strict=True):
        assert relative_error(found, expected) < 1e-6
    with fixed_norms(ours):
        for found, expected in zip(computed(ours, x, run=compiled), computed(ours, x), strict=True):
            assert relative_error(found, expected) < 1e-6
        with torch.no_grad():
            ours.base_model.model.layer.lora_B["0"].weight.mul_(2)  # which a graph cannot see
            assert relative_error(compiled(x), ours(x)) < 1e-6


def test_an_eager_evaluation_leads_to_no_other_graph():
    ours, x, graphs = fused(adapted("Linear")).eval(), example("Linear"), []
    torch.compiler.reset()
    compiled = torch.compile(ours, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    with torch.no_grad():
        compiled(x)
        ours(x)  # keeps its norms
        compiled(x)
    assert len(graphs) == 1


def test_the_gradient_of_a_magnitude_in_float32_is_not_rounded_to_half_precision(monkeypatch):
    pytest.importorskip("triton")
    from dora_mm.kernels.dora_linear import TRITON

    ours = fused(adapted("Linear").half())
    magnitude = ours.base_model.model.layer.lora_magnitude_vector["0"].float().weight
    x = example("Linear").half()
    monkeypatch.setitem(backend.CHOSEN, False, TRITON)
    (dm,) = torch.autograd.grad(ours(x).float().square().sum(), magnitude)
    assert dm.dtype == torch.float32
    assert not torch.equal(dm, dm.half().float())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "autocast"),
    [("Linear", False), ("Linear", True), ("Conv1D", False), ("Embedding", False), ("Conv2d", False)],
)
def test_compiled(kind, autocast):
    theirs, x = adapted(kind), example(kind)
    ours = fused(theirs)
    exact = computed(copy.deepcopy(theirs).double(), x.detach().double().requires_grad_() if x.requires_grad else x)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True)
    assert_as_exact(computed(ours, x, autocast, compiled), computed(theirs, x, autocast), exact)


RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "crossing"


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.csv")), ids=lambda file: file.stem)
def test_above_the_crossing_point_no_machine_was_slower_than_peft(file):
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    for row in rows:
        dtype = torch.float32 if row["dtype"] == "float32" else torch.bfloat16
        if int(row["side"]) ** 2 >= CROSSING(dtype, int(row["tokens"])):
            assert float(row["ratio"]) <= 1.01, row  # repeats differ by as much
    assert len(rows) == 160


def test_small_layers_run_pefts_own_passes_in_training(monkeypatch):
    """Passes that are fused agree with it up to rounding, and not by bits: inside `fixed_norms`, and in inference."""
    monkeypatch.setattr(layers, "crossing", lambda dtype, tokens: 2**14 if tokens < 1000 else 0)
    theirs, few, many = adapted(nn.Linear(64, 64)), torch.randn(3, 64), torch.randn(2000, 64)
    ours = copy.deepcopy(theirs)
    report = fuse_peft(ours)
    assert report.fused == [("base_model.model.layer", "0")]
    assert str(report).startswith(
        "DoRA runs fused in 1 layer (1 layer)\n"
        "  1 layer (1 layer) of these: PEFT's own code runs in training passes of fewer than 1,024 tokens on a CPU"
    )
    assert torch.equal(ours(few), theirs(few))
    assert not torch.equal(ours(many), theirs(many))
    with fixed_norms(ours):
        assert not torch.equal(ours(few), theirs(few))
    with torch.no_grad():
        assert not torch.equal(ours.eval()(few), theirs.eval()(few))
        assert relative_error(ours(few), theirs(few)) < 1e-6
