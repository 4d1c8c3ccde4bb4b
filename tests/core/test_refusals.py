"""What is refused, with a sentence that says why, before anything has changed."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from dora_mm import DoRASpec, core, inject, set_strength
from tests.shared import reference

SPEC = DoRASpec(rank=2)


def snapshot(model):
    """Types, parameters and requires_grad of everything in a model."""
    types = {name: type(module) for name, module in model.named_modules()}
    parameters = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    return types, parameters, {name: set(vars(module)) for name, module in model.named_modules()}


def check_refused(model, targets, match, spec=SPEC):
    before = snapshot(model)
    with pytest.raises(ValueError, match=match) as error:
        inject(model, targets, spec)
    types, parameters, attributes = snapshot(model)
    assert (types, attributes) == (before[0], before[2])
    assert parameters.keys() == before[1].keys()
    for name, (parameter, trainable) in before[1].items():
        assert parameters[name][0] is parameter, name
        assert parameters[name][1] == trainable, name
    return str(error.value)


# --- weights that a hook or a parametrization computes ---

COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": torch.nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old spectral_norm": torch.nn.utils.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3),
}


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("build", [lambda: nn.Linear(6, 6), lambda: nn.Conv2d(6, 6, 3)], ids=["linear", "conv"])
def test_layers_whose_weight_is_computed(kind, build):
    model = nn.Sequential()
    model.add_module("first", build())
    model.add_module("second", COMPUTED[kind](build()))
    message = check_refused(model, ["first", "second"], r"\bsecond\b")
    assert "weight" in message, "it says what is computed in each pass"


def test_after_the_parametrization_is_removed_the_layer_can_be_adapted():
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(6, 6)))
    torch.nn.utils.remove_weight_norm(model[0])
    inject(model, ["0"], SPEC)
    assert model(torch.randn(2, 6)).shape == (2, 6)


# --- arguments ---


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf])
def test_strengths_that_are_not_finite(strength):
    model, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(2, 6)
    inject(model, ["0"], SPEC)
    reference.randomize(model[0])
    before = model(x)
    with pytest.raises(ValueError, match=r"strength.*(nan|inf)"):
        set_strength(model, strength)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank", 0),
        ("rank", 2.5),
        ("rank", True),
        ("rank", "8"),
        ("rank", math.nan),
        ("alpha", "8"),
        ("alpha", 0),
        ("alpha", -2.0),
        ("alpha", math.nan),
        ("alpha", math.inf),
        ("dropout", "0.1"),
        ("dropout", math.nan),
        ("dropout", 1.0),
        ("method", "dorra"),
        ("norm_grad", "no"),
    ],
)
def test_invalid_settings(key, value):
    with pytest.raises(ValueError, match=f"^{key}.*{value}"):
        DoRASpec(**{key: value})


def test_whole_numbers_are_allowed_where_fractions_are():
    assert DoRASpec(rank=2, alpha=8, dropout=0).scaling == 4


@pytest.mark.parametrize("targets", [[], ()])
def test_no_targets(targets):
    check_refused(nn.Sequential(nn.Linear(6, 4)), targets, "targets|patterns?")


@pytest.mark.parametrize("targets", ["0", "linear", "sdxl-unet"])
def test_core_takes_no_name_of_a_map(targets):
    model = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(ValueError, match=repr(targets)):
        core.inject(model, targets, SPEC)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_of_no_size(sizes):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(*sizes))
    check_refused(model, ["0", "1"], r"^1\b|\b1 (is|has)")


# --- patterns that match too much ---


def test_a_pattern_that_matches_what_cannot_be_adapted():
    model = nn.ModuleDict({"block": nn.Sequential(nn.Linear(6, 4), nn.ReLU())})
    message = check_refused(model, ["re:block.*"], "block, a Sequential")
    assert "'re:block.*'" in message


def test_a_pattern_that_matches_the_model_itself():
    message = check_refused(nn.Sequential(nn.Linear(6, 4)), ["re:.*"], "model")
    assert "'re:.*'" in message
    assert "Sequential" in message
    assert "matches ," not in message
