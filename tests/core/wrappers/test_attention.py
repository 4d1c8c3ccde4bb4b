"""nn.MultiheadAttention: three layers over the rows of one packed weight, and an out_proj that is called."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from dora_mm import load_adapter, save_adapter
from dora_mm.core import DoRASpec, adapter_parameters, fixed_parameters, inject, merge, remove, set_strength, unmerge
from tests.shared import reference

ALL = ("q_proj", "k_proj", "v_proj", "out_proj")
NAMES = [f"attn.{name}" for name in ALL]


class Block(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(24, 3, **options)

    def forward(self, *args, **options):
        return self.attn(*args, **options)


def build(targets=NAMES, dtype=torch.float32, train=False, spec=None, **options):
    torch.manual_seed(0)
    base = Block(**options).to(dtype).train(train).requires_grad_(False)  # torch multiplies frozen weights differently
    if base.attn.in_proj_bias is not None:
        nn.init.normal_(base.attn.in_proj_bias)
    model = copy.deepcopy(base)
    inject(model, targets, spec or DoRASpec(rank=3, alpha=5.0))
    return base, model


def randomize(model):
    for module in model.modules():
        if hasattr(module, "lora_A"):
            reference.randomize(module)


def inputs(dtype=torch.float32, batch_first=True, cross=False):
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 5, 24, generator=generator).to(dtype)
    other = torch.randn(2, 7, 24, generator=generator).to(dtype) if cross else query
    return [t if batch_first else t.transpose(0, 1) for t in (query, other, other)]


MASKS = {
    "none": lambda S: {},
    "boolean": lambda S: {"attn_mask": torch.ones(5, S, dtype=torch.bool).triu(1)},
    "added": lambda S: {"attn_mask": torch.linspace(-1, 1, 5 * S).view(5, S)},
    "per head": lambda S: {"attn_mask": torch.linspace(-1, 1, 6 * 5 * S).view(6, 5, S)},
    "padding": lambda S: {"key_padding_mask": torch.arange(S).expand(2, S) >= torch.tensor([[S], [3]])},
    "both": lambda S: MASKS["boolean"](S) | MASKS["padding"](S),
    "causal": lambda S: MASKS["boolean"](S) | {"is_causal": True},
    "causal and padding": lambda S: MASKS["causal"](S) | MASKS["padding"](S),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("need_weights", "average"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_attention_changes_no_bit(mask, need_weights, average, cross, dtype):
    options = {"need_weights": need_weights, "average_attn_weights": average, **MASKS[mask](7 if cross else 5)}
    if options.get("attn_mask") is not None and options["attn_mask"].dtype == torch.float32:
        options["attn_mask"] = options["attn_mask"].to(dtype)
    for batch_first, bias in itertools.product([True, False], [True, False]):
        base, model = build(dtype=dtype, batch_first=batch_first, bias=bias)
        args = inputs(dtype, batch_first, cross)
        for found, expected in zip(model(*args, **options), base(*args, **options), strict=True):
            assert (found is None) == (expected is None)
            assert found is None or torch.equal(found, expected)


SIZES = [*itertools.product([1, 7, 50, 257], [48, 64]), (1, 768), (7, 768), (50, 768)]


@pytest.mark.parametrize(("tokens", "width"), [*SIZES, pytest.param(257, 768, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_separate_products_give_the_bits_of_the_packed_one(width, tokens, dtype):
    torch.manual_seed(0)
    base = nn.Sequential(nn.MultiheadAttention(width, 4, batch_first=True)).to(dtype).requires_grad_(False)
    model = copy.deepcopy(base)
    inject(model, ["0.q_proj"], DoRASpec(rank=2))
    x = torch.randn(2, tokens, width).to(dtype)
    with torch.no_grad():
        assert torch.equal(model[0](x, x, x, need_weights=False)[0], base[0](x, x, x, need_weights=False)[0])


def test_unbatched_inputs_and_gradients():
    base, model = build()
    args = [t[0] for t in inputs()]
    for found, expected in zip(model(*args), base(*args), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("norm_grad", ["detached", "exact"])
def test_value_and_gradients(norm_grad):
    _, model = build(dtype=torch.float64, spec=DoRASpec(rank=3, alpha=5.0, norm_grad=norm_grad), batch_first=True)
    randomize(model)
    trained = adapter_parameters(model)
    layers = {path: model.get_submodule(path) for path in NAMES}
    merged = {path: reference.merged_weight(layer.matrix, layer.adapters()[0]) for path, layer in layers.items()}
    x, other, _ = inputs(torch.float64, cross=True)
    y, _ = model(x, other, other, need_weights=False)
    attn = model.attn
    right, _ = torch.nn.functional.multi_head_attention_forward(
        x.transpose(0, 1), other.transpose(0, 1), other.transpose(0, 1), 24, 3,
        torch.cat([merged[path] for path in NAMES[:3]]), attn.in_proj_bias, None, None, False, 0.0,
        merged["attn.out_proj"], attn.out_proj.bias, need_weights=False,
    )  # fmt: skip
    right = right.transpose(0, 1)
    torch.testing.assert_close(y, right)
    dY = torch.randn_like(y)
    found = torch.autograd.grad(y, list(trained.values()), dY)
    expected = torch.autograd.grad(right, list(trained.values()), dY)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_only_selected_projections_are_adapted():
    _, model = build(["attn.v_proj"])
    assert {path.rpartition(".")[0] for path in adapter_parameters(model)} == {"attn.v_proj"}
    _, model = build([r"re:attn\.(q|v)_proj"])
    assert {path.rpartition(".")[0] for path in adapter_parameters(model)} == {"attn.q_proj", "attn.v_proj"}
    base, model = build(["out_proj"])
    randomize(model)
    assert not torch.equal(model(*inputs())[0], base(*inputs())[0])  # it is called


def test_merge_and_unmerge_change_only_their_rows():
    base, model = build(["attn.q_proj", "attn.v_proj"], batch_first=True)
    randomize(model)
    args = inputs()
    adapted = model(*args)[0]
    merge(model)
    torch.testing.assert_close(model(*args)[0], adapted)
    q, k, v = model.attn.in_proj_weight.chunk(3)
    old_q, old_k, old_v = base.attn.in_proj_weight.chunk(3)
    assert torch.equal(k, old_k)
    assert not torch.equal(q, old_q)
    assert not torch.equal(v, old_v)
    unmerge(model)
    assert torch.equal(model.attn.in_proj_weight, base.attn.in_proj_weight)
    assert torch.equal(model(*args)[0], adapted)
    set_strength(model, 0)
    assert torch.equal(model(*args)[0], base(*args)[0])


def test_remove_restores_the_attention():
    base, _ = build()
    model = copy.deepcopy(base).requires_grad_()
    inject(model, NAMES, DoRASpec(rank=3))
    assert not model.attn.in_proj_weight.requires_grad
    randomize(model)
    remove(model)
    assert type(model.attn) is nn.MultiheadAttention
    assert list(dict(model.named_modules())) == list(dict(base.named_modules()))
    assert all(p.requires_grad for p in model.parameters())
    model.requires_grad_(False)
    for found, expected in zip(model(*inputs()), base(*inputs()), strict=True):
        assert torch.equal(found, expected)


def test_state_dicts():
    _, model = build(["attn.q_proj", "attn.out_proj"])
    other, _ = build()
    nn.init.normal_(other.attn.in_proj_weight)
    model.load_state_dict(other.state_dict())  # strict: a fresh adapter takes m from the new weight
    args = inputs()
    assert torch.equal(model(*args)[0], other(*args)[0])
    randomize(model)
    with pytest.raises(RuntimeError, match="attn.q_proj has a trained adapter"):
        model.load_state_dict(other.state_dict())
    state = copy.deepcopy(model.state_dict())
    _, again = build(["attn.q_proj", "attn.out_proj"])
    again.load_state_dict(state)
    assert torch.equal(again(*args)[0], model(*args)[0])
    with pytest.raises(RuntimeError, match="attn.q_proj.lora_B"):
        again.load_state_dict({key: t for key, t in state.items() if key != "attn.q_proj.lora_B"})


@pytest.mark.parametrize("fixed", [False, True])
def test_casting_keeps_a_fresh_adapter_a_no_op(fixed):
    base, model = build(batch_first=True)
    with fixed_parameters(model) if fixed else torch.no_grad():
        model(*inputs())
        model.to(torch.bfloat16)
        args = inputs(torch.bfloat16)
        assert torch.equal(model(*args)[0], base.to(torch.bfloat16)(*args)[0])
    assert model.attn.q_proj.lora_A.dtype == torch.float32


def test_meta_models_get_memory():
    with torch.device("meta"):
        model = Block()
    inject(model, NAMES, DoRASpec(rank=3, alpha=5.0))
    base, _ = build()
    model.to_empty(device="cpu")
    model.load_state_dict(base.state_dict())
    args = inputs()
    assert torch.equal(model(*args)[0], base(*args)[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(copied):
    _, model = build()
    randomize(model)
    twin = copied(model)
    args = inputs()
    with torch.no_grad():
        before = model(*args)[0]
        assert torch.equal(twin(*args)[0], before)
        twin.attn.in_proj_weight.zero_()
        assert not torch.equal(twin(*args)[0], before)
        assert torch.equal(model(*args)[0], before)


def test_saved_and_loaded(tmp_path):
    _, model = build()
    randomize(model)
    save_adapter({"unet": model}, tmp_path, format="native")
    base = Block().requires_grad_(False)
    base.load_state_dict({k: t for k, t in model.state_dict().items() if "lora" not in k and "magnitude" not in k})
    load_adapter({"unet": base}, tmp_path)
    args = inputs()
    assert torch.equal(base(*args)[0], model(*args)[0])


@pytest.mark.parametrize("target", ["self_attn.q_proj", "self_attn.out_proj", "linear1"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_the_fast_path_of_the_encoder_does_not_bypass_adapters(target, padded, grad):
    """With an even number of heads torch reads the weights in inference, unless a module inside is adapted."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True)
    net = nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)
    options = {"src_key_padding_mask": torch.arange(5).expand(2, 5) >= torch.tensor([[5], [3]])} if padded else {}
    x, lengths = inputs()[0], torch.tensor([5, 3] if padded else [5, 5])
    with torch.set_grad_enabled(grad):
        before = net(x, **options)
        inject(net, [f"layers.1.{target}"], DoRASpec(rank=3))
        for found, expected, length in zip(net(x, **options), before, lengths, strict=True):
            torch.testing.assert_close(found[:length], expected[:length])
        randomize(net)
        assert not torch.allclose(net(x, **options)[0], before[0])
        remove(net)
        assert torch.equal(net(x, **options), before)


@pytest.mark.parametrize("need_weights", [False, True])
def test_inference_with_an_even_number_of_heads(need_weights):
    base = nn.Sequential(nn.MultiheadAttention(24, 4, batch_first=True)).eval().requires_grad_(False)
    model = copy.deepcopy(base)
    inject(model, ["0.q_proj", "0.out_proj"], DoRASpec(rank=3))
    x = inputs()[0]
    with torch.no_grad():
        found, expected = (net[0](x, x, x, need_weights=need_weights)[0] for net in (model, base))
    torch.testing.assert_close(found, expected)


def test_an_attention_that_is_the_model_itself(tmp_path):
    attention = nn.MultiheadAttention(24, 3)
    report = inject(attention, ["re:(q|v)_proj"], DoRASpec(rank=3))
    assert [m.path for m in report.modules] == ["q_proj", "v_proj"]
    randomize(attention)
    save_adapter({"unet": attention}, tmp_path, format="native")
    base = nn.MultiheadAttention(24, 3)
    load_adapter({"unet": base}, tmp_path)
    assert torch.equal(base.q_proj.lora_B, attention.q_proj.lora_B)


def test_a_shared_weight_is_cloned_by_merge_and_shared_again_after_unmerge():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2), "b": nn.MultiheadAttention(4, 2)})
    model["b"].in_proj_weight = shared = model["a"].in_proj_weight
    before = shared.detach().clone()
    inject(model, ["a.q_proj", "a.v_proj"], DoRASpec(rank=2))
    for seed, name in enumerate(("q_proj", "v_proj")):
        reference.randomize(model["a"].get_submodule(name), seed=seed)
    x = torch.randn(3, 2, 4)
    expected = model["a"](x, x, x)[0]
    merge(model)
    assert torch.equal(model["b"].in_proj_weight, before)
    torch.testing.assert_close(model["a"](x, x, x)[0], expected)
    unmerge(model)
    assert model["a"].in_proj_weight is model["b"].in_proj_weight is shared
    assert torch.equal(shared, before)


def test_remove_does_not_unfreeze_what_was_not_adapted():
    model = Block()
    inject(model, ["out_proj"], DoRASpec(rank=2))
    model.attn.in_proj_weight.requires_grad_(False)
    remove(model)
    assert not model.attn.in_proj_weight.requires_grad


def test_adapters_of_an_attention_in_eval_mode_drop_nothing():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)}).eval()
    inject(model, ["attn.q_proj"], DoRASpec(rank=2, dropout=0.9))
    reference.randomize(model["attn"].q_proj, size=1.0)
    x = torch.randn(3, 2, 8)
    assert torch.equal(model["attn"](x, x, x)[0], model["attn"](x, x, x)[0])


def test_dropout_of_the_attention_is_kept():
    base, model = build(train=True, dropout=0.5, batch_first=True)
    for need_weights in (False, True):
        torch.manual_seed(3)
        expected = base(*inputs(), need_weights=need_weights)[0]
        torch.manual_seed(3)
        assert torch.equal(model(*inputs(), need_weights=need_weights)[0], expected)


@pytest.mark.parametrize(
    ("options", "spec", "message"),
    [
        ({"kdim": 8}, DoRASpec(), "attn.out_proj .*kdim"),
        ({"add_zero_attn": True}, DoRASpec(), "attn.out_proj .*add_zero_attn"),
        ({"add_bias_kv": True}, DoRASpec(), "attn.out_proj .*add_bias_kv"),
    ],
)
def test_attentions_that_are_refused(options, spec, message):
    with pytest.raises(ValueError, match=message):
        inject(Block(**options), ["out_proj"], spec)


def test_attentions_that_would_not_call_an_adapter_are_refused():
    class Own(nn.MultiheadAttention): ...

    with pytest.raises(ValueError, match=r"0.out_proj .*subclass of MultiheadAttention \(Own\)"):
        inject(nn.Sequential(Own(24, 3)), ["0.out_proj"], DoRASpec())
    model = Block()
    model.attn.forward = model.attn.forward
    with pytest.raises(ValueError, match="attn.q_proj .*forward function"):
        inject(model, ["q_proj"], DoRASpec())


def test_full_training_of_a_part_is_refused():
    model = Block()
    with pytest.raises(ValueError, match="attn.q_proj is a part of in_proj_weight"):
        inject(model, NAMES, DoRASpec(method="full"))
    assert type(model.attn) is nn.MultiheadAttention
