"""Tiny models of the Qwen-VL classes."""

from typing import Any

import transformers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tests.shared.vl import vocabularies
from tests.shared.vl.sizes import SPREAD, text_config
from tests.shared.vl.templates import chatml

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SYSTEM = "You are a helpful assistant."
TOWER = SPREAD | {"depth": 2, "hidden_size": 32, "num_heads": 2}
SECTIONS = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]}  # of the 16 / 2 pairs of a head

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {  # of Qwen3.5's linear attention, in the first of two layers
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MROPE = SECTIONS | {"mrope_interleaved": True}


def pixels_of(patch_size: int) -> dict[str, Any]:
    """At least one token of 2 x 2 patches, at most four."""
    token = (2 * patch_size) ** 2
    return {"size": {"shortest_edge": token, "longest_edge": 4 * token}, "patch_size": patch_size}


def qwen_tokenizer() -> PreTrainedTokenizerBase:
    names = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    return vocabularies.qwen(extra_special_tokens=names)


def ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    names = {"vision_start": "vision_start", "vision_end": "vision_end", "image": "image_pad", "video": "video_pad"}
    return {f"{key}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}


def qwen2_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer, pixels = qwen_tokenizer(), pixels_of(14)
    images, videos = Qwen2VLImageProcessor(**pixels), Qwen2VLVideoProcessor(**pixels)
    config = Qwen2VLConfig(
        text_config=text_config(tokenizer, "qwen2_vl_text", rope_parameters=SECTIONS),
        vision_config=TOWER | {"embed_dim": 32, "mlp_ratio": 2},
        **ids(tokenizer),
    )
    processor = Qwen2VLProcessor(images, tokenizer, videos, chat_template=chatml(IMAGE, SYSTEM))
    return Qwen2VLForConditionalGeneration(config), processor


def qwen2_5_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer, pixels = qwen_tokenizer(), pixels_of(14)
    images, videos = Qwen2VLImageProcessor(**pixels), Qwen2VLVideoProcessor(**pixels)
    vision = {"intermediate_size": 48, "out_hidden_size": 32, "window_size": 56, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(
        text_config=text_config(tokenizer, "qwen2_5_vl_text", rope_parameters=SECTIONS),
        vision_config=TOWER | vision,
        **ids(tokenizer),
    )
    processor = Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=chatml(IMAGE, SYSTEM))
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.update(do_sample=True, temperature=1e-6, repetition_penalty=1.05)
    return model, processor


def qwen3_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer, pixels = qwen_tokenizer(), pixels_of(16)
    images = Qwen2VLImageProcessor(**pixels, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    videos = Qwen3VLVideoProcessor(**pixels)
    rope = SECTIONS | {"mrope_interleaved": True}
    vision = {"intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 16}
    config = Qwen3VLConfig(
        text_config=text_config(tokenizer, "qwen3_vl_text", head_dim=16, rope_parameters=rope),
        vision_config=TOWER | vision | {"deepstack_visual_indexes": [0]},
        **ids(tokenizer),
    )
    processor = Qwen3VLProcessor(images, tokenizer, videos, chat_template=chatml(IMAGE))
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.8, top_k=20)
    return model, processor


def _qwen3(kind: str, config: str, text: dict[str, Any], **vision: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = qwen_tokenizer()
    images = Qwen2VLImageProcessor(**pixels_of(16), image_mean=[0.5] * 3, image_std=[0.5] * 3)
    sizes = {"intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 16}
    made = getattr(transformers, config)(text_config=text, vision_config=TOWER | sizes | vision, **ids(tokenizer))
    processor = Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(**pixels_of(16)), chatml(IMAGE))
    return getattr(transformers, kind)(made), processor


def qwen3_vl_moe() -> tuple[PreTrainedModel, ProcessorMixin]:
    text = text_config(qwen_tokenizer(), "qwen3_vl_moe_text", head_dim=16, rope_parameters=MROPE, **EXPERTS)
    kind = "Qwen3VLMoeForConditionalGeneration"
    return _qwen3(kind, "Qwen3VLMoeConfig", text, deepstack_visual_indexes=[0])


def qwen3_5() -> tuple[PreTrainedModel, ProcessorMixin]:
    rope = MROPE | {"partial_rotary_factor": 1.0}
    text = text_config(qwen_tokenizer(), "qwen3_5_text", rope_parameters=rope, **LINEAR)
    return _qwen3("Qwen3_5ForConditionalGeneration", "Qwen3_5Config", text)


def qwen3_5_moe() -> tuple[PreTrainedModel, ProcessorMixin]:
    rope = MROPE | {"partial_rotary_factor": 1.0}
    others = LINEAR | EXPERTS | {"shared_expert_intermediate_size": 16}
    text = text_config(qwen_tokenizer(), "qwen3_5_moe_text", rope_parameters=rope, **others)
    return _qwen3("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeConfig", text)
