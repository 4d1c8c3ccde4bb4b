"""A training over an assistant, a frozen adapter: gradients, what is the base model, what is saved, what is refused."""

import copy

import pytest
import torch
from torch import nn

import dora_mm
from dora_mm import DoRASpec, formats
from dora_mm.config.training import OptimizerConfig
from dora_mm.core import AdaptedLayer, base_model, fixed_parameters, set_assistant_strength, set_strength
from dora_mm.preview.memory import memory_rows
from tests.shared import reference

METHODS = ("dora", "lora")
STRENGTH = 0.7


class Block(nn.Module):
    """Two layers that are trained, the first of which an assistant adapts, too, and one that it alone adapts."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.both, self.own, self.other = (nn.Linear(12, 12, dtype=dtype) for _ in range(3))

    def forward(self, x):
        return self.other(torch.tanh(self.own(torch.tanh(self.both(x)))))


def adapter_of(paths, method, seed, rank=3, dtype=torch.float64):
    """A block with a trained adapter at these layers."""
    block = Block(dtype)
    dora_mm.inject(block, paths, DoRASpec(rank=rank, alpha=2.0, method=method))
    for number, path in enumerate(paths):
        reference.randomize(block.get_submodule(path), size=0.3, seed=10 * seed + number)
    return block


def assisted(tmp_path, method="dora", of_assistant="lora", dtype=torch.float64):
    """A block that is trained over an assistant."""
    formats.save(adapter_of(["both", "other"], of_assistant, 1, dtype=dtype), tmp_path, format="native", metadata={})
    block = adapter_of(["both", "own"], method, 2, rank=2, dtype=dtype)
    formats.load(block, tmp_path, strength=STRENGTH, name="assistant", assists=True)
    return block


def effective(layer, *, merges=False):
    """W0 + (W_a - W0) + (W' - W0) of a layer in plain torch; `merges`: of an adapter over the assistant's weight."""
    state = layer.adaptation
    own = {name: layer.tensor(name) for name in ("lora_A", "lora_B", "magnitude")}
    adapters = [(own, state.spec, state.strength)] + [(s.tensors, s.spec, s.strength) for s in state.stacked.values()]
    changed = [
        reference.merged_weight(
            layer.weight,
            dora_mm.core.Adapter(
                t.get("lora_A"), t.get("lora_B"), t.get("magnitude"), spec.scaling, strength, spec.norm_grad
            ),
        )
        - layer.weight
        for t, spec, strength in adapters
    ]
    assert not merges or len(changed) == 2
    if not merges:
        return layer.weight + sum(changed)
    W_a, (tensors, spec, _) = layer.weight + changed[1], adapters[0]
    V = W_a + spec.scaling * tensors["lora_B"] @ tensors["lora_A"]
    if tensors["magnitude"] is None:
        return V
    return (tensors["magnitude"] / V.norm(dim=1).detach())[:, None] * V


def in_plain_torch(block, x, **how):
    y = x
    for name, then in (("both", torch.tanh), ("own", torch.tanh), ("other", nn.Identity())):
        layer = block.get_submodule(name)
        merges = how if name == "both" else {}
        y = then(y @ effective(layer, **merges).T + layer.bias)
    return y


def gradients(block, loss):
    parameters = dora_mm.adapter_parameters(block)
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def relative(one, other):
    return max(((one[name] - other[name]).norm() / other[name].norm()).item() for name in other)


@pytest.mark.parametrize("of_assistant", METHODS)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_the_sum_of_both_changes(tmp_path, method, of_assistant):
    block, x = assisted(tmp_path, method, of_assistant), torch.randn(40, 12, dtype=torch.float64)
    with fixed_parameters(block, num_passes=2):  # as in a step, with a pass without gradients before the other
        with torch.no_grad():
            unguided = block(x)
        y = block(x)
    assert relative({"y": y}, {"y": in_plain_torch(block, x)}) < reference.DOUBLE
    assert torch.equal(unguided, y)
    found = gradients(block, y.square().sum())
    assert relative(found, gradients(block, in_plain_torch(block, x).square().sum())) < reference.DOUBLE
    assert found.keys() == dora_mm.adapter_parameters(block).keys()
    assert {name.partition(".")[0] for name in found} == {"both", "own"}


@pytest.mark.parametrize("method", METHODS)
def test_a_lora_is_trained_as_over_the_merged_assistant_and_a_dora_is_not(tmp_path, method):
    """A DoRA's norm is that of W0 here, and of the assistant's weight there: docs/train_images.md."""
    block, x = assisted(tmp_path, method), torch.randn(40, 12, dtype=torch.float64)
    found = gradients(block, block(x).square().sum())
    difference = relative(found, gradients(block, in_plain_torch(block, x, merges=True).square().sum()))
    assert difference < reference.DOUBLE if method == "lora" else difference > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_both_it_is_the_base_by_bits_and_without_the_trained_one_the_assistant(tmp_path, dtype):
    block, x = assisted(tmp_path, dtype=dtype), torch.randn(40, 12, dtype=dtype)
    alone = Block(dtype)
    base = alone(x)
    formats.load(alone, tmp_path, strength=STRENGTH)
    with torch.no_grad(), fixed_parameters(block):
        both = block(x)
        with base_model([block], with_assistant=True):
            assert torch.equal(block(x), alone(x))
        assert torch.equal(block(x), both)
        with base_model([block]):
            assert torch.equal(block(x), base)
        assert torch.equal(block(x), both)
        set_strength(block, 0.0)
        assert torch.equal(block(x), base)
        set_assistant_strength(block, STRENGTH)
        assert torch.equal(block(x), alone(x))
        set_strength(block, 1.0)
        set_assistant_strength(block, 0.0)
    assert torch.equal(block(x), adapter_of(["both", "own"], "dora", 2, rank=2, dtype=dtype)(x))


@pytest.mark.parametrize("method", METHODS)
def test_the_saved_file_has_the_trained_adapter_alone(tmp_path, method):
    block = assisted(tmp_path / "assistant", method, "dora" if method == "lora" else "lora")
    formats.save(block, tmp_path / "found", format="native", metadata={})
    plain = adapter_of(["both", "own"], method, 2, rank=2)
    formats.save(plain, tmp_path / "expected", format="native", metadata={})
    found, expected = (formats.find_file(tmp_path / name).read_bytes() for name in ("found", "expected"))
    assert found == expected
    assert formats.adapters.why_not("peft", {"model": block}) is None  # of two methods, one of which is the assistant's


def test_its_memory_counts_as_frozen(tmp_path):
    block = assisted(tmp_path, dtype=torch.float32)
    ((name, _, size), *_) = memory_rows(
        {"transformer": block}, dora_mm.adapter_parameters(block), OptimizerConfig(lr=0.1), None
    )
    numbers = 3 * (12 * 12 + 12) + 2 * (2 * 3 * 12)  # of the base and of both layers of a LoRA of rank 3
    assert (name, size) == (f"transformer, {numbers} frozen in float32", 4 * numbers)


def test_the_assistant_gets_no_gradient_and_moves_with_the_model(tmp_path):
    block = copy.deepcopy(assisted(tmp_path, dtype=torch.float32)).to("meta")
    layers = [module for module in block.modules() if isinstance(module, AdaptedLayer)]
    assert [layer.adaptation.assists for layer in layers] == [False, False, True]
    assert not any(p.requires_grad for p in layers[2].adapter_tensors().values())
    assert all(t.is_meta for other in layers[0].adaptation.stacked.values() for t in other.tensors.values())
