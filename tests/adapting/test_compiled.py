"""Compiled blocks: the same losses, gradients and files, in the steps alone; one graph for blocks of a kind."""

import copy

import pytest
import torch
import torch._inductor.exc
from torch import nn
from torch.utils.checkpoint import checkpoint

from dora_mm import targets
from dora_mm.adapting import compiled
from dora_mm.adapting.compiled import check_compiler, compile_blocks, compiled_line
from dora_mm.cli import user_message
from dora_mm.core import DoRASpec, TargetMap, adapter_parameters, fixed_parameters, inject
from dora_mm.core.targets import match_modules
from dora_mm.models.streaming import repeated_blocks

MAP = TargetMap("two", {"p": ("first", "second")}, {"Twice": 2})
EAGER = {"backend": "aot_eager"}  # traces forward and backward, and needs no C++ compiler
UNMERGED, MERGED = 4, 64  # tokens, for which the layers below take that form


class Twice(nn.Module):
    """A block of two layers."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(width, width), nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x):
        return x + self.second(torch.tanh(self.first(self.norm(x))))


class Stack(nn.Module):
    """Two such blocks."""

    def __init__(self, checkpointing: bool):
        super().__init__()
        self.blocks, self.checkpointing = nn.ModuleList([Twice(), Twice()]), checkpointing

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return x


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    monkeypatch.setattr(compiled, "COMPILER", EAGER)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def num_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def stack(*, checkpointing=False, **spec) -> nn.Module:
    """The two blocks, with an adapter as after some training."""
    torch.manual_seed(0)
    model = Stack(checkpointing).requires_grad_(False)
    inject(model, MAP, DoRASpec(rank=2, **spec))
    for name, parameter in adapter_parameters(model).items():
        drawn = torch.randn_like(parameter)
        parameter.data = parameter * (1 + 0.1 * drawn) if name.endswith("magnitude") else parameter + 0.1 * drawn
    return model.train()


def steps(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Loss and gradients of an optimizer step of two micro-batches, and of a second step, as the loop has them."""
    parameters, found = list(adapter_parameters(model).values()), []
    with fixed_parameters(model, base_only=True):
        for _ in range(2):
            with fixed_parameters(model, num_passes=2):
                for _ in range(2):
                    torch.manual_seed(1)
                    loss = model(x).square().mean()
                    found += [loss.detach(), *torch.autograd.grad(loss, parameters)]
    return found


FORMS = [
    ({"method": "dora"}, UNMERGED, False),
    ({"method": "dora"}, MERGED, True),
    ({"method": "lora", "dropout": 0.5}, MERGED, False),
    pytest.param({"method": "magnitude"}, MERGED, False, marks=pytest.mark.slow),
    pytest.param({"method": "full"}, UNMERGED, False, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("spec", "tokens", "checkpointing"), FORMS)
def test_losses_and_gradients_are_within_the_bound_of_the_formula(spec, tokens, checkpointing):
    """And equal in all passes, with one graph for both blocks, in the first pass of a step and in others."""
    model, x = stack(checkpointing=checkpointing, **spec), torch.randn(tokens, 16, requires_grad=True)
    exact, eager = steps(copy.deepcopy(model).double(), x.double()), steps(model, x)
    names = list(dict(model.named_parameters())), list(model.state_dict())
    compile_blocks({"model": model}, {"model": MAP})
    found = steps(model, x)
    if not spec.get("dropout"):  # drawn in float64, the mask is another one
        for value, plain, right in zip(found, eager, exact, strict=True):
            bound = 2 * (plain - right).norm() + torch.finfo(torch.float32).eps * right.norm()
            assert (value - right).norm() <= bound + 1e-6 * right.norm()
    else:
        for value, plain in zip(found, eager, strict=True):
            torch.testing.assert_close(value, plain, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(*pair) for pair in zip(found, found[len(found) // 4 :], strict=False))
    assert num_graphs() == 1
    assert (list(dict(model.named_parameters())), list(model.state_dict())) == names


def test_evaluation_is_as_without():
    """In every bit, at strength 0 too, and without another graph; and so is a training of other sizes afterwards."""
    model, x = stack(), torch.randn(4, 16, requires_grad=True)
    plain = copy.deepcopy(model)
    compile_blocks({"model": model}, {"model": MAP})
    steps(model, x)
    graphs = num_graphs()
    for each in (model, plain):
        each.eval()
    assert torch.equal(model(x), plain(x))
    assert num_graphs() == graphs
    torch.testing.assert_close(steps(model.train(), x), steps(plain.train(), x))
    assert num_graphs() == graphs


def test_the_blocks_are_those_that_diffusers_or_the_map_name():
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    from tests.shared.full_size import SMALL_SIZE

    small = {"d_model": 8, "vocab_size": 20, "encoder_layers": 1, "decoder_layers": 2}
    small |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**SMALL_SIZE)
        bart = transformers.BartModel(transformers.BartConfig(**small))
    maps = {"unet": targets.find("sdxl-unet"), "model": targets.find("bart")}
    blocks = "4 BasicTransformerBlock of unet, 1 BartEncoderLayer of model, 2 BartDecoderLayer of model"
    line = f"compiled  {blocks}, in the steps alone; any time below is without"
    assert compiled_line({"unet": unet, "model": bart}, maps) == line


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "smolvlm", "florence2", "git", "blip2", "mllama"])
def test_blocks_of_models_with_a_derived_map_hold_all_attention(name):
    from tests.shared.vl import tiny_vlm as tiny

    with torch.device("meta"), torch.random.fork_rng():
        model, _ = tiny.BUILDERS[name]()
    chosen = targets.derived.derive(model)
    blocks = {id(module) for block in repeated_blocks(model, chosen) for module in block.modules()}
    adapted = {path: part for path, part in match_modules(model, chosen).items() if part != "connector"}
    assert [path for path in adapted if id(model.get_submodule(path)) not in blocks] == []
    for block in repeated_blocks(model, chosen):
        assert "." not in type(block).__name__
        assert any("ttention" in type(module).__name__ for module in block.modules()), type(block)


def test_a_mistake_where_nothing_can_be_compiled(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler\nand more")

    check_compiler(torch.device("cpu"))
    monkeypatch.setattr(compiled, "COMPILER", {"backend": broken})
    with pytest.raises(ValueError, match="train.compile: torch.compile does not work here, where") as error:
        check_compiler(torch.device("cpu"))
    assert "no C++ compiler" in str(error.value)
    assert "more" not in str(user_message(error.value)).replace("compiler", "")
    model = stack()
    compile_blocks({"model": model}, {"model": MAP})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as failed:
        model(torch.randn(4, 16))
    of_the_backward_pass = torch._inductor.exc.InductorError(RuntimeError("no C++ compiler\nand more"), None)
    for each in (failed.value, of_the_backward_pass):
        sentence = "train.compile: a block cannot be compiled (no C++ compiler): leave it out"
        assert user_message(each) == sentence
