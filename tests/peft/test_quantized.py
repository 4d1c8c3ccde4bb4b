"""Layers that bitsandbytes and torchao have quantised, as PEFT computes them; `make test-slow` installs both."""

import copy

import peft
import pytest
import torch
from torch import nn

import dora_mm
from dora_mm.core.wrappers.quantized import dequantized
from dora_mm.peft import fixed_norms, layers
from tests.peft.models import computed, train
from tests.peft.test_formula import Mask
from tests.shared.quantized import int8, nf4, torchao_int8
from tests.shared.reference import relative_error

pytestmark = pytest.mark.slow
KINDS = {"nf4": nf4, "int8": int8, "torchao int8": torchao_int8}


class Net(nn.Module):
    """A model that says of itself, as transformers does, that it is quantised."""

    def __init__(self, layer, kind):
        super().__init__()
        self.layer = layer
        self.is_loaded_in_4bit, self.is_loaded_in_8bit = kind == "nf4", kind == "int8"
        self.config = {"tie_word_embeddings": False}

    def forward(self, x):
        return self.layer(x)


def adapted(kind, **settings):
    """A quantised model with two adapters, and PEFT's over a dense layer with the same weight."""
    torch.manual_seed(0)
    layer = KINDS[kind](nn.Linear(64, 48)).requires_grad_(False)
    layer(torch.zeros(1, 64))  # bitsandbytes moves the scales of 8 bits in the first pass
    dense = nn.Linear(64, 48).requires_grad_(False)
    dense.weight.data, dense.bias.data = dequantized(layer).float(), layer.bias.data.clone()
    models = []
    for base in (layer, dense):
        config = peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["layer"], **settings)
        model = peft.get_peft_model(Net(base, kind if base is layer else ""), config, adapter_name="0")
        model.add_adapter("1", config)
        models.append(model)
    if kind == "int8":  # on a CPU, the norms of a fresh adapter of PEFT lose the scales
        layer.weight.CB = layer.weight.SCB = None
    models[1].load_state_dict({k: v for k, v in models[0].state_dict().items() if "lora" in k}, strict=False)
    for model in models:
        train(model)
    return models


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("adapters", [["0"], ["1", "0"]])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients(kind, adapters, autocast, monkeypatch):
    (model, dense), passes = adapted(kind), []
    for m in (model, dense):
        m.base_model.set_adapter(adapters)
    x = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    theirs, exact = (
        computed(dense, x, autocast),
        computed(copy.deepcopy(dense).double(), x.detach().double().requires_grad_()),
    )
    apply = layers.Scaled.apply
    monkeypatch.setattr(layers.Scaled, "apply", lambda *given: (passes.append(given), apply(*given))[1])
    assert len(dora_mm.fuse_peft(model).fused) == 2
    for _ in range(2):
        for ours, own, right in zip(computed(model, x, autocast), theirs, exact, strict=True):
            assert relative_error(ours, right) <= 2 * relative_error(own, right) + 2e-3
    ours = computed(model, x, autocast)
    with fixed_norms(model):
        assert all(map(torch.equal, computed(model, x, autocast), ours))
    assert len(passes) == 4 * len(adapters)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("adapters", [["0"], ["1", "0"]])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout(kind, adapters, autocast):
    model, dense = adapted(kind, lora_dropout=0.3)
    for m in (model, dense):
        m.base_model.set_adapter(adapters)
        for name in adapters:
            m.base_model.model.layer.lora_dropout[name] = Mask()
    x = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    theirs = computed(dense, x, autocast)
    exact = computed(copy.deepcopy(dense).double(), x.detach().double().requires_grad_())
    assert len(dora_mm.fuse_peft(model).with_dropout) == 2
    for ours, own, right in zip(computed(model, x, autocast), theirs, exact, strict=True):
        assert relative_error(ours, right) <= 2 * relative_error(own, right) + 2e-3


@pytest.mark.parametrize("kind", KINDS)
def test_inference(kind):
    model, dense = adapted(kind)
    dora_mm.fuse_peft(model)
    if kind == "nf4":  # bitsandbytes repacks weights for its own kernel, which takes no layer of 48 rows
        model.base_model.model.layer.base_layer.support_avx512bf16_for_cpu = False
    x = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        for m in (model, dense):
            m.base_model.set_adapter(["0", "1"])
        with torch.no_grad():
            bound = 1e-2 if kind == "int8" else 2e-3  # 8 bits of bitsandbytes round inputs, too
            assert relative_error(model.eval()(x), dense.eval()(x)) < bound
        train(model, seed=5)
        train(dense, seed=5)


@pytest.mark.parametrize("adapters", [["0"], ["1", "0"]])
@pytest.mark.parametrize("kind", ["nf4", "torchao int8"])
def test_dtypes_under_autocast_are_pefts(kind, adapters):
    model, _ = adapted(kind)
    model.base_model.set_adapter(adapters)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    theirs = computed(model, x, autocast=True)
    dora_mm.fuse_peft(model)
    assert [t.dtype for t in computed(model, x, autocast=True)] == [t.dtype for t in theirs]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_model_prepared_for_training_in_few_bits(kind):
    model, dense = adapted(kind)
    peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    for m in (model, dense):
        m.base_model.set_adapter(["0"])
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    dora_mm.fuse_peft(model)
    for found, own in zip(computed(model, x), computed(dense, x), strict=True):
        assert relative_error(found, own) < 2e-3


def test_merging_is_pefts():
    ours, _ = adapted("nf4")
    theirs = copy.deepcopy(ours)
    dora_mm.fuse_peft(ours)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    for model in (ours, theirs):
        model.base_model.set_adapter(["0"])
        model.merge_adapter()
    assert torch.equal(ours(x), theirs(x))
