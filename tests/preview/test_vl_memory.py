"""Memory of vision-language models without a step."""

import pytest
import torch
from accelerate import Accelerator
from transformers import LlavaConfig, LlavaForConditionalGeneration

from dora_mm.adapting.networks import adapt
from dora_mm.config.adapter import VLAdapterConfig
from dora_mm.config.training import TrainConfig
from dora_mm.models.folders import empty_model
from dora_mm.models.vl.families import Structure
from dora_mm.preview.questions import LargestBatch
from dora_mm.preview.training import measure_step
from dora_mm.preview.vl_memory import estimated_activations, network_parts, quantized_bytes
from dora_mm.targets import map_of
from tests.models.vl.vlm import tiny
from tests.train.small import mean_of

TOKENS = 256


@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_parts_of_a_network_hold_all_of_it_once(name, tiny_vlm):
    network = empty_model(str(tiny_vlm(name)))
    parts = network_parts({"model": network})
    assert len(parts) >= 4
    assert list(parts)[-1] == "model"
    held = {id(parameter) for part in list(parts.values())[:-1] for parameter in part.parameters()}
    rest = [name for name, parameter in network.named_parameters() if id(parameter) not in held]
    assert len(rest) <= 1  # a single parameter beside the parts, such as an embedding of queries


def wide_llava() -> LlavaForConditionalGeneration:
    text = {"model_type": "llama", "vocab_size": 300, "hidden_size": 256, "intermediate_size": 688}
    text |= {"num_hidden_layers": 3, "num_attention_heads": 4}
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "projection_dim": 32}
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=5, image_seq_length=4)
    return LlavaForConditionalGeneration(config).requires_grad_(False)


@pytest.mark.parametrize(
    "adapter",
    [
        {"parts": ["text.attn", "text.mlp"]},
        {"parts": ["text.attn", "text.mlp"], "method": "lora"},
        {"parts": ["text.attn"]},
        {"parts": {"connector": {"method": "full"}}},
    ],
    ids=["dora", "lora", "attn", "connector"],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_is_near_to_what_a_step_keeps(adapter, checkpointing):
    network = wide_llava()
    targets = map_of(network)
    structure = Structure({"model": network}, {"model": targets})
    config = VLAdapterConfig.model_validate({"rank": 4, **adapter})
    trained = adapt(structure.networks, structure.target_maps, config, seed=0, backend="torch")
    if checkpointing:
        network.activation_checkpointing_enable()
    network.train()
    ids = torch.full((1, TOKENS), 7)
    ids[0, :4] = 5
    inputs = {"input_ids": ids, "pixel_values": torch.zeros(1, 3, 28, 28), "use_cache": False, "logits_to_keep": 1}
    optimizer = torch.optim.SGD(trained.parameters.values(), lr=0.0)
    kept = measure_step(
        accelerator=Accelerator(),
        config=TrainConfig(steps=1, batch_size=1),
        seed=0,
        networks=trained.networks,
        parameters=trained.parameters,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.ConstantLR(optimizer),
        batch_at=lambda number: inputs,
        loss=lambda batch, stream: mean_of(network(**batch).logits.square()),
    ).activations

    batch = LargestBatch("chat", [0], TOKENS, 0)
    estimate = estimated_activations(network, targets, trained.reports.get("model"), batch, 4, False)
    if not checkpointing:
        assert kept * 0.75 < estimate < kept * 1.35
        return
    recomputed = estimated_activations(network, targets, trained.reports.get("model"), batch, 4, True)
    layer = estimate / 3  # recomputed in the backward pass, one at a time
    assert kept * 0.75 < recomputed - layer < kept * 1.35


def test_logits_are_counted_for_the_tokens_of_text():
    network = wide_llava()
    counts = [
        estimated_activations(network, map_of(network), None, LargestBatch("chat", [0, 1], 64, text), 2, False)
        for text in (0, 10)
    ]
    assert counts[1] - counts[0] == 2 * 10 * 300 * 12


def test_quantised_weights_are_those_of_the_linear_layers_but_the_logits(tiny_vlm):
    network = empty_model(str(tiny_vlm("llava")))
    assert quantized_bytes(network, None) == {}
    stored = quantized_bytes(network, "int8")
    layers = {n: m for n, m in network.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert stored == {id(layer.weight): layer.weight.numel() for layer in layers.values()}
    four = quantized_bytes(network, "nf4")
    assert all(0.5 < four[key] / stored[key] < 0.56 for key in stored)
