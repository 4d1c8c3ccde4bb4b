"""Tiny models of Inkling, Muse, the Omni thinkers, and of classes that write images, too, or have no chat template."""

from typing import Any

import transformers as hf
from transformers import PreTrainedTokenizerBase

from tests.shared.vl import vocabularies
from tests.shared.vl.further_models import CLIP
from tests.shared.vl.newer_models import Tiny, tokenizer_with
from tests.shared.vl.qwen_models import EXPERTS, MROPE, SECTIONS, TOWER, pixels_of
from tests.shared.vl.rare_models import SLIDING
from tests.shared.vl.sizes import LAYERS, SPREAD, square, text_config
from tests.shared.vl.templates import chatml


def inkling2(kind: str = "Inkling2", **others: Any) -> Tiny:
    tokenizer = tokenizer_with(image_token="<|unused_200054|>")
    images = hf.Inkling2ImageProcessor(size=square(28))
    processor = hf.Inkling2Processor(images, tokenizer, chat_template=chatml("<|unused_200054|>"))
    heads = {f"{window}num_{kind}heads": 2 for window in ("", "swa_") for kind in ("attention_", "key_value_")}
    layers = {"head_dim": 16, "swa_head_dim": 16, "layer_types": ["hybrid_sliding", "hybrid"], "d_rel": 4}
    sizes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "rel_extent": 64}
    text = text_config(tokenizer, f"{kind.lower().replace('loop', '_loop')}_text", **sizes | layers | others) | heads
    vision = {"patch_size": 14, "posemb_grid_size": 4, "projection_hidden_dim": 48, "text_hidden_size": 32}
    config = getattr(hf, f"{kind}Config")(
        text_config=text | {"unpadded_vocab_size": len(tokenizer), "n_layers_per_attn_res_block": 1},
        vision_config=LAYERS | vision | {"model_type": "inkling2_vision", "mlp_ratio": 2.0},
        image_token_id=tokenizer.image_token_id,
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config), processor


def inkling2_loop() -> Tiny:
    loop = {"loop_layer_index_start": 1, "loop_layer_index_end": 2, "loop_num_passes": 2, "loop_gate_rank": 4}
    loop |= {"num_hidden_layers": 3, "layer_types": ["hybrid_sliding", "hybrid", "hybrid"]}
    return inkling2("Inkling2Loop", **loop)


def inkling() -> Tiny:
    names = {"image_token": "<|unused_200054|>", "audio_token": "<|unused_200053|>"}
    tokenizer = tokenizer_with("<|content_image|>", "<|content_audio_input|>", **names)
    processor = hf.InklingProcessor(
        hf.InklingFeatureExtractor(),
        hf.InklingImageProcessor(size=square(28)),
        tokenizer,
        chat_template=chatml("<|content_image|><|unused_200054|>"),
    )
    heads = {f"{window}num_{kind}heads": 2 for window in ("", "swa_") for kind in ("attention_", "key_value_")}
    layers = {"head_dim": 16, "swa_head_dim": 16, "layer_types": ["hybrid_sliding", "hybrid"], "d_rel": 4}
    sizes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "rel_extent": 64}
    text = text_config(tokenizer, "inkling_text", **sizes, **layers, mlp_layer_types=["dense", "sparse"]) | heads
    config = hf.InklingConfig(
        text_config=text | {"n_shared_experts": 1},
        vision_config=SPREAD | {"text_hidden_size": 32, "patch_size": 28, "hidden_size": 32, "n_layers": 4},
        audio_config={"text_hidden_size": 32},
        image_token_id=tokenizer.image_token_id,
        audio_token_id=tokenizer.audio_token_id,
        image_bos_token_id=tokenizer.convert_tokens_to_ids("<|content_image|>"),
        audio_bos_token_id=tokenizer.convert_tokens_to_ids("<|content_audio_input|>"),
    )
    return hf.InklingForConditionalGeneration(config), processor


def muse(kind: str, *extractor: Any, **others: Any) -> Tiny:
    names = "<|patch|> <|image_start|> <|image_end|> <|video|> <|vid_frame_separator|> <|vid_start|> <|vid_end|>"
    tokenizer = tokenizer_with(*names.split(), "<|audio|>", "<|soft_audio_start|>", "<|soft_audio_end|>")
    images = hf.MuseGlimmerImageProcessor(patch_size=14, max_image_tokens=4)
    videos = hf.MuseGlimmerVideoProcessor(patch_size=14)
    template = chatml("<|image_start|><|patch|><|image_end|>")
    processor = getattr(hf, f"{kind}Processor")(images, videos, tokenizer, *extractor, chat_template=template)
    text_type = f"{'muse_glimmer' if kind == 'MuseGlimmer' else 'muse_spark'}_text"
    text = text_config(tokenizer, text_type, **SLIDING | others, layer_rope_theta=[1e4, 0])
    vision = {"pos_emb_height": 4, "pos_emb_width": 4, "layer_types": ["window_attention", "full_attention"]}
    config = getattr(hf, f"{kind}Config")(
        text_config=text,
        vision_config=LAYERS | vision | {"max_position_embeddings": 16},
        out_hidden_size=128,
        projector_hidden_size=48,
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        **({"audio_token_id": processor.audio_token_id} if extractor else {}),
        **({"audio_config": {"out_hidden_size": 32}} if extractor else {}),
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config), processor


def muse_glimmer() -> Tiny:
    return muse("MuseGlimmer")


def muse_spark() -> Tiny:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "moe_hidden_size": 16}
    return muse("MuseSpark", hf.MuseSparkFeatureExtractor(), **experts, mlp_layer_types=["dense", "sparse"])


def omni_tokenizer() -> PreTrainedTokenizerBase:
    names = {"image_token": "<|IMAGE|>", "video_token": "<|VIDEO|>", "audio_token": "<|AUDIO|>"}
    names |= {"vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>"}
    return tokenizer_with(**names, audio_bos_token="<|audio_bos|>", audio_eos_token="<|audio_eos|>")


def qwen2_5_omni() -> Tiny:
    tokenizer = omni_tokenizer()
    images, videos = hf.Qwen2VLImageProcessor(**pixels_of(14)), hf.Qwen2VLVideoProcessor(**pixels_of(14))
    template = chatml("<|vision_bos|><|IMAGE|><|vision_eos|>")
    processor = hf.Qwen2_5OmniProcessor(images, videos, hf.WhisperFeatureExtractor(), tokenizer, template)
    vision = {"intermediate_size": 48, "out_hidden_size": 32, "window_size": 56, "fullatt_block_indexes": [1]}
    audio = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "output_dim": 32}
    config = hf.Qwen2_5OmniThinkerConfig(
        text_config=text_config(tokenizer, "qwen2_5_omni_text", rope_parameters=SECTIONS),
        vision_config=TOWER | vision,
        audio_config=audio,
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        audio_token_index=tokenizer.audio_token_id,
        vision_start_token_id=tokenizer.vision_bos_token_id,
        audio_start_token_id=tokenizer.audio_bos_token_id,
        audio_end_token_id=tokenizer.audio_eos_token_id,
    )
    return hf.Qwen2_5OmniThinkerForConditionalGeneration(config), processor


def qwen3_omni() -> Tiny:
    tokenizer = omni_tokenizer()
    images, videos = hf.Qwen2VLImageProcessor(**pixels_of(16)), hf.Qwen2VLVideoProcessor(**pixels_of(16))
    template = chatml("<|vision_bos|><|IMAGE|><|vision_eos|>")
    processor = hf.Qwen3OmniMoeProcessor(images, videos, hf.WhisperFeatureExtractor(), tokenizer, template)
    vision = {"intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 16}
    audio = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "output_dim": 32}
    config = hf.Qwen3OmniMoeThinkerConfig(
        text_config=text_config(tokenizer, "qwen3_omni_moe_text", head_dim=16, rope_parameters=MROPE, **EXPERTS),
        vision_config=TOWER | vision | {"deepstack_visual_indexes": [0]},
        audio_config=audio | {"downsample_hidden_size": 16},
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        audio_token_id=tokenizer.audio_token_id,
        vision_start_token_id=tokenizer.vision_bos_token_id,
        audio_start_token_id=tokenizer.audio_bos_token_id,
    )
    return hf.Qwen3OmniMoeThinkerForConditionalGeneration(config), processor


def emu3() -> Tiny:
    names = {"image_token": "<image>", "boi_token": "<|image start|>", "eoi_token": "<|image end|>"}
    names |= {"image_wrapper_token": "<|image token|>", "eof_token": "<|extra_201|>"}
    codes = [f"<|visual token {number:06d}|>" for number in range(16)]
    codes.append("<|extra_200|>")  # ends a line of an image
    tokenizer = tokenizer_with(*codes, **names)
    tokenizer.bos_token = "<|im_start|>"
    images = hf.Emu3ImageProcessor(min_pixels=32 * 32, max_pixels=64 * 64)
    processor = hf.Emu3Processor(images, tokenizer, chat_template=chatml("<image>"))
    vq = {"codebook_size": 16, "base_channels": 32, "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1}
    config = hf.Emu3Config(
        text_config=text_config(tokenizer, "emu3_text_model"),
        vq_config=vq | {"hidden_size": 32, "attn_resolutions": []},
        vocabulary_map={token: tokenizer.convert_tokens_to_ids(token) for token in (*codes, "<image>")},
        image_token_id=tokenizer.image_token_id,
    )
    return hf.Emu3ForConditionalGeneration(config), processor


def chameleon() -> Tiny:
    codes = [f"IMGIMGI{letter}Z" for letter in "ABCDEFGH"]
    tokenizer = tokenizer_with("<racm3:break>", "<eoss>", *codes, image_token="<image>")
    images = hf.ChameleonImageProcessor(size={"shortest_edge": 32}, crop_size=square(32))
    processor = hf.ChameleonProcessor(images, tokenizer, image_seq_length=4)
    vq = {"num_embeddings": 8, "embed_dim": 16, "latent_channels": 16, "resolution": 32, "base_channels": 32}
    config = hf.ChameleonConfig(
        vq_config=vq | {"num_res_blocks": 1, "channel_multiplier": [1, 1, 1, 1, 1]},
        vocabulary_map={token: tokenizer.convert_tokens_to_ids(token) for token in (*codes, "<image>")},
        image_token_id=tokenizer.image_token_id,
        **text_config(tokenizer, "chameleon"),
    )
    return hf.ChameleonForConditionalGeneration(config), processor


def got_ocr2() -> Tiny:
    tokenizer = tokenizer_with("<img>", "</img>", "<imgpad>")
    processor = hf.GotOcr2Processor(
        hf.GotOcr2ImageProcessor(size=square(64)), tokenizer, chat_template=chatml("<img><imgpad></img>")
    )
    vision = {"image_size": 64, "patch_size": 4, "output_channels": 16, "mlp_dim": 48, "window_size": 4}
    config = hf.GotOcr2Config(
        text_config=text_config(tokenizer, "qwen2"),
        vision_config=LAYERS | vision | {"global_attn_indexes": [1]},
        image_token_index=tokenizer.convert_tokens_to_ids("<imgpad>"),
    )
    return hf.GotOcr2ForConditionalGeneration(config), processor


def fuyu() -> Tiny:
    tokenizer = vocabularies.llama()
    tokenizer.add_tokens(["|SPEAKER|", "|NEWLINE|", "<0x04>"], special_tokens=True)
    images = hf.FuyuImageProcessor(size=square(60), patch_size=square(30))
    processor = hf.FuyuProcessor(images, tokenizer)
    text = text_config(tokenizer, "persimmon")
    config = hf.FuyuConfig(text_config=text, image_token_id=processor.image_token_id)
    return hf.FuyuForCausalLM(config), processor


def kosmos2() -> Tiny:
    tokenizer = vocabularies.gpt2(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    images = hf.CLIPImageProcessor(**CLIP)
    processor = hf.Kosmos2Processor(images, tokenizer, 128)
    sizes = {"embed_dim": 32, "layers": 2, "ffn_dim": 48, "attention_heads": 2, "init_std": 0.1}
    config = hf.Kosmos2Config(
        text_config=sizes | {"vocab_size": len(tokenizer), "max_position_embeddings": 256},
        vision_config=LAYERS | {"image_size": 28},
        latent_query_num=64,
    )
    return hf.Kosmos2ForConditionalGeneration(config), processor


def kosmos2_5() -> Tiny:
    names = {"image_token": "<img>", "boi_token": "<image>", "eoi_token": "</image>"}
    tokenizer = vocabularies.gpt2(bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens=names)
    processor = hf.Kosmos2_5Processor(hf.Kosmos2_5ImageProcessor(max_patches=32), tokenizer, num_image_tokens=8)
    sizes = {"embed_dim": 32, "layers": 2, "ffn_dim": 48, "attention_heads": 2, "init_std": 0.1}
    tower = {"patch_embed_hidden_size": 768, "head_dim": 16, "max_num_patches": 64}
    config = hf.Kosmos2_5Config(
        text_config=sizes | {"vocab_size": len(tokenizer), "max_position_embeddings": 256},
        vision_config=LAYERS | tower,
        latent_query_num=8,
    )
    return hf.Kosmos2_5ForConditionalGeneration(config), processor


def idefics() -> Tiny:
    names = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    tokenizer = vocabularies.llama()
    tokenizer.add_tokens(names, special_tokens=True)
    processor = hf.IdeficsProcessor(hf.IdeficsImageProcessor(size=square(28)), tokenizer, image_size=28)
    vision = {"embed_dim": 32, "image_size": 28, "intermediate_size": 48, "num_hidden_layers": 2}
    config = hf.IdeficsConfig(
        vision_config=SPREAD | vision | {"num_attention_heads": 2},
        **text_config(tokenizer, "idefics"),
        alpha_initializer="ones",
    )
    return hf.IdeficsForVisionText2Text(config), processor


def apertus1p5() -> Tiny:
    names = {"image_token": "<image>", "audio_token": "<audio>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    names |= {"image_wrapper_token": "<img>", "eol_token": "<eol>", "boa_token": "<boa>", "eoa_token": "<eoa>"}
    tokenizer = tokenizer_with(*(f"<code{number}>" for number in range(16)), **names)
    processor = hf.Apertus1p5Processor(
        hf.Apertus1p5ImageProcessor(size={"min_pixels": 32 * 32, "max_pixels": 64 * 64}),
        hf.EncodecFeatureExtractor(),
        tokenizer,
        chat_template=chatml("<image>"),
    )
    vision = {"codebook_size": 16, "embed_dim": 16, "latent_channels": 16, "base_channels": 32, "num_res_blocks": 1}
    size = len(tokenizer)
    config = hf.Apertus1p5Config(
        text_config=text_config(tokenizer, "apertus1p5_text") | {"vocab_size": size + 4096},
        vision_config=vision | {"channel_multiplier": [1, 1, 1, 1, 1]},
        image_token_id=tokenizer.image_token_id,
        audio_token_id=tokenizer.audio_token_id,
        image_token_offset=tokenizer.convert_tokens_to_ids("<code0>"),
        audio_token_offset=size,
    )
    return hf.Apertus1p5ForConditionalGeneration(config), processor


def nemotron_h_omni() -> Tiny:
    names = {"image_token": "<image>", "video_token": "<video>", "audio_token": "<so_embedding>"}
    tokenizer = tokenizer_with("<img>", "</img>", "<so_start>", "<so_end>", **names)
    processor = hf.NemotronH_Omni_Reasoning_V3Processor(
        hf.NemotronH_Omni_Reasoning_V3ImageProcessor(patch_size=14, min_num_patches=4, max_num_patches=16),
        hf.NemotronH_Omni_Reasoning_V3VideoProcessor(patch_size=14, norm_mean=[0.5] * 3, norm_std=[0.5] * 3),
        tokenizer,
        hf.ParakeetFeatureExtractor(),
        chat_template=chatml("<img><image></img>"),
    )
    mamba = {"mamba_num_heads": 2, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "head_dim": 16}
    layers = {"layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3}
    config = hf.NemotronH_Omni_Reasoning_V3_Config(
        text_config=text_config(tokenizer, "nemotron_h", **mamba) | layers,
        vision_config=LAYERS
        | {"model_type": "radio", "patch_size": 14, "image_size": 56, "video_temporal_patch_size": 2},
        projector_hidden_size=48,
        vision_hidden_size=32,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        audio_token_id=tokenizer.audio_token_id,
    )
    return hf.NemotronH_Omni_Reasoning_V3(config), processor


RAREST = {
    "kosmos-2": kosmos2,
    "apertus1p5": apertus1p5,
    "nemotron_h_omni": nemotron_h_omni,
    "inkling2": inkling2,
    "inkling2_loop": inkling2_loop,
    "inkling_mm_model": inkling,
    "muse_glimmer": muse_glimmer,
    "muse_spark": muse_spark,
    "qwen2_5_omni_thinker": qwen2_5_omni,
    "qwen3_omni_moe_thinker": qwen3_omni,
    "emu3": emu3,
    "chameleon": chameleon,
}
UNTRAINED = {  # by type, with what refuses their rows
    "got_ocr2": got_ocr2,
    "fuyu": fuyu,
    "idefics": idefics,
    "kosmos-2.5": kosmos2_5,
}
