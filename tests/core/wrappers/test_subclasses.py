"""Subclasses of layers: adapted where they compute what they did with W' for W, else refused."""

import ast
import copy
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from dora_mm import DoRASpec, adapter_parameters, inject, merge, remove, unmerge
from dora_mm.core.wrappers.subclasses import CALLS_SUPER
from tests.shared import reference

bart = pytest.importorskip("transformers.models.bart.modeling_bart")
falcon = pytest.importorskip("transformers.models.falcon.modeling_falcon")
gemma3 = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
timm_linear = pytest.importorskip("timm.layers.linear")


class Renamed(nn.Linear):
    pass


class RenamedEmbedding(nn.Embedding):
    pass


KINDS = {
    "renamed": lambda: Renamed(16, 12),
    "renamed embedding": lambda: RenamedEmbedding(20, 12),
    "falcon": lambda: falcon.FalconLinear(16, 12),
    "falcon without bias": lambda: falcon.FalconLinear(16, 12, bias=False),
    "bart": lambda: bart.BartScaledWordEmbedding(20, 12, 1, embed_scale=3.5),
    "gemma3": lambda: gemma3.Gemma3TextScaledWordEmbedding(20, 12, 0, embed_scale=3.5),
    "timm": lambda: timm_linear.Linear(16, 12),
}
KIND = pytest.mark.parametrize("kind", KINDS)
METHOD = pytest.mark.parametrize("method", ["dora", "lora"])


def base_and_adapted(kind, dtype=torch.float32, method="dora"):
    base = KINDS[kind]().to(dtype)
    model = nn.Sequential(copy.deepcopy(base))
    inject(model, ["0"], DoRASpec(rank=4, method=method))
    return base, model


def base_and_trained(kind, **settings):
    base, model = base_and_adapted(kind, **settings)
    reference.randomize(model[0], size=0.2)
    return base, model


def draw(layer, tokens=6, dtype=torch.float32):
    if isinstance(layer, nn.Embedding):
        return torch.randint(2, layer.num_embeddings, (2, tokens))  # without padding, which trains B but not A
    return torch.randn(2, tokens, layer.in_features).to(dtype)


def with_weight(base, W, x):
    """What the base class computes with another weight (O, I)."""
    own = {"weight": W.t() if isinstance(base, nn.Embedding) else W}
    return functional_call(base, own, (x.to(W) if x.is_floating_point() else x,))


def replaced(base, layer):
    """The base layer and W', in the layer's dtype and in float64."""
    W0 = base.weight.t() if isinstance(base, nn.Embedding) else None
    bases = (base, reference.doubled(base))
    return [(each, reference.weight_of(layer, W0, dtype=each.weight.dtype)) for each in bases]


@KIND
@METHOD
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tokens", [2, 1500])  # either form
def test_a_fresh_adapter_changes_no_bit(kind, method, dtype, autocast, tokens):
    base, model = base_and_adapted(kind, dtype, method)
    x = draw(base, tokens, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, expected = model(x), base(x)
    assert y.dtype == expected.dtype
    assert torch.equal(y, expected)


@KIND
@METHOD
@pytest.mark.parametrize("tokens", [2, 1500])
def test_a_trained_adapter_replaces_the_weight(kind, method, tokens):
    base, model = base_and_trained(kind, method=method)
    x = draw(base, tokens)
    reference.check_error(model(x), *(with_weight(*expected, x) for expected in replaced(base, model[0])))


@KIND
@METHOD
def test_gradients_are_those_of_the_replaced_weight(kind, method):
    base, model = base_and_trained(kind, method=method)
    x = draw(base)
    parameters = list(adapter_parameters(model).values())
    y, expected = model(x), [with_weight(*each, x) for each in replaced(base, model[0])]
    dY = torch.randn_like(y)
    reference.check_errors(
        *(reference.numbered(torch.autograd.grad(of, parameters, dY.to(of))) for of in (y, *expected))
    )


@KIND
def test_merged_and_unmerged(kind):
    base, model = base_and_trained(kind)
    x = draw(base)
    expected, exact = model(x), with_weight(*replaced(base, model[0])[1], x)
    merge(model)
    reference.check_error(model(x), expected, exact)
    unmerge(model)
    assert torch.equal(model[0].weight, base.weight)
    assert torch.equal(model(x), expected)


@KIND
def test_remove_restores_the_class(kind):
    base, model = base_and_trained(kind)
    x = draw(base)
    remove(model)
    assert type(model[0]) is type(base)
    assert model[0].weight.requires_grad
    assert torch.equal(model(x), base(x))
    assert vars(model[0]).keys() == vars(base).keys()


@KIND
def test_copies_are_independent(kind):
    base, model = base_and_trained(kind)
    x = draw(base)
    expected = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        twin[0].lora_B.add_(1)
    assert not torch.equal(twin(x), expected)
    assert torch.equal(model(x), expected)
    assert isinstance(twin[0], type(base))


@KIND
def test_outputs_agree_with_peft(kind):
    peft = pytest.importorskip("peft")
    base, model = base_and_trained(kind, method="lora")
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"])
    theirs = peft.inject_adapter_in_model(config, nn.Sequential(copy.deepcopy(base)))
    with torch.no_grad():
        for name, wanted in adapter_parameters(model).items():
            name = name.removeprefix("0.")
            if isinstance(base, nn.Embedding):
                own = getattr(theirs[0], name.replace("lora", "lora_embedding"))["default"]
            else:
                own = getattr(theirs[0], name)["default"].weight
            own.copy_(wanted)
    x = draw(base)
    exact = reference.doubled(theirs)(x.double() if x.is_floating_point() else x)
    reference.check_error(model(x), theirs(x), exact)


def test_a_convolution_that_pads_its_input():
    module = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_qwenimage")
    base, x = module.QwenImageCausalConv3d(4, 6, 3, padding=1), torch.randn(2, 4, 3, 5, 5)
    model = nn.Sequential(copy.deepcopy(base))
    inject(model, ["0"], DoRASpec(rank=4))
    assert torch.equal(model(x), base(x))
    reference.randomize(model[0], size=0.2)
    reference.check_error(model(x), *(with_weight(*expected, x) for expected in replaced(base, model[0])))


# --- the table of classes ---


def forwards(package):
    """`forward` of each class of the table that the installed version of a package has."""
    names = [start + ending for ending, starts in CALLS_SUPER[package].items() for start in starts.split()]
    pattern = re.compile(rf"^class (?:{'|'.join(names)})\(.*\n(?:[ \n].*\n?)*", re.MULTILINE)
    folder = Path(importlib.util.find_spec(package).submodule_search_locations[0], "models")
    files = [path for path in folder.rglob("*.py") if not path.name.startswith("modular_")]  # of which copies are made
    classes = [text for path in files for text in pattern.findall(path.read_text(encoding="utf-8"))]
    functions = [function for text in classes for function in ast.walk(ast.parse(text))]
    return [ast.unparse(f) for f in functions if isinstance(f, ast.FunctionDef) and f.name == "forward"]


@pytest.mark.parametrize(("package", "least"), [("transformers", 51), ("diffusers", 8)])
def test_classes_of_the_table_read_their_weight_only_through_super(package, least):
    pytest.importorskip(package)
    found = forwards(package)
    assert len(found) >= least
    for text in found:
        assert "super().forward(" in text
        assert re.search(r"self\.weight(?!\.(device|dtype))", text) is None, text


# --- what may compute something else ---


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class RoundedWeight(nn.Embedding):
    def forward(self, input):
        return F.embedding(input, self.weight.round())


class StandardizedConv(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean(), bias)


class FalconLinear(nn.Linear):  # of another package
    def forward(self, input):
        return F.linear(input, self.weight) ** 2


class ReturnsTwo(nn.Linear):
    def forward(self, input):
        return super().forward(input), input


class Ovis2VisualEmbeddingTable(nn.Embedding):
    """As in transformers: it multiplies by its weight where it is not given indices."""

    def forward(self, input):
        return super().forward(input) if input.dtype == torch.int64 else input @ self.weight


Ovis2VisualEmbeddingTable.__module__ = "transformers.models.ovis2.modeling_ovis2"


OTHERS = (Doubled, RoundedWeight, StandardizedConv, FalconLinear, ReturnsTwo, Ovis2VisualEmbeddingTable)


@pytest.mark.parametrize("kind", OTHERS)
def test_another_class_with_a_forward_of_its_own_is_refused(kind):
    layer = kind(3, 4, 3) if issubclass(kind, nn.Conv2d) else kind(8, 6)
    model = nn.Sequential(nn.Linear(16, 16), layer)
    known = kind.__mro__[1].__name__
    with pytest.raises(ValueError, match=rf"\b1\b.*{kind.__name__}.*: it is a {known} with a forward of its own"):
        inject(model, ["0", "1"], DoRASpec(rank=4))
    assert type(model[0]) is nn.Linear
    assert type(model[1]) is kind


class Assigned(nn.Linear):
    forward = nn.Linear.forward


def test_a_forward_that_is_assigned_is_that_of_the_known_class():
    model, x = nn.Sequential(Assigned(16, 12)), torch.randn(5, 16)
    before = model(x)
    inject(model, ["0"], DoRASpec(rank=4), backend="torch")
    assert torch.equal(model(x), before)
    reference.randomize(model[0])
    assert not torch.allclose(model(x), before)
