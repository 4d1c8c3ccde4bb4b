"""dora-mm merge of adapters of stacked experts: plain transformers loads what it writes."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

import dora_mm
from dora_mm import DoRASpec
from dora_mm.cli import main
from dora_mm.core import adapted_layers
from tests.shared.reference import randomize

TARGETS = ["experts.gate_up", "experts.down", "self_attn.q_proj"]


@pytest.mark.parametrize(
    ("name", "dtype"),  # (E, O, I), and of Aria and Llama 4 (E, I, O)
    [
        ("qwen3_vl_moe", "bfloat16"),
        ("llama4", "float32"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("qwen3_vl_moe", "float32"),
                ("llama4", "bfloat16"),
                ("aria", "float32"),
                ("aria", "bfloat16"),
            )
        ),
    ],
)
def test_experts_are_merged(name, dtype, tiny_vlm, tmp_path):
    base, adapter, merged = str(tiny_vlm(name)), tmp_path / "adapter", tmp_path / "merged"
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype)
    before = model.state_dict()
    dora_mm.inject(model, TARGETS, DoRASpec(rank=2))
    for seed, layer in enumerate(adapted_layers(model).values()):
        randomize(layer, size=0.3, seed=seed)
    dora_mm.save_adapter(model, adapter, format="native")
    assert main(["merge", base, str(adapter), str(merged), "--dtype", dtype]) == 0

    dora_mm.merge(model, keep_base=False)  # rounded from the same seed
    dora_mm.remove(model)
    found = AutoModelForImageTextToText.from_pretrained(merged, dtype=dtype).state_dict()
    expected = model.state_dict()
    assert found.keys() == expected.keys() == before.keys()
    assert [key for key, tensor in found.items() if not torch.equal(tensor, expected[key])] == []
    changed = [key for key, tensor in found.items() if not torch.equal(tensor, before[key])]
    assert {key.rpartition(".")[2] for key in changed} == {"gate_up_proj", "down_proj", "weight"}
