"""Each tiny model loads as a published one would, sees its image and answers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from dora_mm.utils.digest import file_digest
from tests.shared.vl import tiny_vlm as tiny
from tests.shared.vl.tiny_passes import inputs, load, noise, scores, turn

CLASSES = {
    "llava": ("LlavaForConditionalGeneration", "LlavaProcessor"),
    "llava_onevision": ("LlavaOnevisionForConditionalGeneration", "LlavaOnevisionProcessor"),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", "Qwen2VLProcessor"),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLProcessor"),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", "Qwen3VLProcessor"),
    "smolvlm": ("SmolVLMForConditionalGeneration", "SmolVLMProcessor"),
    "idefics3": ("Idefics3ForConditionalGeneration", "Idefics3Processor"),
    "gemma3": ("Gemma3ForConditionalGeneration", "Gemma3Processor"),
    "internvl": ("InternVLForConditionalGeneration", "InternVLProcessor"),
    "mllama": ("MllamaForConditionalGeneration", "MllamaProcessor"),
    "fast_vlm": ("FastVlmForConditionalGeneration", "LlavaProcessor"),
    "paligemma": ("PaliGemmaForConditionalGeneration", "PaliGemmaProcessor"),
    "florence2": ("Florence2ForConditionalGeneration", "Florence2Processor"),
    "blip_vqa": ("BlipForQuestionAnswering", "BlipProcessor"),
    "blip2": ("Blip2ForConditionalGeneration", "Blip2Processor"),
    "git": ("GitForCausalLM", "GitProcessor"),
}
CHATML = "<|im_start|>user\n{image}What?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
VISION = "<|vision_start|><|image_pad|><|vision_end|>"
LLAMA3 = "<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"
WRITTEN = {  # a question about an image and its answer
    "llava": "USER: <image>\nWhat? ASSISTANT: red ",
    "llava_onevision": "<|im_start|>user <image>\nWhat?<|im_end|><|im_start|>assistant \nred<|im_end|>",
    "qwen2_vl": SYSTEM + CHATML.format(image=VISION),
    "qwen2_5_vl": SYSTEM + CHATML.format(image=VISION),
    "qwen3_vl": CHATML.format(image=VISION),
    "smolvlm": "<|im_start|>User:<image>What?<end_of_utterance>\nAssistant: red<end_of_utterance>\n",
    "idefics3": "<|begin_of_text|>User:<image>What?<end_of_utterance>\nAssistant: red<end_of_utterance>\n",
    "gemma3": "<bos><start_of_turn>user\n<start_of_image>What?<end_of_turn>\n<start_of_turn>model\nred<end_of_turn>\n",
    "internvl": CHATML.format(image="<IMG_CONTEXT>\n"),
    "mllama": "<|begin_of_text|>"
    + LLAMA3.format(role="user", text="<|image|>What?")
    + LLAMA3.format(role="assistant", text="red"),
    "fast_vlm": SYSTEM + "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n\nred<|im_end|>\n",
}


@pytest.mark.parametrize("name", tiny.NAMES)
def test_its_classes_are_those_of_the_published_model(tiny_vlm: Callable[[str], Path], name: str) -> None:
    model, processor = load(tiny_vlm(name))
    assert (type(model).__name__, type(processor).__name__) == CLASSES[name]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert bool(processor.chat_template) == (name in tiny.CHAT)


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.NAMES)
def test_it_sees_its_image_and_answers(tiny_vlm: Callable[[str], Path], name: str) -> None:
    model, processor = load(tiny_vlm(name))
    first, second = (scores(name, model, processor, noise(seed)) for seed in (0, 1))
    assert first.isfinite().all()
    assert (first - second).abs().max() > 1e-2
    answer = model.generate(**inputs(name, processor, noise(0)), max_new_tokens=4, do_sample=False)
    assert isinstance(processor.decode(answer[0], skip_special_tokens=True), str)


@pytest.mark.parametrize("name", tiny.CHAT)
def test_turns_are_written_as_the_published_template_writes_them(tiny_vlm: Callable[[str], Path], name: str) -> None:
    processor = AutoProcessor.from_pretrained(tiny_vlm(name))
    messages = [turn("user", noise(0), "What?"), turn("assistant", "red")]
    assert processor.apply_chat_template(messages) == WRITTEN[name]


@pytest.mark.parametrize("name", tiny.NAMES)
def test_it_is_the_same_every_time(tiny_vlm: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    again = tiny.build(name, tmp_path / name)
    files = sorted(path.name for path in again.iterdir())
    assert files == sorted(path.name for path in tiny_vlm(name).iterdir())
    for file in files:
        assert file_digest(again / file) == file_digest(tiny_vlm(name) / file), file
