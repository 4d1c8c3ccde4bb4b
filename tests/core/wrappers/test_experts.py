"""Mixtures of experts: transformers' own classes, with the weights of all experts in one parameter.

What they are compared with is the class itself on the textbook's weights, a loop over experts (eager).
"""

import copy
import inspect
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from transformers import AriaTextConfig, GptOssConfig, Llama4TextConfig, NemotronHConfig, Qwen3MoeConfig
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.inkling.modeling_inkling import InklingSharedExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

from dora_mm.core import (
    AdaptedLayer,
    DoRASpec,
    adapted_layers,
    adapter_parameters,
    fixed_parameters,
    inject,
    merge,
    remove,
    set_strength,
    unmerge,
)
from dora_mm.core.inject import inject_paths
from dora_mm.core.wrappers.sharded import gathered, shard_frozen
from dora_mm.core.wrappers.streaming import stream
from tests.shared import reference
from tests.shared.quantized import fp8_experts
from tests.shared.two_processes import needs_fsdp, run_in_two

SIZE, INNER, EXPERTS = 32, 16, 5
SIZES = {"hidden_size": SIZE, "hidden_act": "silu", "n_routed_experts": EXPERTS, "num_local_experts": EXPERTS}
SIZES |= {"moe_intermediate_size": INNER, "intermediate_size": INNER, "n_shared_experts": 2}
SIZES |= {"moe_hidden_size": SIZE, "post_norm_eps": 1e-6, "_experts_implementation": "eager"}
SIZES |= {"swiglu_limits": None, "limit_after_act": False}
LAYER = [0] if "layer_idx" in inspect.signature(Step3p7Experts).parameters else []  # before transformers 5.25 it is not
ROUTED = {  # one class per layout
    "qwen3_moe": lambda: Qwen3MoeExperts(
        Qwen3MoeConfig(num_experts=EXPERTS, hidden_size=SIZE, moe_intermediate_size=INNER)
    ),
    "aria, (E, I, O)": lambda: AriaExperts(
        AriaTextConfig(moe_num_experts=EXPERTS, hidden_size=SIZE, intermediate_size=INNER, num_attention_heads=2)
    ),
    "gpt_oss, interleaved and with biases": lambda: GptOssExperts(
        GptOssConfig(num_local_experts=EXPERTS, hidden_size=SIZE, intermediate_size=INNER)
    ),
    "nemotron_h, without a gate": lambda: NemotronHExperts(
        NemotronHConfig(n_routed_experts=EXPERTS, hidden_size=SIZE, moe_intermediate_size=INNER)
    ),
    "muse_spark, normed": lambda: MuseSparkExperts(SimpleNamespace(**SIZES)),
    "step3p7, a loop of its own": lambda: Step3p7Experts(SimpleNamespace(**SIZES), *LAYER),
}
DENSE = {
    "llama4, as many tokens for each": lambda: Llama4TextExperts(
        Llama4TextConfig(num_local_experts=EXPERTS, hidden_size=SIZE, intermediate_size=INNER)
    ),
    "inkling's shared experts": lambda: InklingSharedExperts(SimpleNamespace(**SIZES)),
}
LAYOUTS = ROUTED | DENSE
# Expert 4 has no token, expert 2 one, expert 0 all
ROUTES = torch.tensor([[0, 1], [1, 0], [0, 3], [0, 1], [0, 2], [3, 0], [0, 1]])


def build(name, dtype=torch.float32, implementation="eager", **spec):
    """(base, adapted copy with a fresh adapter), each a model with `experts`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        experts = LAYOUTS[name]()
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.4)
    if hasattr(experts, "config"):
        experts.config._experts_implementation = implementation
    base = nn.ModuleDict({"experts": experts}).to(dtype).requires_grad_(False)
    model = copy.deepcopy(base)
    inject(model, [r"re:experts\.(gate_up|gate|up|down)"], DoRASpec(**{"rank": 3, "alpha": 5.0, **spec}))
    return base, model


def inputs(name, dtype=torch.float32, requires_grad=False):
    """The arguments of a pass."""
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_(requires_grad)

    if "llama4" in name:
        return (drawn(EXPERTS * 4, SIZE),)
    if "shared" in name:
        return drawn(2, 7, SIZE), drawn(2, 7, 2)
    return drawn(len(ROUTES), SIZE), ROUTES, drawn(*ROUTES.shape)


def trained(model):
    for seed, layer in enumerate(adapted_layers(model).values()):
        reference.randomize(layer, seed=seed, size=0.2)
    return model


def implementations(name):
    return ("eager", "batched_mm", "grouped_mm") if name in ROUTED and "step3p7" not in name else ("eager",)


CASES = [(name, implementation) for name in LAYOUTS for implementation in implementations(name)]


def textbook(model, base, args, norm_grad="detached"):
    """The base in float64 with W(t), by its own loop over experts; gradients flow to A, B and m."""
    base = copy.deepcopy(base).double()
    weights = {}
    if hasattr(base["experts"], "config"):
        base["experts"].config._experts_implementation = "eager"
    for path, layer in adapted_layers(model).items():
        scaling, matrix = layer.adaptation.spec.scaling, layer.matrix.detach()
        own = layer.adapters()[0].of_matrices(len(matrix))
        own = [adapter._replace(scaling=scaling, norm_grad=norm_grad) for adapter in own]
        W = torch.stack([reference.merged_weight(*each) for each in zip(matrix, own, strict=True)])
        weights[f"{path}_proj"] = W.mT if layer.transposed else W
    wide = [arg.double() if arg.is_floating_point() else arg for arg in args]
    return functional_call(base["experts"], {k.removeprefix("experts."): v for k, v in weights.items()}, tuple(wide))


@pytest.mark.parametrize(("name", "implementation"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_fresh_adapter_changes_no_bit(name, implementation, dtype, autocast):
    base, model = build(name, dtype, implementation)
    args = inputs(name, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = base["experts"](*args)
        found = [model["experts"](*args), model.eval()["experts"](*args)]
        with torch.no_grad():
            found.append(model["experts"](*args))
    assert all(each.dtype == expected.dtype and torch.equal(each, expected) for each in found)


@pytest.mark.parametrize(("name", "implementation"), [case for case in CASES if case[1] != "grouped_mm"])
@pytest.mark.parametrize("method", ["dora", "lora", "magnitude"])
def test_value_and_gradients(name, implementation, method):
    norm_grad = "exact" if "aria" in name or "shared" in name else "detached"
    base, model = build(name, torch.float64, implementation, method=method, norm_grad=norm_grad)
    args = inputs(name, torch.float64, requires_grad=True)
    parameters = [*adapter_parameters(trained(model)).values(), *(a for a in args if a.is_floating_point())]
    expected = textbook(model, base, args, norm_grad)
    found = model["experts"](*args)
    torch.testing.assert_close(found, expected)
    dY = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = (torch.autograd.grad(y, parameters, dY) for y in (found, expected))
    for own, right in zip(*gradients, strict=True):
        torch.testing.assert_close(own, right)


@pytest.mark.parametrize("name", [name for name in ROUTED if "grouped_mm" in implementations(name)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products(name, dtype):
    """In training and in evaluation, against float64; the usual computation is the loop over experts in this dtype."""
    base, model = build(name, dtype, "grouped_mm")
    args = inputs(name, dtype, requires_grad=True)
    parameters = [*adapter_parameters(trained(model)).values(), *(a for a in args if a.is_floating_point())]
    dY = torch.randn(len(ROUTES), SIZE, generator=torch.Generator().manual_seed(2)).to(dtype)

    def results(y):
        return reference.numbered([y, *torch.autograd.grad(y, parameters, dY.to(y.dtype))])

    exact, found = results(textbook(model, base, args)), results(model["experts"](*args))
    model["experts"].config._experts_implementation = "eager"
    usual = results(model["experts"](*args))
    reference.check_errors(found, usual, exact, dtype)
    model["experts"].config._experts_implementation = "grouped_mm"
    with torch.no_grad():
        reference.check_error(model.eval()["experts"](*args), usual[0], exact[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_size_of_the_parameter_is_made_or_kept(dtype):
    base, model = build("qwen3_moe", dtype, "grouped_mm")
    x, routes, weights = (
        t.repeat(43, 1) for t in inputs("qwen3_moe", requires_grad=True)
    )  # so many that W(t) is built
    trained(model)
    W0 = {p.data_ptr(): p.numel() for p in base.parameters()} | {p.data_ptr(): p.numel() for p in model.parameters()}
    sizes, kept = {p.numel() for p in base.parameters()}, []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with reference.NewTensors() as made, hooks:
        y = model["experts"](x, routes, weights)
        num_kept = sum(made.num_alive(shape) for shape in ((INNER * 2, SIZE), (SIZE, INNER)))
        y.sum().backward()
    assert (INNER * 2, SIZE) in made.shapes  # W(t) of one expert at a time
    assert num_kept == 0
    assert not [shape for shape in made.shapes if math.prod(shape) in sizes]
    assert all(
        t.untyped_storage().data_ptr() in W0 for t in kept if t.untyped_storage().nbytes() // t.itemsize in sizes
    )


def test_norms_are_taken_once_per_expert_with_tokens():
    _, model = build("qwen3_moe", implementation="grouped_mm")
    args = inputs("qwen3_moe")
    trained(model)

    def num_norms():
        with reference.Names() as called:
            model["experts"](*args)
        return called.names.count("linalg_vector_norm"), called.names.count("addmm")

    with fixed_parameters(model, base_only=True):
        first, _ = num_norms()
        assert (first, num_norms()[0]) == (2 * 4, 0)  # two parameters, four experts that have tokens
        with fixed_parameters(model):
            counts = [num_norms() for _ in range(3)]
        assert counts[1] == counts[2]
        assert counts[1][1] < counts[0][1]  # n is kept


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_strength(name, implementation):
    base, model = build(name, torch.float64 if implementation != "grouped_mm" else torch.float32, implementation)
    args = inputs(name, base["experts"].down_proj.dtype)
    full, none = trained(model)["experts"](*args), base["experts"](*args)
    set_strength(model, 0)
    assert torch.equal(model["experts"](*args), none)
    set_strength(model, 1)
    assert torch.equal(model["experts"](*args), full)
    weights = {}
    for strength in (0.5, 1):
        set_strength(model, strength)
        merge(model)
        weights[strength] = [p.clone() for n, p in model["experts"].named_parameters() if n.endswith("_proj")]
        unmerge(model)
    W0 = [p for n, p in base["experts"].named_parameters() if n.endswith("_proj")]
    for half, whole, bare in zip(weights[0.5], weights[1], W0, strict=True):
        torch.testing.assert_close(half, (whole + bare) / 2)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging(name, dtype):
    base, model = build(name, dtype)
    args = inputs(name, dtype)
    trained(model)
    exact = textbook(model, base, args)
    usual = model["experts"](*args)
    report = merge(model)
    assert 0.9 < report.surviving_share < 1.1
    error = reference.relative_error(model["experts"](*args), exact)
    assert error <= 8 * torch.finfo(dtype).eps
    assert reference.relative_error(usual, exact) <= 4 * torch.finfo(dtype).eps
    assert model.state_dict().keys() == base.state_dict().keys()
    unmerge(model)
    own = model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in base.state_dict().items())
    remove(model)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert type(model["experts"]) is type(base["experts"])
    assert torch.equal(model["experts"](*args), base["experts"](*args))


def test_several_adapters_add_up():
    _, model = build("qwen3_moe", torch.float64)
    args = inputs("qwen3_moe", torch.float64)
    trained(model)
    alone = model["experts"](*args)
    for layer in adapted_layers(model).values():
        tensors = {name: t.detach() for name, t in layer.adapter_tensors().items()}
        layer.stack("other", layer.adaptation.spec, tensors, 0.5)
    set_strength(model, 0.5)
    torch.testing.assert_close(model["experts"](*args), alone)


def test_what_becomes_of_the_module():
    base, model = build("qwen3_moe")
    args = inputs("qwen3_moe")
    fresh = model["experts"](*args)
    loaded = build("qwen3_moe")[1]
    state = {key: 2 * value for key, value in base.state_dict().items()}
    assert loaded.load_state_dict(state, strict=False).unexpected_keys == []
    assert torch.equal(loaded["experts"].gate_up.magnitude, 2 * model["experts"].gate_up.magnitude)
    own = trained(model)["experts"](*args)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other["experts"](*args), own)
        assert other["experts"].gate_up.holder[0] is other["experts"]
    assert not torch.equal(own, fresh)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert {p.dtype for p in adapter_parameters(half).values()} == {torch.float32}
    assert list(model["experts"].gate_up.lora_A.shape) == [EXPERTS, 3, SIZE]
    with pytest.raises(RuntimeError, match=r"experts.gate_up has a trained adapter but the state dict has none"):
        model.load_state_dict(base.state_dict(), strict=False)


def test_one_parameter_alone():
    base, _ = build("qwen3_moe")
    model = copy.deepcopy(base)
    args = inputs("qwen3_moe")
    inject(model, ["experts.down"], DoRASpec(rank=2))
    inject_paths(model, {"experts.gate_up": ("given", DoRASpec(rank=3))})
    assert torch.equal(model["experts"](*args), base["experts"](*args))


REFUSED = {
    "dropout": (DoRASpec(dropout=0.1), lambda experts: None, "set dropout to 0"),
    "full": (DoRASpec(method="full"), lambda experts: None, "extra_trainable"),
    "parallel": (DoRASpec(), lambda experts: setattr(experts, "_is_expert_parallel", True), "divided among processes"),
    "hooked": (DoRASpec(), lambda experts: setattr(experts, "forward", experts.forward), "was replaced"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    spec, change, message = REFUSED[case]
    model, _ = build("qwen3_moe")
    change(model["experts"])
    with pytest.raises(ValueError, match=message):
        inject(model, ["experts.down"], spec)
    assert not any(isinstance(module, AdaptedLayer) for module in model.modules())


def test_an_unknown_use_of_the_weights_is_an_error():
    class Odd(Qwen3MoeExperts):
        def forward(self, x):
            return x @ self.down_proj.sum(0)

    model, _ = build("qwen3_moe")
    model["experts"].__class__ = Odd
    inject(model, ["experts.down"], DoRASpec())
    with pytest.raises(AttributeError, match=r"Odd.down_proj has no sum: only its products with tokens are known"):
        model["experts"](torch.randn(3, INNER))


def test_fp8_experts():
    """As experts with the weights that transformers dequantises, one expert at a time."""
    _, dense = build("qwen3_moe")
    quantized = fp8_experts(dense["experts"])
    for name in ("gate_up_proj", "down_proj"):
        stored, scale = getattr(quantized, name), getattr(quantized, f"{name}_scale_inv")
        weight = _dequantize_fp8_weight(stored, scale, quantized.block_size, torch.float32)
        assert 0 < reference.relative_error(weight, getattr(dense["experts"], name)) < 0.05
        getattr(dense["experts"], name).data.copy_(weight)
    model = nn.ModuleDict({"experts": quantized}).requires_grad_(False)
    inject(model, ["experts.gate_up", "experts.down"], DoRASpec(rank=3, alpha=5.0))
    remove(dense)
    inject(dense, ["experts.gate_up", "experts.down"], DoRASpec(rank=3, alpha=5.0))
    args, results = inputs("qwen3_moe"), []
    for each in (model, dense):
        y = trained(each)["experts"](*args)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(adapter_parameters(each).values()))])
    for own, right in zip(*results, strict=True):
        torch.testing.assert_close(own, right)
    with pytest.raises(ValueError, match=r"experts.gate_up is quantised, and merging would lose the update"):
        merge(model)


# --- beside what else changes weights ---------------------------------------------------------------------------------


class Mixture(nn.Module):
    """Two blocks of routed experts."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(SIZE, EXPERTS, bias=False)
        self.blocks = nn.ModuleList(nn.ModuleDict({"experts": ROUTED["qwen3_moe"]()}) for _ in range(3))
        for block in self.blocks:
            block["experts"].config._experts_implementation = "grouped_mm"

    def forward(self, x):
        weights, routes = self.router(x).softmax(-1).topk(2)
        for block in self.blocks:
            x = x + block["experts"](x, routes, weights)
        return x


def mixture():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mixture().requires_grad_(False)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    inject(model, [r"re:blocks\.\d\.experts\.(gate_up|down)"], DoRASpec(rank=3))
    return trained(model)


def tokens():
    return torch.randn(9, SIZE, generator=torch.Generator().manual_seed(3))


def step(model, x):
    """The output, and the gradients of the adapters."""
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(adapter_parameters(model).values()))]


def test_streamed_experts_compute_the_same_bits():
    expected, model = step(mixture(), tokens()), mixture()
    stream([block["experts"] for block in model.blocks], torch.device("cpu"))
    assert all(map(torch.equal, step(model, tokens()), expected))
    merge(model)
    merged = model(tokens())
    unmerge(model)
    assert all(map(torch.equal, step(model, tokens()), expected))
    plain = mixture()
    merge(plain)
    assert torch.equal(merged, plain(tokens()))


def test_a_compiled_model_computes_the_same():
    expected, model = step(mixture(), tokens()), mixture()
    compiled = torch.compile(model, backend="aot_eager")
    y = compiled(tokens())
    gradients = torch.autograd.grad(y.square().sum(), list(adapter_parameters(model).values()))
    for own, right in zip((y, *gradients), expected, strict=True):
        torch.testing.assert_close(own, right)


def _shards(rank, frozen_alone):
    model, whole = mixture(), mixture()
    blocks = [block["experts"] for block in model.blocks]
    if frozen_alone:
        shard_frozen(model, blocks, list(adapter_parameters(model).values()), torch.device("cpu"))
    else:
        for module in (*blocks, model):
            fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    torch.testing.assert_close(model(tokens()), whole(tokens()))
    model(tokens()).square().sum().backward()
    right = step(whole, tokens())[1:]
    for parameter, gradient in zip(adapter_parameters(model).values(), right, strict=True):
        torch.testing.assert_close(gathered(parameter.grad), gradient)
    merge(model)
    merge(whole)
    torch.testing.assert_close(model(tokens()), whole(tokens()))
    unmerge(model)
    unmerge(whole)
    torch.testing.assert_close(model(tokens()), whole(tokens()))


@needs_fsdp
@pytest.mark.slow
@pytest.mark.parametrize("frozen_alone", [True, False])
def test_sharded_experts(frozen_alone, tmp_path):
    run_in_two(tmp_path, _shards, frozen_alone)
