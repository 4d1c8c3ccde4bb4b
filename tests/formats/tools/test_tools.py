"""What the tools compute from adapter files: against files and weights that the tools wrote, else by hand."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dora_mm.formats.adapter_file import AdapterFile
from dora_mm.formats.algebra.exact import new_weight
from dora_mm.formats.naming.spellings import Names
from dora_mm.formats.tools import tool_of
from tests.shared import toy

FIXTURES = Path(__file__).parents[1] / "fixtures"
WRITTEN = {  # by the tool that wrote it
    "peft": ("peft_dora", "peft_lora", "peft_rslora"),
    "diffusers": ("diffusers",),
    "kohya": ("lycoris_out", "lycoris_in", "lycoris_tucker", "lycoris_rs"),
}
FILES = [(tool, name) for tool, names in WRITTEN.items() for name in names]
STRENGTHS = (0.0, 0.5, 1.0)


def path_of(name):
    return FIXTURES / name if (FIXTURES / name).is_dir() else FIXTURES / f"{name}.safetensors"


@pytest.fixture(scope="module")
def expected():
    return load_file(FIXTURES / "expected.safetensors")


def modules_of(file):
    """(module name in the file, its name, W0); PEFT's files of the toy model are of its unet."""
    names = Names([name for name in toy.SHAPES if name.component == "unet" or file.tool != "peft"])
    weights = toy.base()
    for module in file.modules:
        (name,) = names.read(module).names
        yield module, name, weights[name]


@pytest.mark.parametrize(("tool", "name"), FILES)
def test_a_file_is_recognised(tool, name):
    assert AdapterFile(path_of(name)).tool == tool


@pytest.mark.parametrize(("tool", "name"), FILES)
def test_a_file_means_what_its_tool_computes(tool, name, expected):
    file = AdapterFile(path_of(name))
    found = list(modules_of(file))
    assert len(found) >= 5
    for module, neutral, W0 in found:
        W = new_weight(file.layer(module), W0)
        torch.testing.assert_close(toy.probe(W).float(), expected[f"{name}/{neutral}@1"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize(("tool", "name"), FILES)
def test_apply_is_what_the_tool_computes(tool, name, strength, expected):
    file = AdapterFile(path_of(name))
    for module, neutral, W0 in modules_of(file):
        W = tool_of(tool).computes.apply(file.parts(module, tool_of(tool)), W0, strength)
        wanted = expected[f"{name}/{neutral}@{strength:g}"]
        torch.testing.assert_close(toy.probe(W).float(), wanted, rtol=1e-5, atol=1e-5)


# --- the tools that do not install here: their formulas, written out --------------------------------------------------


LINEAR, SQUARE, CONV = toy.UNET[2], toy.UNET[0], toy.UNET[4]
SHAPES = pytest.mark.parametrize("name", [LINEAR, SQUARE, CONV], ids=["linear", "square", "conv"])


def parts_of(layer, ones=(), alpha=True):
    """The tensors as kohya's scripts write them, put together by hand."""
    A, B = layer.tensors["lora_A"], layer.tensors["lora_B"]
    parts = {"A": A, "B": B.view(*B.shape, *(1,) * (A.dim() - 2))}
    if alpha:
        parts["alpha"] = torch.tensor(layer.spec.alpha)
    if "magnitude" in layer.tensors:
        kernel = (1,) * (A.dim() - 2)
        parts["m"] = layer.tensors["magnitude"].view((-1, 1, *kernel) if layer.axis == "out" else (1, -1, *kernel))
    return parts


def check(tool, parts, W0, wanted, strength=1.0):
    found = tool_of(tool).computes.apply(parts, W0, strength)
    torch.testing.assert_close(found, wanted.float(), rtol=2e-5, atol=2e-6)


def by_hand(name, *, axis="out", divided_by="updated", s=0.5, t=1.0, **settings):
    layer, W0 = toy.layer(name, axis=axis, **settings), toy.base()[name]
    m = layer.tensors.get("magnitude")
    wanted = toy.textbook(W0, layer.tensors["lora_A"], layer.tensors["lora_B"], m, s, axis, divided_by, t)
    return parts_of(layer), W0, wanted


@SHAPES
@pytest.mark.parametrize("t", [0.5, 1.0])
@pytest.mark.parametrize(
    ("tool", "axis", "divided_by"),
    [
        ("comfy", "out", "base"),
        ("comfy", "in", "updated"),
        ("a1111", "in", "updated"),
        ("invokeai", "in", "updated"),
        ("forge", "out", "base"),
        ("sdnext", "out", "updated"),
        ("sdnext", "in", "updated"),
        ("onetrainer", "in", "updated"),
        ("onetrainer", "out", "updated"),
    ],
)
def test_dora_scale(tool, axis, divided_by, name, t):
    parts, W0, wanted = by_hand(name, axis=axis, divided_by=divided_by, t=t)
    check(tool, parts, W0, wanted, t)


@pytest.mark.parametrize("axis", ["out", "in"])
def test_sdnext_takes_a_flat_magnitude_for_rows_only_where_it_cannot_be_of_columns(axis):
    parts, W0, wanted = by_hand(SQUARE, axis="in")
    check("sdnext", {**parts, "m": parts["m"].flatten()}, W0, wanted)
    parts, W0, wanted = by_hand(LINEAR, axis=axis)
    flat = {**parts, "m": parts["m"].flatten()}
    if axis == "in":
        check("sdnext", flat, W0, wanted)
    else:
        with pytest.raises(RuntimeError):
            tool_of("sdnext").computes.apply(flat, W0, 1.0)


@pytest.mark.parametrize("tool", ["a1111", "invokeai"])
def test_a_magnitude_of_rows_is_broadcast_over_columns(tool):
    parts, W0, _ = by_hand(LINEAR)
    V = W0 + 0.5 * parts["B"] @ parts["A"]
    wanted = torch.stack([V[:, i] / V[:, i].norm() for i in range(V.shape[1])], 1) * parts["m"]
    check(tool, parts, W0, wanted)


@pytest.mark.parametrize("tool", ["comfy"])
def test_a_flat_magnitude_raises_or_is_broadcast(tool):
    parts, W0, _ = by_hand(LINEAR)
    with pytest.raises(RuntimeError):
        tool_of(tool).computes.apply({**parts, "m": parts["m"].flatten()}, W0, 1.0)
    parts, W0, _ = by_hand(SQUARE)
    V = W0 + 0.5 * parts["B"] @ parts["A"]
    n = (W0 if tool == "comfy" else V).norm(dim=1)
    m = parts["m"].flatten()
    wanted = torch.stack([V[i] * m / n[i] for i in range(len(V))])
    check(tool, {**parts, "m": m}, W0, wanted)


@SHAPES
@pytest.mark.parametrize("tool", ["kohya", "comfy", "a1111", "sdnext", "invokeai", "onetrainer"])
def test_plain_lora(tool, name):
    parts, W0, wanted = by_hand(name, method="lora", t=0.7)
    check(tool, parts, W0, wanted, 0.7)


@SHAPES
@pytest.mark.parametrize("tool", ["kohya", "comfy", "a1111", "sdnext", "invokeai"])
def test_a_difference(tool, name):
    W0, diff = toy.base()[name], toy.wave(toy.SHAPES[name], 5).float()
    check(tool, {"diff": diff}, W0, W0 + 0.5 * diff, 0.5)


@pytest.mark.parametrize("t", [0.5, 1.0])
@pytest.mark.parametrize("alpha", [True, False])
def test_ai_toolkit(alpha, t):
    """W0 + t s B A + (m / ||W0 + t B A|| - 1) (W0 + t B A)."""
    layer, W0 = toy.layer(LINEAR), toy.base()[LINEAR]
    A, B, m = (layer.tensors[name] for name in ("lora_A", "lora_B", "magnitude"))
    wanted = torch.empty_like(W0)
    for i, row in enumerate(W0):
        V = row + t * B[i] @ A
        wanted[i] = row + t * (0.5 if alpha else 1.0) * B[i] @ A + (m[i] / V.norm() - 1) * V
    check("ai-toolkit", {**parts_of(layer, alpha=alpha), "m": m}, W0, wanted, t)


def test_the_paper():
    parts, W0, wanted = by_hand(LINEAR)
    check("peft", parts, W0, wanted)
