"""Subclasses of Linear and Embedding: adapted where they compute what they did with W' for W, else refused."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from dora_mm import DoRASpec, adapter_parameters, inject, merge, remove, unmerge
from tests.core import reference

bart = pytest.importorskip("transformers.models.bart.modeling_bart")
falcon = pytest.importorskip("transformers.models.falcon.modeling_falcon")
gemma3 = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")


class Renamed(nn.Linear):
    pass


class RenamedEmbedding(nn.Embedding):
    pass


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


KINDS = {
    "renamed": lambda: Renamed(16, 12),
    "renamed embedding": lambda: RenamedEmbedding(20, 12),
    "doubled": lambda: Doubled(16, 12),
    "falcon": lambda: falcon.FalconLinear(16, 12),
    "falcon without bias": lambda: falcon.FalconLinear(16, 12, bias=False),
    "bart": lambda: bart.BartScaledWordEmbedding(20, 12, 1, embed_scale=3.5),
    "gemma3": lambda: gemma3.Gemma3TextScaledWordEmbedding(20, 12, 0, embed_scale=3.5),
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
    own = {"weight": (W.t() if isinstance(base, nn.Embedding) else W).to(base.weight.dtype)}
    return functional_call(base, own, (x,))


def adapted_weight(base, layer):
    return reference.weight_of(layer, base.weight.t() if isinstance(base, nn.Embedding) else None)


@KIND
@METHOD
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [2, 1500])  # either form
def test_a_fresh_adapter_changes_no_bit(kind, method, dtype, tokens):
    base, model = base_and_adapted(kind, dtype, method)
    x = draw(base, tokens, dtype)
    y = model(x)
    assert y.dtype == dtype
    assert torch.equal(y, base(x))


@KIND
@METHOD
@pytest.mark.parametrize("tokens", [2, 1500])
def test_a_trained_adapter_replaces_the_weight(kind, method, tokens):
    base, model = base_and_trained(kind, method=method)
    x = draw(base, tokens)
    assert reference.relative_error(model(x), with_weight(base, adapted_weight(base, model[0]), x)) < 1e-6


@KIND
@METHOD
def test_gradients_are_those_of_the_replaced_weight(kind, method):
    base, model = base_and_trained(kind, method=method)
    x = draw(base)
    parameters = list(adapter_parameters(model).values())
    y, expected = model(x), with_weight(base, adapted_weight(base, model[0]), x)
    dY = torch.randn_like(y)
    found = torch.autograd.grad(y, parameters, dY)
    for a, b in zip(found, torch.autograd.grad(expected, parameters, dY), strict=True):
        assert reference.relative_error(a, b) < 1e-5


@KIND
def test_merged_and_unmerged(kind):
    base, model = base_and_trained(kind)
    x = draw(base)
    expected = model(x)
    merge(model)
    assert reference.relative_error(model(x), expected) < 1e-6
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


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "doubled"])  # PEFT does not double the update
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
    assert reference.relative_error(model(x), theirs(x)) < 1e-6


# --- what computes something else ---


class Squared(nn.Linear):
    def forward(self, input):
        return F.linear(input, self.weight) ** 2


class Shifted(nn.Linear):
    def forward(self, input):
        return super().forward(input + 1)


class Normalized(nn.Linear):
    def forward(self, input):
        return F.linear(input, F.normalize(self.weight), self.bias)


class Masked(nn.Linear):
    def forward(self, input):
        return F.linear(input, self.weight.tril(), self.bias)


class TwiceUsed(nn.Linear):
    def forward(self, input):
        return super().forward(input) + input @ self.weight.T


class ScaledByItsWeight(nn.Linear):
    def forward(self, input):
        return super().forward(input) / self.weight.norm()


class OnlyInTraining(nn.Linear):
    def forward(self, input):
        return super().forward(input) if self.training else F.linear(input, self.weight.relu(), self.bias)


class RoundedWeight(nn.Embedding):
    def forward(self, input):
        return F.embedding(input, self.weight.round())


@pytest.mark.parametrize("kind", [Squared, Normalized, Masked, RoundedWeight])
def test_a_subclass_that_computes_something_else_is_refused(kind):
    model = nn.Sequential(nn.Linear(16, 16), kind(16, 16))
    with pytest.raises(ValueError, match=rf"\b1\b.*{kind.__name__}"):
        inject(model, ["0", "1"], DoRASpec(rank=4))
    assert type(model[0]) is nn.Linear
    assert type(model[1]) is kind


@pytest.mark.parametrize("kind", [Squared, Shifted, Normalized, Masked, TwiceUsed, ScaledByItsWeight, OnlyInTraining])
@pytest.mark.parametrize("training", [True, False])
def test_a_subclass_is_adapted_rightly_or_refused(kind, training):
    base = kind(16, 16)
    model = nn.Sequential(copy.deepcopy(base))
    try:
        inject(model, ["0"], DoRASpec(rank=4))
    except ValueError:
        return
    reference.randomize(model[0], size=0.2)
    model.train(training)
    base.train(training)
    x = torch.randn(5, 16)
    assert reference.relative_error(model(x), with_weight(base, reference.weight_of(model[0]), x)) < 1e-6


class Assigned(nn.Linear):
    forward = nn.Linear.forward


def test_a_forward_that_is_assigned_is_that_of_the_known_class():
    model, x = nn.Sequential(Assigned(16, 12)), torch.randn(5, 16)
    before = model(x)
    inject(model, ["0"], DoRASpec(rank=4), backend="torch")
    assert torch.equal(model(x), before)
    reference.randomize(model[0])
    assert not torch.allclose(model(x), before)


class ConvNorm(nn.Conv2d):
    def __init__(self, *args):
        super().__init__(*args)
        self.norm = nn.BatchNorm2d(self.out_channels)

    def forward(self, input):
        return self.norm(super().forward(input))


def test_a_trial_leaves_no_trace():
    model, x = nn.Sequential(ConvNorm(3, 4, 3)), torch.randn(2, 3, 8, 8)
    model(x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="matches no module"):
        inject(model, ["nothing"], DoRASpec(rank=2))
    inject(model, ["0"], DoRASpec(rank=2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert model.training
    assert model[0].norm.training


class StandardizedConv(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean(), bias)


class KeepsItsWeight(nn.Linear):
    turned: torch.Tensor | None = None

    def forward(self, input):
        if self.turned is None:
            self.turned = self.weight.detach().t().clone()
        return input @ self.turned + self.bias


@pytest.mark.parametrize("layer", [StandardizedConv(3, 4, 3), KeepsItsWeight(8, 6)])
def test_a_layer_that_uses_its_weight_elsewhere_is_refused(layer):
    with pytest.raises(ValueError, match=type(layer).__name__):
        inject(nn.Sequential(layer), ["0"], DoRASpec(rank=2))


class NamedInput(nn.Linear):
    def forward(self, hidden):
        return hidden @ self.weight.T + self.bias


def test_a_forward_that_would_be_replaced_must_take_the_same_arguments():
    with pytest.raises(ValueError, match="NamedInput"):
        inject(nn.Sequential(NamedInput(8, 6)), ["0"], DoRASpec(rank=2))
