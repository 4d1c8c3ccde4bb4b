"""Tiny models of the newest and the rarest classes, with their real processors and ChatML as their template."""

from typing import Any

import transformers as hf

from tests.shared.vl import newer_models, vocabularies
from tests.shared.vl.newer_models import Tiny, tokenizer_with
from tests.shared.vl.qwen_models import (
    EXPERTS,
    IMAGE,
    LINEAR,
    MROPE,
    SECTIONS,
    TOWER,
    ids,
    pixels_of,
    qwen_tokenizer,
)
from tests.shared.vl.sizes import LAYERS, square, text_config, tower
from tests.shared.vl.templates import chatml

CLIP = {"size": {"shortest_edge": 28}, "crop_size": square(28)}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}


def deepseek_vl_hybrid() -> Tiny:
    tokenizer = tokenizer_with("<image_placeholder>", image_token="<image_placeholder>")
    images = hf.DeepseekVLHybridImageProcessor(size=square(28), high_res_size=square(64), min_size=14)
    template = chatml("<image_placeholder>")
    processor = hf.DeepseekVLHybridProcessor(images, tokenizer, chat_template=template, num_image_tokens=4)
    sam = {"model_type": "sam_vision_model", "image_size": 64, "patch_size": 16, "output_channels": 16, "mlp_dim": 48}
    config = hf.DeepseekVLHybridConfig(
        text_config=text_config(tokenizer, "llama"),
        vision_config=tower("siglip_vision_model"),
        high_res_vision_config=LAYERS | sam | {"window_size": 2, "global_attn_indexes": [1]},
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
    )
    return hf.DeepseekVLHybridForConditionalGeneration(config), processor


def llava_next_video() -> Tiny:
    tokenizer = tokenizer_with("<image>", "<video>")
    grid = [[28, 28], [28, 56], [56, 28]]
    processor = hf.LlavaNextVideoProcessor(
        hf.LlavaNextVideoVideoProcessor(**CLIP),
        hf.LlavaNextImageProcessor(**CLIP, image_grid_pinpoints=grid),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chatml("<image>"),
    )
    config = hf.LlavaNextVideoConfig(
        text_config=text_config(tokenizer, "llama"),
        vision_config=tower("clip_vision_model"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grid,
    )
    return hf.LlavaNextVideoForConditionalGeneration(config), processor


def minicpm(kind: str, images: str, videos: str, *, marks: bool = False, **others: Any) -> Tiny:
    names = {"image_token": "<|image_pad|>", "image_start_token": "<image>", "image_end_token": "</image>"}
    names |= {"slice_start_token": "<slice>", "slice_end_token": "</slice>", "video_token": "<|video_pad|>"}
    names |= {"image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>"}
    tokenizer = tokenizer_with(**names)
    processor = getattr(hf, f"{kind}Processor")(
        getattr(hf, images)(scale_resolution=56, max_slice_nums=2),
        getattr(hf, videos)(scale_resolution=56),
        tokenizer,
        chat_template=chatml("<|image_pad|>"),
    )
    places = {f"{name}_id": getattr(tokenizer, f"{name}_token_id") for name in ("image_start", "image_end")}
    places |= {f"{name}_id": getattr(tokenizer, f"{name}_token_id") for name in ("slice_start", "slice_end")}
    places["newline_id"] = tokenizer.encode("\n")[0]
    rope = MROPE | {"partial_rotary_factor": 1.0}
    vision = {"image_size": 56, "patch_size": 14, "insert_layer_id": 0}
    config = getattr(hf, f"{kind}Config")(
        text_config=text_config(tokenizer, "qwen3_5_text", rope_parameters=rope, **LINEAR),
        vision_config=LAYERS | vision,
        insert_layer_id=0,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        **(places if marks else {}),
        **others,
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config), processor


def minicpm_v4_7() -> Tiny:
    names = ("MiniCPMV4_7", "MiniCPMV4_6ImageProcessor", "MiniCPMV4_6VideoProcessor")
    return minicpm(*names, marks=True, image_size=56)


def minicpm_ocr() -> Tiny:
    return minicpm("MiniCPMOcr", "MiniCPMOcrImageProcessor", "MiniCPMOcrVideoProcessor")


def mistral_large4() -> Tiny:
    model, processor = newer_models.mistral3()
    tokenizer = processor.tokenizer
    indexed = {"index_topk": 64, "index_head_dim": 16, "index_n_heads": 2, "first_k_dense_replace": 1}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    text = text_config(tokenizer, "mistral_large4_text", num_key_value_heads=2, rope_parameters=rope, head_dim=8)
    latent = {key: size for key, size in LATENT.items() if key != "q_lora_rank"}
    config = hf.MistralLarge4Config(
        text_config=text | latent | ROUTED | indexed | {"mlp_layer_types": ["dense", "sparse"]},
        vision_config=model.config.vision_config.to_dict(),
        image_token_index=processor.image_token_id,
    )
    return hf.MistralLarge4ForConditionalGeneration(config), processor


def qwen4_exp() -> Tiny:
    tokenizer = qwen_tokenizer()
    text = text_config(tokenizer, "qwen4_exp_text", rope_parameters=MROPE | {"partial_rotary_factor": 1.0}, **LINEAR)
    indexed = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64}
    sizes = {"hc_count": 2, "hc_lowrank": 4, "ple_embed_dim": 16, "ngram_vocab_size_base": 100}
    others = EXPERTS | indexed | sizes | {"indexer_compress_ratio": 4, "shared_expert_intermediate_size": 16}
    vision = {"intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 16}
    config = hf.Qwen4ExpConfig(
        text_config=text | others | {"layer_types": ["linear_attention", "indexed_attention"]},
        vision_config=TOWER | vision,
        **ids(tokenizer),
    )
    images = hf.Qwen2VLImageProcessor(**pixels_of(16))
    processor = hf.Qwen3VLProcessor(images, tokenizer, hf.Qwen3VLVideoProcessor(**pixels_of(16)), chatml(IMAGE))
    return hf.Qwen4ExpForConditionalGeneration(config), processor


def hyperclovax() -> Tiny:
    tokenizer = vocabularies.gpt2(eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.add_tokens(["<|im_start|>", *["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]])
    images, videos = hf.Qwen2VLImageProcessor(**pixels_of(14)), hf.Qwen2VLVideoProcessor(**pixels_of(14))
    processor = hf.HyperCLOVAXVisionV2Processor(images, tokenizer, videos, chat_template=chatml(IMAGE))
    vision = {"model_type": "qwen2_5_vl_vision", "intermediate_size": 48, "out_hidden_size": 32, "window_size": 56}
    config = hf.HyperCLOVAXVisionV2Config(
        text_config=text_config(tokenizer, "hyperclovax", head_dim=16),
        vision_config=TOWER | vision | {"fullatt_block_indexes": [1]},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )
    return hf.HyperCLOVAXVisionV2ForConditionalGeneration(config), processor


def lfm3_vl() -> Tiny:
    tokenizer = qwen_tokenizer()
    images, videos = hf.Qwen2VLImageProcessor(**pixels_of(16)), hf.Qwen2VLVideoProcessor(**pixels_of(16))
    processor = hf.Lfm3VlProcessor(images, tokenizer, videos, chat_template=chatml(IMAGE))
    layers = {"layer_types": ["conv", "full_attention"]}
    config = hf.Lfm3VlConfig(
        text_config=text_config(tokenizer, "lfm3", **layers),
        vision_config=LAYERS | layers | {"num_key_value_heads": 1},
        projector_hidden_size=32,
        **ids(tokenizer),
    )
    return hf.Lfm3VlForConditionalGeneration(config), processor


def cosmos3_edge() -> Tiny:
    tokenizer = qwen_tokenizer()
    images = hf.Cosmos3EdgeImageProcessor(**pixels_of(16))
    videos = hf.Cosmos3EdgeVideoProcessor(**pixels_of(16))
    processor = hf.Cosmos3EdgeProcessor(images, tokenizer, videos, chat_template=chatml(IMAGE))
    config = hf.Cosmos3EdgeConfig(
        text_config=text_config(tokenizer, "cosmos3_edge_text", head_dim=16, rope_parameters=SECTIONS),
        vision_config=LAYERS | {"num_patches": 16},
        projector_hidden_size=48,
        **ids(tokenizer),
    )
    return hf.Cosmos3EdgeForConditionalGeneration(config), processor


def cosmos3_omni() -> Tiny:
    tokenizer = qwen_tokenizer()
    text = text_config(tokenizer, "qwen3_vl_text", head_dim=16, rope_parameters=MROPE)
    vision = {"intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 16}
    vision |= {"model_type": "qwen3_vl_vision", "deepstack_visual_indexes": [0]}
    config = hf.Cosmos3OmniConfig(text_config=text, vision_config=TOWER | vision, **ids(tokenizer))
    images = hf.Qwen2VLImageProcessor(**pixels_of(16))
    processor = hf.Qwen3VLProcessor(images, tokenizer, hf.Qwen3VLVideoProcessor(**pixels_of(16)), chatml(IMAGE))
    return hf.Cosmos3OmniForConditionalGeneration(config), processor


def glm5_next() -> Tiny:
    indexed = {"index_topk": 64, "index_head_dim": 16, "index_n_heads": 2, "index_kpool": 4, "first_k_dense_replace": 1}
    layers = {"layer_types": ["linear_attention", "indexed_attention"], "mlp_layer_types": ["dense", "sparse"]}
    linear = {"linear_head_dim": 8, "linear_num_heads": 2, "hc_mult": 2, "num_key_value_heads": 2}
    sizes = LATENT | {"qk_rope_head_dim": 0, "head_dim": 0, "n_shared_experts": 1}
    names = ("Glm5NextForConditionalGeneration", "Glm5NextProcessor", "Glm5NextConfig", "glm5_next_text")
    model, processor = newer_models.glm(*names, **indexed, **layers, **linear, **sizes, **ROUTED)
    return model, processor


FURTHER = {
    "deepseek_vl_hybrid": deepseek_vl_hybrid,
    "llava_next_video": llava_next_video,
    "minicpmv4_7": minicpm_v4_7,
    "minicpm_ocr": minicpm_ocr,
    "mistral_large4": mistral_large4,
    "qwen4_exp": qwen4_exp,
    "hyperclovax_vision_v2": hyperclovax,
    "lfm3_vl": lfm3_vl,
    "cosmos3_edge": cosmos3_edge,
    "cosmos3_omni": cosmos3_omni,
    "glm5_next": glm5_next,
}
