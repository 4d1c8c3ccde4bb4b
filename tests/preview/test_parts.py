"""The table of what is trained, part by part."""

import re

import pytest

from dora_mm.adapting.networks import TrainedNetworks, adapt
from dora_mm.config.adapter import VLAdapterConfig
from dora_mm.config.models import VisionConfig, VLMModelConfig
from dora_mm.config.training import OptimizerConfig
from dora_mm.models.vl.families import structure_of
from dora_mm.preview.parts import parts_table
from tests.shared.vl import tiny_vlm as tiny

PARTS = {
    "text.attn": {},
    "text.mlp": {"rank": 4, "lr": 0.002},
    "vision.attn": {"method": "lora"},
    "connector": {"method": "full", "lr": 0.001},
}


def table_of(folder, adapter: dict) -> tuple[TrainedNetworks, dict[str, list[str]]]:
    """What is trained, and the cells of the table by the first one."""
    structure = structure_of(VLMModelConfig(path=str(folder)), VisionConfig())
    config = VLAdapterConfig.model_validate({"rank": 2, **adapter})
    networks = structure.networks, structure.target_maps
    trained = adapt(*networks, config, seed=0, backend="torch")
    lines = parts_table(trained, *networks, config, OptimizerConfig(lr=0.01)).splitlines()
    return trained, {cells[0]: cells[1:] for cells in (re.split(r"\s{2,}", line) for line in lines)}


def test_parts_with_settings_of_their_own(tiny_vlm):
    _, rows = table_of(tiny_vlm("qwen2_5_vl"), {"alpha": 4.0, "parts": PARTS, "extra_trainable": ["norms"]})
    assert rows["part"] == ["modules", "method", "rank", "alpha", "lr", "count", "parameters"]
    assert rows["text.attn"][:6] == ["q_proj, k_proj, v_proj, o_proj", "dora", "2", "4", "0.01", "8"]
    assert rows["text.mlp"][1:6] == ["dora", "4", "8", "0.002", "6"]
    assert rows["vision.attn"][:6] == ["qkv, proj", "lora", "2", "4", "0.01", "4"]
    assert rows["connector"][:4] == ["mlp.0, mlp.2", "full", "0.001", "2"]
    assert rows["vision.mlp"] == ["gate_proj, up_proj, down_proj", "frozen", "6"]
    assert rows["extra: norms"][:2] == ["full", "0.01"]
    two_layers = sum(2 * (32 + out) + out for out in (32, 16, 16, 32)) * 2  # A and B of rank 2, and m
    assert rows["text.attn"][6] == f"{two_layers:,}"


def test_alpha_is_that_of_the_config_where_it_is_scaled_by_a_root(tiny_vlm):
    _, rows = table_of(tiny_vlm("qwen2_5_vl"), {"alpha": 4.0, "scaling": "sqrt", "parts": ["text.attn"]})
    assert rows["text.attn"][1:4] == ["dora", "2", "4 x sqrt(2)"]


def test_a_long_pattern_is_shown_by_its_parts(tiny_vlm):
    frozen = "visual|vision|audio|vpm|projector|connector|resampler|aligner|mlp1"
    pattern = rf"re:(?!.*(?:{frozen})).*\b(?:q_proj|up_proj)"
    _, rows = table_of(tiny_vlm("qwen2_5_vl"), {"parts": {pattern: {}, "v_proj": {}}})
    assert rows["pattern in text.attn, text.mlp"][0] == "q_proj, up_proj"
    assert rows["v_proj"][0] == "v_proj"


SETTINGS = [
    {},
    {"method": "full"},
    {"method": "full", "extra_trainable": ["biases"]},
    {"parts": ["text.attn", "text.mlp"], "extra_trainable": ["biases", "norms", "embeddings"]},
    {"parts": {"text.attn": {"method": "magnitude"}, "text.mlp": {"method": "full"}}, "extra_trainable": ["norms"]},
]
FEW = ("llava", "qwen2_5_vl", "florence2")
CASES = [
    (adapter, name) if name in FEW or adapter is SETTINGS[3] else pytest.param(adapter, name, marks=pytest.mark.slow)
    for adapter in SETTINGS
    for name in tiny.NAMES
]


@pytest.mark.parametrize(("adapter", "name"), CASES)
def test_the_parts_add_up_to_all_that_is_trained(name, adapter, tiny_vlm):
    trained, rows = table_of(tiny_vlm(name), adapter)
    number = {first: int(cells[-1].replace(",", "")) for first, cells in rows.items() if first != "part"}
    (total,) = rows["all"]
    parts = [value for first, value in number.items() if first != "all" and "frozen" not in rows[first]]
    assert total == f"{trained.num_trained:,}"
    assert sum(parts) == trained.num_trained
