"""Adapters of parameters (target_parameters), which stay PEFT's beside DoRA that runs fused."""

import copy

import peft
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import dora_mm
from tests.peft.models import train
from tests.shared.reference import relative_error
from tests.shared.vl.qwen_models import EXPERTS, qwen_tokenizer
from tests.shared.vl.sizes import text_config


def mixture():
    """A tiny language model with two layers of experts, adapted by PEFT: DoRA of attention, LoRA of experts."""
    torch.manual_seed(0)
    base = Qwen3MoeForCausalLM(Qwen3MoeConfig(**text_config(qwen_tokenizer(), "qwen3_moe", **EXPERTS)))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]), "dora")
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    model.add_adapter("experts", peft.LoraConfig(r=2, target_modules=[], target_parameters=parameters))
    model.base_model.set_adapter(["dora", "experts"])
    train(model)
    return model.eval()


def test_parameters_are_reported_by_their_paths_and_stay_peft():
    theirs = mixture()
    ours = copy.deepcopy(theirs)
    report = dora_mm.fuse_peft(ours)
    assert [path.split(".")[-1] for path, _ in report.fused] == ["q_proj", "q_proj"]
    ((why, stock),) = report.stock.items()
    assert why == "LoRA of parameters, for which PEFT has no DoRA (dora_mm.inject has one for stacked experts)"
    paths = [f"{n}.mlp.experts.{name}" for n in (0, 1) for name in ("down_proj", "gate_up_proj")]
    assert sorted(stock) == [(f"base_model.model.model.layers.{path}", "experts") for path in paths]
    assert f"4 layers (2 down_proj, 2 gate_up_proj) stay PEFT's: {why}" in str(report)

    ids = torch.tensor([[5, 9, 12, 7]])
    with torch.no_grad():
        expected, found = theirs(input_ids=ids).logits, ours(input_ids=ids).logits
        with theirs.disable_adapter():
            assert relative_error(theirs(input_ids=ids).logits, expected) > 1e-4
    assert relative_error(found, expected) < 2e-6
