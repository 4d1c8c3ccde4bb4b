"""Tiny models of classes that have no map of their own, with their real processors and ChatML as their template."""

from typing import Any

import transformers as hf
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from tests.shared.vl import qwen_models, vocabularies
from tests.shared.vl.qwen_models import LINEAR, MROPE, SECTIONS, TOWER, pixels_of
from tests.shared.vl.sizes import LAYERS, SPREAD, square, text_config, tower
from tests.shared.vl.templates import chatml

Tiny = tuple[PreTrainedModel, ProcessorMixin]


def tokenizer_with(*names: str, **named: str) -> PreTrainedTokenizerBase:
    """ChatML's tokenizer with more special tokens; those with a name become its attributes."""
    tokenizer = vocabularies.qwen(extra_special_tokens=named)
    tokenizer.add_tokens(list(names), special_tokens=True)
    return tokenizer


def mistral3() -> Tiny:
    tokenizer = tokenizer_with("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    processor = hf.PixtralProcessor(
        hf.PixtralImageProcessor(size={"longest_edge": 56}, patch_size=14),
        tokenizer,
        patch_size=14,
        spatial_merge_size=2,
        chat_template=chatml("[IMG]"),
    )
    config = hf.Mistral3Config(
        text_config=text_config(tokenizer, "mistral", head_dim=16),
        vision_config=tower("pixtral", image_size=56, head_dim=16),
        image_token_index=processor.image_token_id,
        tie_word_embeddings=False,
    )
    return hf.Mistral3ForConditionalGeneration(config), processor


def glm(kind: str, processor_kind: str, config: str, text: str = "glm4v_text", **others: Any) -> Tiny:
    """A model of the GLM-V classes, whose processors and towers are alike."""
    names = ["<|begin_of_image|>", "<|end_of_image|>", "<|image|>", "<|begin_of_video|>", "<|end_of_video|>"]
    tokenizer = tokenizer_with(*names, "<|video|>")
    images = getattr(hf, processor_kind.replace("Processor", "ImageProcessor"))(**pixels_of(14))
    videos = getattr(hf, processor_kind.replace("Processor", "VideoProcessor"))(**pixels_of(14))
    template = chatml("<|begin_of_image|><|image|><|end_of_image|>")
    processor = getattr(hf, processor_kind)(images, tokenizer, videos, chat_template=template)
    found = dict(
        zip(
            ("image_start", "image_end", "image", "video_start", "video_end", "video"),
            [*names, "<|video|>"],
            strict=True,
        )
    )
    made = getattr(hf, config)(
        text_config=text_config(tokenizer, text, **{"rope_parameters": SECTIONS} | others),
        vision_config=TOWER | {"image_size": 56, "intermediate_size": 48, "out_hidden_size": 32},
        **{f"{key}_token_id": tokenizer.convert_tokens_to_ids(token) for key, token in found.items()},
    )
    return getattr(hf, kind)(made), processor


def glm4v() -> Tiny:
    return glm("Glm4vForConditionalGeneration", "Glm4vProcessor", "Glm4vConfig")


def glm46v() -> Tiny:
    return glm("Glm46VForConditionalGeneration", "Glm46VProcessor", "Glm46VConfig")


def cohere2_vision() -> Tiny:
    names = {
        "boi_token": "<|START_OF_IMG|>",
        "eoi_token": "<|END_OF_IMG|>",
        "img_line_break_token": "<|IMG_LINE_BREAK|>",
    }
    tokenizer = tokenizer_with(image_token="<|IMG_PATCH|>", **names)
    images = hf.Cohere2VisionImageProcessor(size=square(56), max_patches=2, patch_size=2)  # of a tile
    config = hf.Cohere2VisionConfig(
        text_config=text_config(tokenizer, "cohere2"),
        vision_config=tower("siglip_vision_model", image_size=56, vision_use_head=False),
        image_token_id=tokenizer.image_token_id,
        alignment_intermediate_size=64,
    )
    processor = hf.Cohere2VisionProcessor(images, tokenizer, chat_template=chatml("<|IMG_PATCH|>"))
    return hf.Cohere2VisionForConditionalGeneration(config), processor


def aya_vision() -> Tiny:
    names = ["<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>"]
    tokenizer = tokenizer_with(*names, "TILE_GLOBAL", "TILE_1", "TILE_2")
    processor = hf.AyaVisionProcessor(
        hf.GotOcr2ImageProcessor(size=square(56), max_patches=2, crop_to_patches=True),
        tokenizer,
        patch_size=14,
        img_size=56,
        downsample_factor=2,
        chat_template=chatml("<image>"),
    )
    config = hf.AyaVisionConfig(
        text_config=text_config(tokenizer, "cohere2"),
        vision_config=tower("siglip_vision_model", image_size=56, vision_use_head=False),
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
    )
    return hf.AyaVisionForConditionalGeneration(config), processor


def idefics2() -> Tiny:
    names = {"image_token": "<image>", "image_boundary_token": "<fake_token_around_image>"}
    tokenizer = tokenizer_with(**names)
    images = hf.Idefics2ImageProcessor(size={"shortest_edge": 28, "longest_edge": 56})
    processor = hf.Idefics2Processor(images, tokenizer, image_seq_len=4, chat_template=chatml("<image>"))
    perceiver = SPREAD | {"hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2}
    config = hf.Idefics2Config(
        text_config=text_config(tokenizer, "mistral", head_dim=16),
        vision_config=tower("idefics2_vision", image_size=56),
        perceiver_config=perceiver | {"resampler_head_dim": 16, "num_key_value_heads": 1},
        image_token_id=tokenizer.image_token_id,
    )
    model = hf.Idefics2ForConditionalGeneration(config)
    nn.init.normal_(model.model.connector.perceiver_resampler.latents)  # all the same when made
    return model, processor


def lfm2_vl() -> Tiny:
    names = ["<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"]
    tokenizer = tokenizer_with(
        *names, *(f"<|img_row_{r}_col_{c}|>" for r in (1, 2) for c in (1, 2)), image_token="<image>"
    )
    images = hf.Lfm2VlImageProcessor(
        encoder_patch_size=14, tile_size=56, size=square(56), min_image_tokens=1, max_image_tokens=4,
        max_tiles=2, max_num_patches=64,
    )  # fmt: skip
    text = text_config(tokenizer, "lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)
    config = hf.Lfm2VlConfig(
        text_config=text,
        vision_config=tower("siglip2_vision_model", num_patches=16, vision_use_head=False),
        image_token_id=tokenizer.image_token_id,
        projector_hidden_size=32,
    )
    processor = hf.Lfm2VlProcessor(images, tokenizer, chat_template=chatml("<image>"))
    return hf.Lfm2VlForConditionalGeneration(config), processor


def ovis2() -> Tiny:
    indicators = [f"<ovis{number}>" for number in range(5)]
    tokenizer = tokenizer_with(
        "<image>", "<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"
    )
    tokenizer.add_tokens(indicators, special_tokens=True)
    images = hf.Ovis2ImageProcessor(size=square(28), max_patches=2)
    processor = hf.Ovis2Processor(images, tokenizer, chat_template=chatml("<image>"), image_seq_length=4)
    config = hf.Ovis2Config(
        text_config=text_config(tokenizer, "qwen2"),
        vision_config=tower("ovis2", vocab_size=40, hidden_stride=1),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=tokenizer.convert_tokens_to_ids(indicators),
        vocab_size=len(tokenizer),
        hidden_size=32,
        tie_word_embeddings=False,
    )
    return hf.Ovis2ForConditionalGeneration(config), processor


def paddleocr_vl() -> Tiny:
    names = {"image_token": "<|IMAGE_PLACEHOLDER|>"}
    tokenizer = tokenizer_with("<|IMAGE_START|>", "<|IMAGE_END|>", "<|video_pad|>", **names)
    images = hf.PaddleOCRVLImageProcessor(**pixels_of(14))
    template = chatml("<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>")
    processor = hf.PaddleOCRVLProcessor(images, tokenizer, chat_template=template)
    found = {"video": "<|video_pad|>", "vision_start": "<|IMAGE_START|>", "vision_end": "<|IMAGE_END|>"}
    config = hf.PaddleOCRVLConfig(
        text_config=text_config(tokenizer, "paddleocr_vl_text", head_dim=16, rope_parameters=SECTIONS),
        vision_config=tower("paddleocr_vl_vision", image_size=56),
        image_token_id=tokenizer.image_token_id,
        **{f"{key}_token_id": tokenizer.convert_tokens_to_ids(token) for key, token in found.items()},
    )
    return hf.PaddleOCRVLForConditionalGeneration(config), processor


def llama4() -> Tiny:
    names = ["<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>"]
    tokenizer = tokenizer_with(*names, "<|tile_y_separator|>")
    images = hf.Llama4ImageProcessor(size=square(28), max_patches=2)
    settings = {"patch_size": 7, "pixel_shuffle_ratio": 0.5, "chat_template": chatml("<|image|>")}
    processor = hf.Llama4Processor(images, tokenizer, **settings)
    sizes = {"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32}
    text = text_config(tokenizer, "llama4_text", head_dim=16, intermediate_size_mlp=48, num_local_experts=2)
    found = {"image": "<|patch|>", "boi": "<|image_start|>", "eoi": "<|image_end|>"}
    config = hf.Llama4Config(
        text_config=text | {"interleave_moe_layer_step": 2, "num_experts_per_tok": 1},
        vision_config=tower("llama4_vision_model", patch_size=7, **sizes) | {"intermediate_size": 128},
        **{f"{key}_token_index": tokenizer.convert_tokens_to_ids(token) for key, token in found.items()},
    )
    return hf.Llama4ForConditionalGeneration(config), processor


def perception_lm() -> Tiny:
    tokenizer = tokenizer_with(image_token="<|image|>", video_token="<|video|>")
    images = hf.PerceptionLMImageProcessor(tile_size=28, max_num_tiles=2, vision_input_type="thumb+tile")
    processor = hf.PerceptionLMProcessor(
        image_processor=images,
        video_processor=hf.PerceptionLMVideoProcessor(size=square(28)),
        tokenizer=tokenizer,
        patch_size=7,
        pooling_ratio=2,
        chat_template=chatml("<|image|>"),
    )
    arguments = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": (28, 28), "ref_feat_shape": (4, 4)}
    vision = {"model_type": "timm_wrapper", "architecture": "vit_pe_lang_large_patch14_448", "do_pooling": False}
    config = hf.PerceptionLMConfig(
        text_config=text_config(tokenizer, "llama"),
        vision_config=vision | {"model_args": arguments | {"patch_size": 7, "global_pool": ""}, "num_classes": 0},
        projector_pooling_ratio=2,
        vision_use_cls_token=True,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
    )
    return hf.PerceptionLMForConditionalGeneration(config), processor


def janus() -> Tiny:
    tokenizer = tokenizer_with(
        image_token="<image_placeholder>", boi_token="<begin_of_image>", eoi_token="<end_of_image>"
    )
    images = hf.JanusImageProcessor(size=square(28), min_size=14)
    template = chatml("<image_placeholder>")
    processor = hf.JanusProcessor(images, tokenizer, chat_template=template, num_image_tokens=4)
    codes = {"embed_dim": 8, "num_embeddings": 16, "latent_channels": 16, "base_channels": 32, "num_patches": 2}
    codes |= {"channel_multiplier": [1, 1], "num_res_blocks": 1, "projection_dim": 32, "image_token_embed_dim": 32}
    config = hf.JanusConfig(
        text_config=text_config(tokenizer, "llama"),
        vision_config=tower("janus_vision_model", projection_dim=32, mlp_ratio=2, num_image_tokens=4),
        vq_config=codes,
        image_token_id=tokenizer.image_token_id,
    )
    return hf.JanusForConditionalGeneration(config), processor


def minicpm_v() -> Tiny:
    names = {"image_token": "<|image_pad|>", "image_start_token": "<image>", "image_end_token": "</image>"}
    names |= {"slice_start_token": "<slice>", "slice_end_token": "</slice>", "video_token": "<|video_pad|>"}
    names |= {"image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>"}
    tokenizer = tokenizer_with(**names)
    images = hf.MiniCPMV4_6ImageProcessor(scale_resolution=56, max_slice_nums=2)
    processor = hf.MiniCPMV4_6Processor(
        images, hf.MiniCPMV4_6VideoProcessor(scale_resolution=56), tokenizer, chat_template=chatml("<|image_pad|>")
    )
    rope = MROPE | {"partial_rotary_factor": 1.0}
    config = hf.MiniCPMV4_6Config(
        text_config=text_config(tokenizer, "qwen3_5_text", rope_parameters=rope, **LINEAR),
        vision_config=tower("minicpmv4_6_vision", image_size=56, insert_layer_id=0),
        insert_layer_id=0,
        image_size=56,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
    )
    return hf.MiniCPMV4_6ForConditionalGeneration(config), processor


def kimi_k25() -> Tiny:
    names = {"image_token": "<|media_pad|>", "video_token": "<|video_pad|>"}
    tokenizer = tokenizer_with("<|media_begin|>", "<|media_end|>", **names)
    processor = hf.Kimi_K25Processor(
        hf.Kimi_K25ImageProcessor(patch_size=14, merge_size=2, max_patches=16),
        tokenizer,
        hf.Kimi_K25VideoProcessor(patch_size=14, merge_size=2),
        chat_template=chatml("<|media_begin|><|media_pad|><|media_end|>"),
    )
    latent = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "num_mtp_layers": 0}
    text = text_config(tokenizer, "deepseek_v3", num_key_value_heads=2, moe_intermediate_size=16, **latent, **experts)
    config = hf.Kimi_K25Config(
        text_config=text | {"first_k_dense_replace": 1},
        vision_config=LAYERS | {"pos_emb_height": 8, "pos_emb_width": 8, "patch_size": 14},
        projection_hidden_size=32,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|media_begin|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|media_end|>"),
        tie_word_embeddings=False,
    )
    return hf.Kimi_K25ForConditionalGeneration(config), processor


def granite4_vision() -> Tiny:
    tokenizer = tokenizer_with(image_token="<image>")
    grid = [[28, 28], [28, 56], [56, 28]]
    processor = hf.Granite4VisionProcessor(
        hf.LlavaNextImageProcessor(size={"shortest_edge": 28}, crop_size=square(28), image_grid_pinpoints=grid),
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
        chat_template=chatml("<image>"),
    )
    vision = tower("siglip_vision_model", patch_size=7, vision_use_head=False)
    qformer = {"model_type": "blip_2_qformer", "num_hidden_layers": 1, "cross_attention_frequency": 1}
    config = hf.Granite4VisionConfig(
        text_config=text_config(tokenizer, "granite4_vision_text", num_hidden_layers=5),
        vision_config=vision | {"hidden_size": 64},  # the heads of the Q-Former have 64
        qformer_config=LAYERS | qformer | {"use_qformer_text_input": False},
        image_token_index=tokenizer.image_token_id,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=grid,
        downsample_rate="1/2",
        deepstack_layer_map=[[-2, 0]],
        spatial_target_layers=[1, 2, 3, 4],
        image_seq_length=4,
    )
    return hf.Granite4VisionForConditionalGeneration(config), processor


def molmo2() -> Tiny:
    names = ["<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>", "<im_end>", "<frame_end>"]
    tokenizer = tokenizer_with(*names, "<im_low>", image_token="<|image|>", video_token="<|video|>")
    tokenizer.bos_token = "<|im_start|>"
    processor = hf.Molmo2Processor(
        hf.Molmo2ImageProcessor(
            size=square(56), patch_size=14, max_crops=2, overlap_margins=[1, 1], pooling_size=[2, 2]
        ),
        hf.Molmo2VideoProcessor(size=square(56), patch_size=14),
        tokenizer,
        chat_template=chatml("<|image|>"),
    )
    heads = {"num_key_value_heads": 2, "head_dim": 16}
    text = text_config(tokenizer, "molmo2_text", head_dim=16, additional_vocab_size=8)
    found = {"image_start": "<im_start>", "low_res_image_start": "<low_res_im_start>", "image_end": "<im_end>"}
    found |= {"frame_start": "<frame_start>", "frame_end": "<frame_end>"}
    vision = tower("molmo2_vision", **heads, num_position_embeddings=16) | {"image_size": [56, 56]}
    config = hf.Molmo2Config(
        text_config=text,
        vision_config=vision,
        adapter_config=LAYERS | heads | {"text_hidden_size": 32, "vision_feature_layer": [-1, -2]},
        image_patch_id=tokenizer.convert_tokens_to_ids("<im_patch>"),
        **{f"{key}_token_id": tokenizer.convert_tokens_to_ids(token) for key, token in found.items()},
    )
    return hf.Molmo2ForConditionalGeneration(config), processor


NEWER = {
    "qwen3_vl_moe": qwen_models.qwen3_vl_moe,
    "qwen3_5": qwen_models.qwen3_5,
    "qwen3_5_moe": qwen_models.qwen3_5_moe,
    "mistral3": mistral3,
    "glm4v": glm4v,
    "glm46v": glm46v,
    "cohere2_vision": cohere2_vision,
    "aya_vision": aya_vision,
    "idefics2": idefics2,
    "lfm2_vl": lfm2_vl,
    "ovis2": ovis2,
    "paddleocr_vl": paddleocr_vl,
    "llama4": llama4,
    "perception_lm": perception_lm,
    "janus": janus,
    "minicpm_v": minicpm_v,
    "kimi_k25": kimi_k25,
    "granite4_vision": granite4_vision,
    "molmo2": molmo2,
}
