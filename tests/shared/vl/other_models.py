"""Tiny models of further classes without a map of their own: Gemmas, and near relatives of those of newer_models.py."""

from typing import Any

import transformers as hf
from torch import nn

from tests.shared.vl import templateless_models, vocabularies
from tests.shared.vl.newer_models import Tiny, glm, tokenizer_with
from tests.shared.vl.qwen_models import IMAGE, SECTIONS, TOWER, ids, pixels_of, qwen_tokenizer
from tests.shared.vl.sizes import LAYERS, square, text_config, tower
from tests.shared.vl.templates import chatml

CLIP = {"size": {"shortest_edge": 28}, "crop_size": square(28)}
IMAGE_TOKEN = chatml("<image>")


def gemma4() -> Tiny:
    names = {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>", "audio_token": "<|audio|>"}
    tokenizer = vocabularies.gemma(extra_special_tokens=names | {"boa_token": "<|audio>", "eoa_token": "<audio|>"})
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    processor = hf.Gemma4Processor(
        hf.Gemma4AudioFeatureExtractor(),
        hf.Gemma4ImageProcessor(patch_size=7, max_soft_tokens=70, pooling_kernel_size=2),
        tokenizer,
        hf.Gemma4VideoProcessor(patch_size=7, pooling_kernel_size=2),
        image_seq_length=4,
        chat_template=chatml("<|image|>"),
    )
    layers = {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
    config = hf.Gemma4Config(
        text_config=text_config(tokenizer, "gemma4_text", **layers)
        | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": len(tokenizer), "global_head_dim": 16},
        vision_config=tower("gemma4_vision", patch_size=7, head_dim=16, pooling_kernel_size=2, num_key_value_heads=2)
        | {"position_embedding_size": 320, "use_clipped_linears": True},
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
        image_token_id=tokenizer.image_token_id,
        video_token_id=processor.video_token_id,
        audio_token_id=tokenizer.audio_token_id,
    )
    return hf.Gemma4ForConditionalGeneration(config), processor


def gemma3n() -> Tiny:
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    names |= {"boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>", "audio_token": "<audio_soft_token>"}
    tokenizer = vocabularies.gemma(extra_special_tokens=names)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    processor = hf.Gemma3nProcessor(
        hf.Gemma3nAudioFeatureExtractor(),
        hf.SiglipImageProcessor(size=square(64)),
        tokenizer,
        chat_template=chatml("<image_soft_token>"),
        image_seq_length=4,
    )
    layers = {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
    sizes = {"hidden_size_per_layer_input": 8, "laurel_rank": 4, "num_kv_shared_layers": 0, "altup_num_inputs": 2}
    size = len(tokenizer)
    text = text_config(tokenizer, "gemma3n_text", activation_sparsity_pattern=[0.0, 0.0], **layers, **sizes)
    config = hf.Gemma3nConfig(
        text_config=text | {"vocab_size_per_layer_input": size},
        vision_config={"architecture": "test_efficientnet", "hidden_size": 256, "vocab_size": 4, "vocab_offset": size},
        audio_config={"hidden_size": 32, "conf_num_hidden_layers": 1, "vocab_size": 4, "vocab_offset": size + 4},
        vision_soft_tokens_per_image=4,
        **{f"{name}_id": getattr(tokenizer, f"{name}_id") for name in names},
    )
    return hf.Gemma3nForConditionalGeneration(config), processor


def llava_next() -> Tiny:
    tokenizer = tokenizer_with(image_token="<image>")
    grid = [[28, 28], [28, 56], [56, 28]]
    settings = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    images = hf.LlavaNextImageProcessor(**CLIP, image_grid_pinpoints=grid)
    processor = hf.LlavaNextProcessor(images, tokenizer, **settings, chat_template=IMAGE_TOKEN)
    config = hf.LlavaNextConfig(
        text_config=text_config(tokenizer, "mistral", head_dim=16),
        vision_config=tower("clip_vision_model"),
        image_token_index=tokenizer.image_token_id,
        image_grid_pinpoints=grid,
    )
    return hf.LlavaNextForConditionalGeneration(config), processor


def vipllava() -> Tiny:
    tokenizer = tokenizer_with(image_token="<image>")
    settings = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = hf.LlavaProcessor(hf.CLIPImageProcessor(**CLIP), tokenizer, **settings, chat_template=IMAGE_TOKEN)
    config = hf.VipLlavaConfig(
        text_config=text_config(tokenizer, "llama"),
        vision_config=tower("clip_vision_model"),
        image_token_index=tokenizer.image_token_id,
        vision_feature_layers=[-2, -1],
    )
    return hf.VipLlavaForConditionalGeneration(config), processor


def instructblip() -> Tiny:
    model, processor = templateless_models.blip2()
    found = model.config
    settings = {"num_query_tokens": 4, "image_token_index": found.image_token_id}
    config = hf.InstructBlipConfig(
        text_config=found.text_config.to_dict(),
        vision_config=tower("instructblip_vision_model"),
        qformer_config=LAYERS | {"vocab_size": len(processor.tokenizer)},
        **settings,
    )
    model = hf.InstructBlipForConditionalGeneration(config)
    nn.init.normal_(model.query_tokens)
    both = (processor.image_processor, processor.tokenizer, processor.tokenizer)
    return model, hf.InstructBlipProcessor(*both, num_query_tokens=4)


def glm_ocr() -> Tiny:
    return glm("GlmOcrForConditionalGeneration", "Glm46VProcessor", "GlmOcrConfig", "glm_ocr_text", head_dim=16)


def glm4v_moe() -> Tiny:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
    experts |= {"moe_intermediate_size": 16, "first_k_dense_replace": 1, "head_dim": 16}
    experts["rope_parameters"] = SECTIONS | {"mrope_section": [2, 1, 1]}  # of half of a head
    names = ("Glm4vMoeForConditionalGeneration", "Glm4vProcessor", "Glm4vMoeConfig", "glm4v_moe_text")
    return glm(*names, **experts)


def exaone4_5() -> Tiny:
    tokenizer = qwen_tokenizer()
    images = hf.Qwen2VLImageProcessor(**pixels_of(14))
    videos = hf.Qwen2VLVideoProcessor(**pixels_of(14))
    processor = hf.Exaone4_5_Processor(images, tokenizer, videos, chat_template=chatml(IMAGE))
    vision = {"intermediate_size": 48, "out_hidden_size": 32, "window_size": 56, "fullatt_block_indexes": [1]}
    config = hf.Exaone4_5_Config(
        text_config=text_config(tokenizer, "exaone4", head_dim=16, layer_types=["full_attention"] * 2),
        vision_config=TOWER | vision | {"num_key_value_heads": 1},
        **ids(tokenizer),
    )
    return hf.Exaone4_5_ForConditionalGeneration(config), processor


def deepseek_vl() -> Tiny:
    tokenizer = tokenizer_with("<image_placeholder>", image_token="<image_placeholder>")
    images = hf.DeepseekVLImageProcessor(size=square(28), min_size=14)
    processor = hf.DeepseekVLProcessor(
        images, tokenizer, chat_template=chatml("<image_placeholder>"), num_image_tokens=4
    )
    config = hf.DeepseekVLConfig(
        text_config=text_config(tokenizer, "llama"),
        vision_config=tower("siglip_vision_model"),
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
    )
    return hf.DeepseekVLForConditionalGeneration(config), processor


def lighton_ocr() -> Tiny:
    tokenizer = tokenizer_with(
        image_token="<|image_pad|>", image_break_token="<|vision_pad|>", image_end_token="<|vision_end|>"
    )
    images = hf.PixtralImageProcessor(size={"longest_edge": 56}, patch_size=14)
    processor = hf.LightOnOcrProcessor(
        images, tokenizer, patch_size=14, spatial_merge_size=2, chat_template=chatml("<|image_pad|>")
    )
    config = hf.LightOnOcrConfig(
        text_config=text_config(tokenizer, "qwen3", head_dim=16),
        vision_config=tower("pixtral", image_size=56, head_dim=16),
        image_token_id=processor.image_token_id,
        tie_word_embeddings=False,
    )
    return hf.LightOnOcrForConditionalGeneration(config), processor


def aria() -> Tiny:
    tokenizer = tokenizer_with(image_token="<image>")
    images = hf.AriaImageProcessor(max_image_size=490, min_image_size=336)
    processor = hf.AriaProcessor(images, tokenizer, chat_template=IMAGE_TOKEN, size_conversion={490: 4, 980: 8})
    config = hf.AriaConfig(
        text_config=text_config(tokenizer, "aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        vision_config=tower("idefics3_vision", image_size=490, patch_size=70),
        image_token_index=tokenizer.image_token_id,
        projector_patch_to_query_dict={49: 4, 196: 8},
    )
    return hf.AriaForConditionalGeneration(config), processor


def video_llama_3() -> Tiny:
    tokenizer = tokenizer_with(image_token="<image>", video_token="<video>")
    images = hf.VideoLlama3ImageProcessor(**pixels_of(14), merge_size=1)
    videos = hf.VideoLlama3VideoProcessor(**pixels_of(14))
    processor = hf.VideoLlama3Processor(images, tokenizer, videos, chat_template=IMAGE_TOKEN)
    config = hf.VideoLlama3Config(
        text_config=text_config(tokenizer, "qwen2"),
        vision_config=tower("video_llama_3_vision"),
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
    )
    return hf.VideoLlama3ForConditionalGeneration(config), processor


def qianfan_ocr() -> Tiny:
    return _internvl("QianfanOCRForConditionalGeneration", "QianfanOCRConfig", "qianfan_ocr_vision", "qwen3")


def _internvl(kind: str, config: str, vision: str, text: str) -> Tiny:
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = tokenizer_with(**names, video_token="<video>")
    images = hf.GotOcr2ImageProcessor(size=square(28), max_patches=4)
    videos = hf.InternVLVideoProcessor(size=square(28))
    settings: dict[str, Any] = {"image_seq_length": 4, "chat_template": chatml("<IMG_CONTEXT>\\n")}
    processor = hf.InternVLProcessor(images, tokenizer, videos, **settings)
    made = getattr(hf, config)(
        text_config=text_config(tokenizer, text, head_dim=16),
        vision_config=tower(vision, patch_size=7),
        image_token_id=processor.image_token_id,
        tie_word_embeddings=False,
    )
    return getattr(hf, kind)(made), processor


OTHERS = {
    "gemma4": gemma4,
    "gemma3n": gemma3n,
    "llava_next": llava_next,
    "vipllava": vipllava,
    "instructblip": instructblip,
    "glm_ocr": glm_ocr,
    "glm4v_moe": glm4v_moe,
    "exaone4_5": exaone4_5,
    "deepseek_vl": deepseek_vl,
    "lighton_ocr": lighton_ocr,
    "aria": aria,
    "video_llama_3": video_llama_3,
    "qianfan_ocr": qianfan_ocr,
}
