"""Tiny models of further classes, with their real processors and ChatML as their template."""

from typing import Any

import transformers as hf
from torch import nn
from transformers import PreTrainedTokenizerBase

from tests.shared.vl import vocabularies
from tests.shared.vl.further_models import CLIP, LATENT, ROUTED
from tests.shared.vl.newer_models import Tiny, tokenizer_with
from tests.shared.vl.qwen_models import IMAGE, SECTIONS, TOWER, pixels_of, qwen_tokenizer
from tests.shared.vl.sizes import LAYERS, square, text_config, tower
from tests.shared.vl.templates import chatml

SLIDING = {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}


def gemma_tokenizer(**names: str) -> PreTrainedTokenizerBase:
    tokenizer = vocabularies.gemma(extra_special_tokens=names)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return tokenizer


def gemma4_unified() -> Tiny:
    names = {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>", "audio_token": "<|audio|>"}
    tokenizer = gemma_tokenizer(**names, boa_token="<|audio>", eoa_token="<audio|>")
    processor = hf.Gemma4UnifiedProcessor(
        hf.Gemma4UnifiedAudioFeatureExtractor(),
        hf.Gemma4UnifiedImageProcessor(patch_size=7, max_soft_tokens=70, pooling_kernel_size=2),
        tokenizer,
        hf.Gemma4UnifiedVideoProcessor(patch_size=7, pooling_kernel_size=2),
        image_seq_length=4,
        chat_template=chatml("<|image|>"),
    )
    vision = {"patch_size": 7, "pooling_kernel_size": 2, "mm_embed_dim": 32, "mm_posemb_size": 320}
    config = hf.Gemma4UnifiedConfig(
        text_config=text_config(tokenizer, "gemma4_unified_text", **SLIDING),
        vision_config=vision | {"output_proj_dims": 32},
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
        image_token_id=tokenizer.image_token_id,
        video_token_id=processor.video_token_id,
        audio_token_id=tokenizer.audio_token_id,
    )
    return hf.Gemma4UnifiedForConditionalGeneration(config), processor


def t5gemma2() -> Tiny:
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = gemma_tokenizer(**names)
    processor = hf.Gemma3Processor(
        hf.Gemma3ImageProcessor(size=square(28)), tokenizer, chatml("<start_of_image>"), image_seq_length=4
    )
    text = text_config(tokenizer, "t5gemma2_text", query_pre_attn_scalar=16, **SLIDING)
    found = {"boi": "boi_token", "eoi": "eoi_token", "image": "image_token"}
    places = {f"{name}_token_index": getattr(tokenizer, f"{token}_id") for name, token in found.items()}
    vision = tower("siglip_vision_model", patch_size=7, vision_use_head=False)
    encoder = {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4} | places
    config = hf.T5Gemma2Config(
        encoder=encoder,
        decoder=text | {"model_type": "t5gemma2_decoder"},
        image_token_index=places["image_token_index"],
        eoi_token_index=places["eoi_token_index"],
    )
    model = hf.T5Gemma2ForConditionalGeneration(config)
    nn.init.normal_(model.get_encoder().multi_modal_projector.mm_input_projection_weight, std=0.1)  # 0 when made
    return model, processor


def video_llava() -> Tiny:
    tokenizer = tokenizer_with("<image>", "<video>")
    processor = hf.VideoLlavaProcessor(
        hf.VideoLlavaImageProcessor(**CLIP),
        hf.VideoLlavaVideoProcessor(**CLIP),
        tokenizer,
        patch_size=14,
        chat_template=chatml("<image>"),
    )
    config = hf.VideoLlavaConfig(
        text_config=text_config(tokenizer, "llama"),
        vision_config=tower("clip_vision_model"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
    )
    return hf.VideoLlavaForConditionalGeneration(config), processor


def ernie4_5_vl_moe() -> Tiny:
    names = {"image_token": "<|IMAGE_PLACEHOLDER|>", "video_token": "<|VIDEO_PLACEHOLDER|>"}
    names |= {"image_start_token": "<|IMAGE_START|>", "image_end_token": "<|IMAGE_END|>"}
    names |= {"video_start_token": "<|VIDEO_START|>", "video_end_token": "<|VIDEO_END|>"}
    tokenizer = tokenizer_with(**names)
    images, videos = (
        hf.Ernie4_5_VLMoeImageProcessor(**pixels_of(14)),
        hf.Ernie4_5_VLMoeVideoProcessor(**pixels_of(14), draw_on_frames=False),
    )
    template = chatml("<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>")
    processor = hf.Ernie4_5_VLMoeProcessor(images, tokenizer, videos, chat_template=template)
    experts = {"moe_intermediate_size": [16, 16], "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
    text = text_config(tokenizer, "ernie4_5_vl_moe_text", rope_parameters=rope, **experts)
    config = hf.Ernie4_5_VLMoeConfig(
        text_config=text | {"mlp_layer_types": ["dense", "sparse"]},
        vision_config=TOWER | {"intermediate_size": 48},
        **{f"{name}_id": getattr(tokenizer, f"{name}_id") for name in names},
    )
    return hf.Ernie4_5_VLMoeForConditionalGeneration(config), processor


def hunyuan_vl() -> Tiny:
    names = {"image_token": "<img_pad>", "image_start_token": "<img_start>", "image_end_token": "<img_end>"}
    tokenizer = tokenizer_with("<img_newline>", **names)
    tokenizer.pad_token = "<|im_end|>"
    images = hf.HunYuanVLImageProcessor(**pixels_of(16))
    template = chatml("<img_start><img_pad><img_end>")
    processor = hf.HunYuanVLProcessor(images, tokenizer, chat_template=template)
    text = text_config(
        tokenizer, "hunyuan_vl_text", head_dim=16, rope_parameters=SECTIONS | {"mrope_section": [2, 2, 2, 2]}
    )
    vision = {"out_hidden_size": 32, "text_hidden_size": 32, "num_key_value_heads": 2, "max_image_size": 64}
    config = hf.HunYuanVLConfig(
        text_config=text,
        vision_config=LAYERS | vision | {"img_max_token_num": 16, "min_image_size": 32},
        image_token_id=tokenizer.image_token_id,
        im_start_id=tokenizer.image_start_token_id,
        im_end_id=tokenizer.image_end_token_id,
        im_newline_id=tokenizer.convert_tokens_to_ids("<img_newline>"),
    )
    return hf.HunYuanVLForConditionalGeneration(config), processor


def ocr(kind: str, text: str, encoder: dict[str, Any]) -> Tiny:
    """DeepSeek-OCR 2 and Unlimited-OCR, whose towers are a SAM and another one behind it."""
    tokenizer = tokenizer_with(image_token="<image>")
    images = getattr(hf, f"{kind}ImageProcessor")(size=square(768), tile_size=768, crop_to_patches=False)
    processor = getattr(hf, f"{kind}Processor")(images, tokenizer, chat_template=chatml("<image>"))
    sam = {"image_size": 768, "output_channels": 16, "mlp_dim": 48, "window_size": 4, "global_attn_indexes": [1]}
    experts = {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 16}
    experts |= {"head_dim": 16, "num_key_value_heads": 2, "mlp_layer_types": ["dense", "sparse"], "n_group": 1}
    config = getattr(hf, f"{kind}Config")(
        text_config=text_config(tokenizer, text, **experts, topk_group=1),
        vision_config={
            "sam_config": LAYERS | sam | {"downsample_channels": [24, 32]},
            "encoder_config": LAYERS | encoder,
        },
        image_token_id=tokenizer.image_token_id,
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config), processor


def deepseek_ocr2() -> Tiny:
    return ocr("DeepseekOcr2", "deepseek_ocr2_text", {"num_key_value_heads": 1, "vocab_size": 8})


def unlimited_ocr() -> Tiny:
    return ocr("UnlimitedOcr", "unlimited_ocr_text", {"image_size": 28, "patch_size": 14})


def step3p7() -> Tiny:
    tokenizer = tokenizer_with(
        "<im_patch>", "<im_start>", "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>"
    )
    images = hf.Step3p7ImageProcessor(size=square(112), patch_size=56, max_image_size=168)
    processor = hf.Step3p7Processor(images, tokenizer, chat_template=chatml("<im_patch>"))
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    experts = {
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "share_expert_dim": 16,
        "sliding_window": 64,
    }
    layers = {"layer_types": ["full_attention"] * 2, "mlp_layer_types": ["dense", "sparse"], "head_dim": 16}
    config = hf.Step3p7Config(
        text_config=text_config(tokenizer, "step3p5", rope_parameters=rope, **experts, **layers),
        vision_config=LAYERS | {"image_size": 112, "mlp_ratio": 2.0, "max_position_embeddings": 64},
        image_token_id=tokenizer.convert_tokens_to_ids("<im_patch>"),
    )
    return hf.Step3p7ForConditionalGeneration(config), processor


def minimax_m3() -> Tiny:
    kind = hf.MiniMaxM3VLProcessor
    names = [kind.IMAGE_TOKEN, kind.VIDEO_TOKEN, kind.VISION_START_TOKEN, kind.VISION_END_TOKEN]
    tokenizer = tokenizer_with(*names)
    images, videos = hf.MiniMaxM3VLImageProcessor(**pixels_of(14)), hf.MiniMaxM3VLVideoProcessor(**pixels_of(14))
    processor = kind(images, tokenizer, videos, chat_template=chatml(names[0]))
    experts = {"num_experts_per_tok": 2, "num_local_experts": 4, "dense_intermediate_size": 48, "head_dim": 16}
    experts |= {"shared_intermediate_size": 16, "rotary_dim": 8, "mlp_layer_types": ["dense", "sparse"]}
    config = hf.MiniMaxM3VLConfig(
        text_config=text_config(tokenizer, "minimax_m3_vl_text", **experts),
        vision_config=LAYERS | {"image_size": 56},
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        projector_hidden_size=32,
        merged_hidden_size=128,
    )
    return hf.MiniMaxM3SparseForConditionalGeneration(config), processor


def hy_v4_vl() -> Tiny:
    tokenizer = qwen_tokenizer()
    images, videos = hf.HYV4VLImageProcessor(**pixels_of(16)), hf.HYV4VLVideoProcessor(**pixels_of(16))
    processor = hf.HYV4VLProcessor(images, tokenizer, videos, chat_template=chatml(IMAGE))
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    indexed = {"index_topk": 64, "index_head_dim": 16, "index_n_heads": 2, "indexer_types": ["full", "shared"]}
    layers = {"layer_types": ["indexed_attention"] * 2, "mlp_layer_types": ["dense", "sparse"], "head_dim": 8}
    text = text_config(tokenizer, "hy_v4_vl_text", rope_parameters=rope, num_key_value_heads=2, **indexed)
    config = hf.HYV4VLConfig(
        text_config=text | LATENT | ROUTED | layers | {"hc_mult": 2},
        vision_config=LAYERS | {"out_hidden_size": 32, "num_key_value_heads": 2, "max_image_size": 64},
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
    )
    return hf.HYV4VLForConditionalGeneration(config), processor


def cohere_compass() -> Tiny:
    names = ["<|IMAGE_PAD|>", "<|VIDEO_PAD|>", "<|VISION_START|>", "<|VISION_END|>"]
    tokenizer = tokenizer_with(*names)
    images, videos = (
        hf.CohereCompassImageProcessor(**pixels_of(16)),
        hf.CohereCompassVideoProcessor(**pixels_of(16)),
    )
    template = chatml("<|VISION_START|><|IMAGE_PAD|><|VISION_END|>")
    processor = hf.CohereCompassProcessor(images, tokenizer, videos, chat_template=template)
    vision = {"intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 16}
    found = dict(zip(("image", "video", "vision_start", "vision_end"), names, strict=True))
    config = hf.CohereCompassConfig(
        text_config=text_config(
            tokenizer, "cohere_compass_text", rope_parameters={"full_attention": SECTIONS}, head_dim=16
        ),
        vision_config=TOWER | vision | {"deepstack_visual_indexes": [0]},
        **{f"{key}_token_id": tokenizer.convert_tokens_to_ids(token) for key, token in found.items()},
    )
    return hf.CohereCompassForConditionalGeneration(config), processor


def dots3_note() -> Tiny:
    names = ["<|imgpad|>", "<|video_pad|>", "<|audio_comp_pad|>"]
    tokenizer = tokenizer_with(*names)
    processor = hf.Dots3NoteProcessor(
        hf.Qwen2VLImageProcessor(**pixels_of(14), temporal_patch_size=1),
        tokenizer,
        hf.Qwen2VLVideoProcessor(**pixels_of(14), temporal_patch_size=1),
        hf.Dots3NoteFeatureExtractor(),
        chat_template=chatml("<|imgpad|>"),
    )
    indexed = {"index_topk": 64, "index_head_dim": 16, "index_n_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    layers = {"layer_types": ["indexed_attention"] * 2, "mlp_layer_types": ["dense", "sparse"]}
    vision = {"moe_intermediate_size": 16, "num_local_experts": 4, "adapter_in_dim": 32, "adapter_out_dim": 32}
    config = hf.Dots3NoteConfig(
        text_config=text_config(tokenizer, "dots3_note_text", **indexed) | LATENT | ROUTED | layers,
        vision_config=LAYERS | vision | {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
        audio_config={"num_hidden_layers": 1, "adapter_out_dim": 32},
        **{
            f"{key}_token_id": tokenizer.convert_tokens_to_ids(t)
            for key, t in zip(("image", "video", "audio"), names, strict=True)
        },
    )
    return hf.Dots3NoteForConditionalGeneration(config), processor


def granite_docling() -> Tiny:
    tiles = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    tokenizer = tokenizer_with("<fake_token_around_image>", "<global-img>", *tiles, image_token="<image>")
    images = hf.GraniteDoclingImageProcessor(size=square(64), max_patches=2)
    processor = hf.GraniteDoclingProcessor(images, tokenizer, image_seq_len=4, chat_template=chatml("<image>"))
    vision = {"image_size": 64, "patch_size": 16, "out_hidden_size": 32, "scale_factor": 2, "use_fine_route": False}
    config = hf.GraniteDoclingConfig(
        text_config=text_config(tokenizer, "granite_docling_text"),
        vision_config=LAYERS | vision | {"deepstack_visual_indexes": [0]},
        image_token_id=tokenizer.image_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return hf.GraniteDoclingForConditionalGeneration(config), processor


RARE = {
    "gemma4_unified": gemma4_unified,
    "t5gemma2": t5gemma2,
    "video_llava": video_llava,
    "ernie4_5_vl_moe": ernie4_5_vl_moe,
    "hunyuan_vl": hunyuan_vl,
    "deepseek_ocr2": deepseek_ocr2,
    "unlimited_ocr": unlimited_ocr,
    "step3p7": step3p7,
    "minimax_m3_vl": minimax_m3,
    "hy_v4_vl": hy_v4_vl,
    "cohere_compass": cohere_compass,
    "dots3_note": dots3_note,
    "granite_docling": granite_docling,
}
