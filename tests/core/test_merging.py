"""Merging: what rounding loses, that unmerging restores every bit; a merged model is a base model to all others."""

import contextlib
import copy
import weakref

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dora_mm import (
    DoRASpec,
    adapter_parameters,
    fixed_parameters,
    inject,
    load_adapter,
    merge,
    remove,
    save_adapter,
    set_strength,
    unmerge,
)
from dora_mm.core.functional import round_stochastically, seeded_generator
from tests.shared import reference

KEEP_BASE = pytest.mark.parametrize("keep_base", [True, False])
SPEC = DoRASpec(rank=4)


def bare():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8))


def trained(spec=SPEC):
    model = bare()
    inject(model, ["0", "1"], spec)
    for seed, layer in enumerate(model):
        reference.randomize(layer, seed=seed)
    return model


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


def trained_attention():
    torch.manual_seed(0)
    model = Attention()
    inject(model, ["attn.q_proj", "attn.out_proj"], SPEC)
    reference.randomize(model.attn.q_proj)
    reference.randomize(model.attn.out_proj)
    return model


MODELS = {"linear": trained, "attention": trained_attention}
MODEL = pytest.mark.parametrize("name", MODELS)


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def check_unchanged(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# --- the weights ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_and_unmerge_restore_every_bit(dtype):
    model = nn.Sequential(nn.Linear(64, 48), nn.Conv1d(48, 8, 1)).to(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    inject(model, ["0", "1"], DoRASpec(rank=4))
    for module in model:
        reference.randomize(module)
    x = torch.randn(300, 64).to(dtype)
    expected = model[0](x)
    report = merge(model)
    assert report.num_modules == 2
    assert abs(report.surviving_share - 1) < (1e-4 if dtype == torch.float32 else 0.02)
    # each weight is rounded up or down, by at most a unit in the last place, and the product once
    assert reference.relative_error(model[0](x), expected) < 2 * torch.finfo(dtype).eps
    with pytest.raises(ValueError, match="adapter of 0 is merged"):
        merge(model)
    unmerge(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert torch.equal(model[0](x), expected)


def test_merge_at_strength_0_is_the_base():
    base, layer = reference.linear(8, 6)
    reference.randomize(layer)
    layer.set_strength(0.0)
    merge(layer)
    assert torch.equal(layer.weight, base.weight)
    unmerge(layer)
    assert torch.equal(layer.weight, base.weight)


@pytest.mark.parametrize("strength", [1.5, -0.5])
def test_merge_at_other_strengths(strength):
    base, layer = reference.linear(8, 6)
    reference.randomize(layer)
    adapter = layer.adapters()[0]._replace(strength=strength)
    expected = [reference.merged_weight(base.weight, adapter, dtype) for dtype in (torch.float32, torch.float64)]
    layer.set_strength(strength)
    merge(layer)
    reference.check_error(layer.weight, *expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_merged_layer_that_is_cast_is_unmerged_in_its_new_dtype(dtype):
    base, layer = reference.linear(8, 6)
    reference.randomize(layer)
    merge(layer)
    layer.to(dtype)
    unmerge(layer)
    assert torch.equal(layer.weight, base.weight.to(dtype))
    assert layer(torch.ones(2, 8, dtype=dtype)).dtype == dtype


def test_merge_without_keeping_the_base():
    base, layer = reference.linear(8, 6)
    reference.randomize(layer)
    weight = weakref.ref(layer.weight)
    expected = layer(torch.ones(8)).detach()
    merge(layer, keep_base=False)
    assert weight() is None  # its memory is free
    with pytest.raises(ValueError, match="keep_base=False"):
        unmerge(layer)
    remove(layer)
    assert type(layer) is nn.Linear
    torch.testing.assert_close(layer(torch.ones(8)), expected)
    assert not torch.equal(layer.weight, base.weight)


@pytest.mark.parametrize("keep_base", [True, False])
def test_tied_weights_are_cloned_not_merged_twice(keep_base):
    model = nn.ModuleDict({"embed": nn.Embedding(10, 8), "one": nn.Linear(8, 10), "two": nn.Linear(8, 10)})
    for name in ("one", "two"):
        model[name].weight = model["embed"].weight
    tied = model["embed"].weight
    before = tied.detach().clone()
    inject(model, ["one", "two"], DoRASpec(rank=2))
    for seed, name in enumerate(("one", "two")):
        reference.randomize(model[name], seed=seed)
    x = torch.randn(3, 8)
    expected = [model[name](x) for name in ("one", "two")]
    merge(model, keep_base=keep_base)
    assert torch.equal(model["embed"].weight, before)
    for name, y in zip(("one", "two"), expected, strict=True):
        torch.testing.assert_close(model[name](x), y)
    if keep_base:
        unmerge(model)
        assert model["one"].weight is model["two"].weight is tied


def test_stochastic_rounding():
    generator = seeded_generator(0, "test")
    for dtype in (torch.bfloat16, torch.float16):
        exact = torch.randn(1000).to(dtype).float()
        assert torch.equal(round_stochastically(exact, dtype, generator).float(), exact)
        between = torch.full((100_000,), 1 + 0.3 * torch.finfo(dtype).eps)
        found = round_stochastically(between, dtype, generator).float()
        assert abs((found > 1).float().mean().item() - 0.3) < 0.01
        tiny = torch.full((100_000,), torch.finfo(dtype).tiny * torch.finfo(dtype).eps * 0.25)
        assert abs(round_stochastically(tiny, dtype, generator).double().mean() / tiny[0].double() - 1) < 0.05
    assert round_stochastically(torch.tensor([1e6]), torch.float16, generator).isfinite()


def test_merging_method_full_keeps_a_copy():
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, ["0"], DoRASpec(method="full"))
    before = model[0].weight.detach().clone()
    merge(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    unmerge(model)
    assert torch.equal(model[0].weight, before)


# --- state dicts ---


@MODEL
@KEEP_BASE
def test_a_merged_model_has_the_keys_of_the_base(name, keep_base):
    model = MODELS[name]()
    plain = copy.deepcopy(model)
    remove(plain)
    x = torch.randn(3, 2, 16)
    expected, exact = model(x), reference.doubled(model)(x.double())
    merge(model, keep_base=keep_base)
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    reference.check_error(plain(x), expected, exact)


@MODEL
def test_unmerging_gives_the_adapter_keys_back(name):
    model = MODELS[name]()
    before = copied(model)
    merge(model)
    unmerge(model)
    check_unchanged(model, before)


@KEEP_BASE
def test_a_merged_state_dict_loads_into_a_fresh_adapter(keep_base):
    model, fresh, x = trained(), bare(), torch.randn(3, 16)
    inject(fresh, ["0", "1"], SPEC)
    merge(model, keep_base=keep_base)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))  # the update once, not twice


def merged_state():
    model = trained()
    merge(model)
    return model.state_dict()


@pytest.mark.parametrize("state", [merged_state, lambda: bare().state_dict()], ids=["merged", "bare"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_trained_adapter_refuses_a_state_dict_without_adapters(state, strict):
    model = trained()
    before = copied(model)
    with pytest.raises(RuntimeError, match=r"(?m)^\s*[01]\b"):
        model.load_state_dict(state(), strict=strict)
    check_unchanged(model, before)


def test_a_merged_copy_can_be_unmerged():
    model, x = trained(), torch.randn(3, 16)
    expected = model(x)
    merge(model)
    twin = copy.deepcopy(model)
    unmerge(twin)
    assert torch.equal(twin(x), expected)
    assert not torch.equal(model.state_dict()["0.weight"], twin.state_dict()["0.weight"])


@KEEP_BASE
def test_save_pretrained_after_merging_leaves_no_adapter_keys(keep_base, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(**sizes, vocab_size=50, max_position_embeddings=16)
    model, ids = transformers.BertModel(config).eval(), torch.arange(8)[None]
    targets = ["query", "value", "word_embeddings"]
    report = inject(model, targets, SPEC)
    for module in report.modules:
        reference.randomize(model.get_submodule(module.path))
    expected = [net(ids).last_hidden_state for net in (model, reference.doubled(model))]
    merge(model, keep_base=keep_base)
    model.save_pretrained(tmp_path)
    loaded, info = transformers.BertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    reference.check_error(loaded.eval()(ids).last_hidden_state, *expected)


# --- adapter files ---


@pytest.mark.parametrize("format", ["diffusers", "peft"])
@pytest.mark.parametrize("strength", [1.0, 1.5])
def test_the_file_of_a_merged_adapter_is_that_of_before(format, strength, tmp_path):
    model = trained()
    before = load_file(save_adapter({"unet": model}, tmp_path / "before", format=format, strength=strength))
    merge(model)
    after = load_file(save_adapter({"unet": model}, tmp_path / "after", format=format, strength=strength))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_file_of_an_attention_merged_at_another_strength(tmp_path):
    model, other, x = trained_attention(), Attention(), torch.randn(3, 2, 16)
    other.load_state_dict({k: v for k, v in model.state_dict().items() if k in other.state_dict()})
    set_strength(model, 1.5)
    expected, exact = model(x), reference.doubled(model)(x.double())
    set_strength(model, 0.5)
    merge(model)
    save_adapter(model, tmp_path, format="native", strength=1.5)
    load_adapter(other, tmp_path)
    reference.check_error(other(x), expected, exact)


def test_another_strength_needs_the_base(tmp_path):
    model = trained()
    expected = load_file(save_adapter({"unet": model}, tmp_path / "before"))
    merge(model, keep_base=False)
    with pytest.raises(ValueError, match="(?s)^(?=.*strength)(?=.*keep_base)"):
        save_adapter({"unet": model}, tmp_path / "scaled", strength=1.5)
    assert not list((tmp_path).glob("scaled/*"))
    found = load_file(save_adapter({"unet": model}, tmp_path / "after"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# --- between forward and backward ---


def gradients(model, x, between):
    """Of the input and the adapter, where `between` is called between forward and backward."""
    x = x.clone().requires_grad_()
    parameters = adapter_parameters(model)
    y = model(x)
    between(model)
    y.square().sum().backward()
    return {"x": x.grad, **{name: p.grad for name, p in parameters.items()}}


def gradients_without(model, x):
    """Of copies, where nothing is called: in the same dtype, and in float64."""
    twin, exact = copy.deepcopy(model), reference.doubled(model)
    return gradients(twin, x, lambda model: None), gradients(exact, x.double(), lambda model: None)


def merging(keep_base):
    def run(model):
        with contextlib.suppress(ValueError):  # refusing is as good, where nothing has changed
            merge(model, keep_base=keep_base)

    return run


@MODEL
@KEEP_BASE
@pytest.mark.parametrize("tokens", [2, 1000])  # either form
@pytest.mark.parametrize("fixed", [False, True])
def test_merging_between_forward_and_backward_changes_no_gradient(name, keep_base, tokens, fixed):
    model, x = MODELS[name](), torch.randn(tokens, 1 if tokens > 100 else 8, 16)
    expected, exact, y = gradients_without(model, x), reference.doubled(model)(x.double()), model(x)
    with fixed_parameters(model) if fixed else contextlib.nullcontext():
        found = gradients(model, x, merging(keep_base))
    reference.check_errors(found, *expected)
    reference.check_error(model(x), y, exact)


@KEEP_BASE
@pytest.mark.parametrize("settings", [{"norm_grad": "exact"}, {"cache": "norms"}, {"method": "lora", "cache": "norms"}])
def test_merging_changes_no_gradient_that_is_computed_from_the_weight(keep_base, settings):
    model, x = trained(DoRASpec(rank=4, **settings)), torch.randn(1000, 16)
    expected = gradients_without(model, x)
    reference.check_errors(gradients(model, x, merging(keep_base)), *expected)


@MODEL
def test_unmerging_between_forward_and_backward_changes_no_gradient(name):
    model, x = MODELS[name](), torch.randn(20, 1, 16, requires_grad=True)
    exact, x64 = reference.doubled(model), x.detach().double().requires_grad_()
    (right,) = torch.autograd.grad(exact(x64).square().sum(), x64)
    merge(model)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    y = model(x)
    unmerge(model)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    reference.check_error(found, expected, right)
