"""Tiny stand-ins for the inputs of PEFT's comparisons, with random weights: for a dry run."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

from tests.benchmarks.gpu.published.inputs import MODELS, Inputs, write_lines
from tests.shared.images import tiny_flux2_klein
from tests.shared.vl.vocabularies import qwen

NUM_IMAGES = 20
TINY_SETTINGS: dict[str, dict[str, Any]] = {
    "MetaMathQA": {"dtype": "float32", "max_steps": 4, "eval_steps": 2, "batch_size": 2}
    | {"generation_kwargs": {"max_length": 120, "max_new_tokens": 3}},
    "image-gen": {"dtype": "float32", "max_steps": 4, "eval_steps": 2, "resolution": 64, "num_inference_steps": 1}
    | {"max_sequence_length": 16, "text_encoder_out_layers": [9, 18, 27], "repeats": 2}
    | {"drift_image_prompts": ["a boat", "a tower"]},
}


def tiny_inputs(folder: Path) -> Inputs:
    """Makes a folder of inputs."""
    inputs = Inputs(folder)
    language, images, features = (inputs.model(name) for name in MODELS)
    tokenizer = qwen()
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**size, num_key_value_heads=2, vocab_size=len(tokenizer))).save_pretrained(language)
    tokenizer.save_pretrained(language)
    tiny_flux2_klein.build(images)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(features)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    BitImageProcessor(**size).save_pretrained(features)
    sums = [{"query": f"What is {a} + {a}?", "response": f"It is.\nThe answer is: {a + a}"} for a in range(16)]
    write_lines(folder / "metamathqa.jsonl", sums)
    for name in ("gsm8k_valid", "gsm8k_test"):
        write_lines(folder / f"{name}.jsonl", [{"query": "What is 1 + 2?", "response": "1 + 2 = 3\n#### 3"}] * 2)
    write_lines(folder / "wiki.jsonl", [{"text": "A tower is a tall building."}] * 3)
    (folder / "cats").mkdir()
    for number in range(NUM_IMAGES):
        Image.new("RGB", (40 + number, 50), (10 * number, 90, 30)).save(folder / "cats" / f"{number:02d}.png")
    (folder / "revisions.json").write_text(json.dumps({MODELS[0]: {"sha": "0" * 40, "created_at": "2024-09-18"}}))
    return inputs
