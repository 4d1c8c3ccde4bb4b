"""How many launches a step of one layer takes on a GPU: kernels of ours and operators of torch that are not views."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

pytest.importorskip("triton")

from triton.runtime import interpreter

from dora_mm import backend
from dora_mm.core import Adapter, DoRASpec, adapt_layer, fixed_parameters
from dora_mm.core.ops import GroupedOp
from dora_mm.core.passes import Options, PassCache
from dora_mm.kernels import dora_linear, low_rank_matmul, scaled
from dora_mm.peft import fixed_norms
from tests.benchmarks.contenders import CONTENDERS
from tests.shared import reference

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the interpreter is asked to run")
NO_LAUNCH = (
    "promote_types",
    "view",
    "t",
    "detach",
    "alias",
    "empty",
    "new_empty",
    "empty_like",
    "slice",
    "transpose",
    "expand",
    "unsqueeze",
    "_unsafe_view",
)


class Launches(TorchDispatchMode):
    """Records the names of kernels and operators in their order."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (name := function.overloadpacket.__name__) not in NO_LAUNCH:
            self.names.append(name)
        return function(*args, **(kwargs or {}))

    def apart(self, name, function):
        """`function`, recorded as one launch, whatever it runs."""

        def run(*args, **kwargs):
            self.names.append(name if isinstance(name, str) else name(*args))
            with _disable_current_modes():
                return function(*args, **kwargs)

        return run


@pytest.fixture
def launches(monkeypatch):
    found = Launches()
    execute = interpreter.GridExecutor.__call__
    called = found.apart(lambda executor, *_: executor.fn.__name__.strip("_"), execute)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *args, **kwargs: called(*args, **kwargs))
    product = found.apart("float_product", dora_linear.float_product)  # an operator on a GPU, three on a CPU
    for module in (dora_linear, low_rank_matmul, scaled):
        monkeypatch.setattr(module, "float_product", product)
    return found


def step(launches, *, vendor, monkeypatch, passes=1, method="dora", rank=4, alpha=4.0, num_passes=1):
    """The launches of the last of some passes and of its backward pass."""
    monkeypatch.setattr(dora_linear, "vendor_is_faster", lambda t, inner_size, back=False: vendor)
    base = nn.Linear(48, 32, dtype=torch.float16).requires_grad_(False)
    layer = reference.randomize(adapt_layer(base, DoRASpec(rank, alpha, method=method), forward=dora_linear.TRITON))
    x, dY = torch.randn(20, 48, dtype=torch.float16, requires_grad=True), torch.ones(20, 32, dtype=torch.float16)
    with fixed_parameters(layer, base_only=True):  # as in the training loop: n0 is known
        with torch.no_grad():
            layer(x)
        with fixed_parameters(layer, num_passes=num_passes):
            for _ in range(passes):
                launches.names.clear()
                with launches:
                    y = layer(x)
                num_forward = len(launches.names)
                with launches:
                    torch.autograd.grad(y, [x, *layer.adapter_tensors().values()], dY)
    return launches.names[:num_forward], launches.names[num_forward:]


NORM = ["operands", "float_product", "float_product", "row_norm"]
BACKWARD = ["output_grad", "mm", "float_product", "float_product", "adapter_grads"]


@pytest.mark.parametrize("alpha", [4.0, 8.0])
def test_a_step_of_dora(launches, monkeypatch, alpha):
    forward, backward = step(launches, vendor=True, monkeypatch=monkeypatch, alpha=alpha)
    assert forward == [*NORM, "mm", "float_product", "low_rank_add"]
    assert backward == [*BACKWARD, "float_product", "low_rank_add"]
    forward, backward = step(launches, vendor=False, monkeypatch=monkeypatch, alpha=alpha)
    assert forward == [*NORM, "mm", "low_rank_matmul"]
    assert backward == [*BACKWARD, "low_rank_matmul"]


def test_a_later_pass_of_a_step_keeps_the_norm(launches, monkeypatch):
    """11 launches, of which 7 are products."""
    forward, backward = step(launches, vendor=True, monkeypatch=monkeypatch, passes=2, num_passes=2)
    assert forward == ["operands", "mm", "float_product", "low_rank_add"]
    assert len(forward + backward) == 11


def test_a_step_of_lora(launches, monkeypatch):
    for vendor, product in ((True, ["float_product", "low_rank_add"]), (False, ["low_rank_matmul"])):
        forward, backward = step(launches, vendor=vendor, monkeypatch=monkeypatch, method="lora")
        assert forward == ["operands", "mm", *product]
        assert backward == [*BACKWARD, *product]
    _, backward = step(launches, vendor=True, monkeypatch=monkeypatch, method="lora", rank=16, alpha=16.0)
    assert "adapter_grads" not in backward  # nothing is left to do


def test_a_loop_of_ones_own_takes_the_base_norm_in_the_same_pass(launches):
    base = nn.Linear(48, 32, dtype=torch.float16).requires_grad_(False)
    layer = adapt_layer(base, DoRASpec(4), forward=dora_linear.TRITON)
    x = torch.randn(20, 48, dtype=torch.float16)
    with launches, torch.no_grad():
        layer(x)
    assert launches.names[:4] == NORM
    assert "linalg_vector_norm" not in launches.names


def test_another_strength_in_fp32_takes_the_product_of_the_vendor(launches):
    """Our tiles are for half precision: in fp32 one of them takes 321 KiB of an H100's 227."""
    base = nn.Linear(48, 32).requires_grad_(False)
    layer = reference.randomize(adapt_layer(base, DoRASpec(4), forward=dora_linear.TRITON))
    layer.set_strength(0.5)
    x = torch.randn(20, 48, requires_grad=True)
    y = layer(x)
    with launches:
        torch.autograd.grad(y.sum(), x)
    assert launches.names[-2:] == ["float_product", "low_rank_add"]
    assert "low_rank_matmul" not in launches.names


def test_another_strength_prepares_no_operand(launches):
    base = nn.Linear(48, 32, dtype=torch.float16).requires_grad_(False)
    layer = reference.randomize(adapt_layer(base, DoRASpec(4, method="lora"), forward=dora_linear.TRITON))
    layer.set_strength(0.5)
    with launches, torch.no_grad():
        layer(torch.randn(20, 48, dtype=torch.float16))
    assert "operands" not in launches.names


@pytest.mark.parametrize(
    ("contender", "expected"), [("PEFT LoRA", (5, 7)), ("PEFT DoRA", (17, 16)), ("PEFT DoRA, fused", (10, 8))]
)
def test_a_step_of_peft(launches, monkeypatch, contender, expected):
    """A, B and m in half precision; three of the ten forward copy them in fp32."""
    monkeypatch.setitem(backend.CHOSEN, False, dora_linear.TRITON)
    monkeypatch.setattr("dora_mm.peft.formula.can_read", lambda t: False)  # as on a GPU
    monkeypatch.setattr("dora_mm.peft.layers.crossing", lambda *_: 0)
    base = nn.Linear(48, 32, bias=False, dtype=torch.float16).requires_grad_(False)
    model = nn.ModuleDict({"layer": CONTENDERS[contender](base, 4)})
    layer, x = model["layer"], torch.randn(20, 48, dtype=torch.float16, requires_grad=True)
    own, dY = [p for p in layer.parameters() if p.requires_grad], torch.ones(20, 32, dtype=torch.float16)

    def count():
        launches.names.clear()
        with launches:
            y = layer(x)
        num_forward = len(launches.names)
        with launches:
            torch.autograd.grad(y, [x, *own], dY)
        return num_forward, len(launches.names) - num_forward

    assert count() == expected
    if contender == "PEFT DoRA, fused":
        assert launches.names.count("output_grad") == launches.names.count("low_rank_add") == 1
        with fixed_norms(model):
            count()  # the first pass computes the norms
            assert count() == (3, 8)


def experts(launches, method, num_experts):
    """The launches of the first pass of a step, forward and backward, and of a later one, forward."""
    W0 = torch.randn(num_experts, 32, 48, dtype=torch.float16)
    A, B, m = torch.randn(num_experts, 4, 48), torch.randn(num_experts, 32, 4), W0.float().norm(dim=2)
    own = [t.requires_grad_() for t in ((A, B, m) if method == "dora" else (A, B))]
    x, dY = torch.randn(20, 48, dtype=torch.float16, requires_grad=True), torch.ones(20, 32, dtype=torch.float16)
    ends = torch.full((num_experts,), 20)
    cache = PassCache(n0=m.detach() if method == "dora" else None)
    adapter, options = Adapter(A, B, m if method == "dora" else None, 0.5), Options(GroupedOp(ends), cache=cache)
    found = []
    for backward in (True, False):
        launches.names.clear()
        with launches:
            y = dora_linear.TRITON(x, W0, None, [adapter], options)
        found.append(list(launches.names))
        launches.names.clear()
        if backward:
            with launches:
                torch.autograd.grad(y, [x, *own], dY)
            found.append(list(launches.names))
    return found


@pytest.mark.parametrize("num_experts", [2, 5])
def test_a_step_of_experts_takes_as_many_launches_as_one_of_a_matrix(launches, num_experts):
    products, sums = ["grouped_matmul"] * 2, ["grouped_outer"] * 2
    first, backward, later = experts(launches, "dora", num_experts)
    assert first == ["bmm", "grouped_norm", *products]
    assert backward == ["grouped_matmul", *sums, "grouped_dots", "grouped_matmul"]
    assert later == products
    first, backward, later = experts(launches, "lora", num_experts)
    assert first == later == products
    assert backward == ["grouped_matmul", *sums, "grouped_matmul"]
