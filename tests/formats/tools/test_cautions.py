"""What tools compute of a DoRA beside another adapter, and of one without its magnitude: what their cautions say.

Errors are those of the sum of both changes, over four layers of rank 8; docs/checked_vl.md has these numbers.
"""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from dora_mm.core.spec import DoRASpec
from dora_mm.formats.algebra import exact
from dora_mm.formats.naming.names import Name
from dora_mm.formats.state import LayerState
from dora_mm.formats.tools import tool_of
from dora_mm.formats.tools.formulas import AFTER_ANOTHER, IN_TURN
from dora_mm.formats.tools.parts import kohya_tensors
from dora_mm.registries.tools import other_tools
from pipelines import verify
from tests.formats.commands.test_verify import OUT_96, for_comfy, random_base, random_layer, write_kohya

Applied = Callable[[Tensor], Tensor]  # a weight -> the weight after an adapter was loaded
IN_TURN_TOOLS = [tool for tool in other_tools() if IN_TURN in tool_of(tool).cautions]


def loaded(tool: str, name: Name, layer: LayerState, W0: Tensor, drop: Sequence[str] = ()) -> Applied:
    """What a tool does to a weight with the tensors of a module."""
    tensors = {end: tensor for end, tensor in kohya_tensors(layer).items() if end not in drop}
    parts = tool_of(tool).loaded(f"lora_unet_{name.path.replace('.', '_')}", tensors, {})
    return lambda W: tool_of(tool).computes.apply(parts, W, 1.0)


def error_in_turn(tool: str, kinds: str) -> float:
    """How far two adapters, loaded in turn, are from the sum of what each does alone."""
    off = size = 0.0
    for seed, (name, W0) in enumerate(random_base(OUT_96).items()):
        steps = []
        for number, kind in enumerate(kinds.split()):
            layer = random_layer(W0, seed + 50 * number)
            layer = for_comfy(layer, W0) if tool == "comfy" else layer
            applied = loaded(tool, name, layer, W0, drop=() if kind == "dora" else ("dora_scale",))
            if kind == "diff":
                difference = LayerState(DoRASpec(method="full"), {"diff": exact.difference(layer, W0)})
                applied = loaded(tool, name, difference, W0)
            steps.append(applied)
        W = W0
        for applied in steps:
            W = applied(W)
        wanted = sum((applied(W0) - W0 for applied in steps), torch.zeros_like(W0))
        off += float((W - W0 - wanted).norm() ** 2)
        size += float(wanted.norm() ** 2)
    return math.sqrt(off / size)


@pytest.mark.parametrize("tool", IN_TURN_TOOLS)
def test_a_dora_after_another_adapter_is_not_the_sum(tool):
    assert error_in_turn(tool, "lora dora") > 0.1
    assert error_in_turn(tool, "dora dora") > 0.1
    assert error_in_turn(tool, "dora lora") < 1e-6
    assert error_in_turn(tool, "diff diff") < 1e-6


@pytest.mark.parametrize(("tool", "measured"), [("comfy", (0.21, 0.12)), ("a1111", (0.25, 0.28))])
def test_the_documented_errors(tool, measured):
    for kinds, wanted in zip(("lora dora", "dora dora"), measured, strict=True):
        assert error_in_turn(tool, kinds) == pytest.approx(wanted, abs=0.006)


@pytest.mark.parametrize(("kinds", "wanted"), [("lora dora", 0.07), ("dora dora", 0.07), ("dora lora", 0.0)])
def test_peft_adds_a_dora_to_what_an_earlier_adapter_returns(kinds, wanted):
    assert all(AFTER_ANOTHER in caution for caution in tool_of("peft").cautions)
    off = size = 0.0
    for seed, W0 in enumerate(random_base(OUT_96).values()):
        model = nn.ModuleDict({"layer": nn.Linear(W0.shape[1], W0.shape[0], bias=False)})
        model["layer"].weight.data.copy_(W0)
        adapted, changes = None, torch.zeros_like(W0)
        for number, kind in enumerate(kinds.split()):
            layer = random_layer(W0, seed + 50 * number)
            config = LoraConfig(r=8, lora_alpha=4, target_modules=["layer"], use_dora=kind == "dora")
            if adapted is None:
                adapted = get_peft_model(model, config, adapter_name="0")
            else:
                adapted.add_adapter(str(number), config)
            linear = adapted.base_model.model["layer"]
            linear.lora_A[str(number)].weight.data.copy_(layer.tensors["lora_A"])
            linear.lora_B[str(number)].weight.data.copy_(layer.tensors["lora_B"])
            if kind == "dora":
                linear.lora_magnitude_vector[str(number)].weight.data.copy_(layer.tensors["magnitude"])
                changes += exact.new_weight(layer, W0) - W0
            else:
                changes += layer.spec.scaling * layer.tensors["lora_B"] @ layer.tensors["lora_A"]
        adapted.base_model.set_adapter(["0", "1"])
        with torch.no_grad():
            W = adapted.eval().base_model.model["layer"](torch.eye(W0.shape[1])).T
        off += float((W - W0 - changes).norm() ** 2)
        size += float(changes.norm() ** 2)
    assert math.sqrt(off / size) == pytest.approx(wanted, abs=0.006)


def test_bypass_mode_leaves_the_magnitude_out():
    """ComfyUI's `LoRAAdapter.h` has the up and down weights and alpha alone."""
    off = size = 0.0
    for seed, (name, W0) in enumerate(random_base(OUT_96).items()):
        layer = random_layer(W0, seed)
        W = exact.new_weight(layer, W0)
        bypassed = loaded("comfy", name, for_comfy(layer, W0), W0, drop=("dora_scale",))(W0)
        off += float((bypassed - W).norm() ** 2)
        size += float((W - W0).norm() ** 2)
    assert math.sqrt(off / size) == pytest.approx(0.30, abs=0.006)


@pytest.mark.parametrize(
    ("tool", "drop", "said"),
    [
        ("comfy", (), ["before other adapters", "--to diff", "bypass mode"]),
        ("forge", (), ["before other adapters"]),
        ("comfy", ("dora_scale",), []),
        ("sdnext", (), []),
        ("diffusers", (), []),  # it drops this file's magnitudes anyway
    ],
)
def test_verify_warns_of_what_else_is_loaded(tool, drop, said, tmp_path):
    base = random_base(OUT_96)
    file = write_kohya(tmp_path / "a.safetensors", base, drop=drop)
    warned = verify.cautions(verify.verify(file, tool, base))
    assert all(words in warned for words in said)
    assert bool(warned) == bool(said)
    assert ("bypass" in warned) == ("bypass mode" in said)
