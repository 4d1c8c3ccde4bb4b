"""Tiny models whose config.json names more than what reads images: the Omni models, with what speaks, and Phi-4."""

from typing import Any

import transformers as hf

from tests.shared.vl.newer_models import Tiny, tokenizer_with
from tests.shared.vl.qwen_models import EXPERTS, MROPE, SECTIONS
from tests.shared.vl.rarest_models import qwen2_5_omni, qwen3_omni
from tests.shared.vl.sizes import LAYERS, TEXT, text_config
from tests.shared.vl.templates import PHI_4

SPEECH = {"head_dim": 16, "vocab_size": 32}
WAVES: dict[str, Any] = {
    "dit_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16, "emb_dim": 16}
    | {"num_embeds": 33, "mel_dim": 16, "enc_emb_dim": 8, "enc_dim": 8, "enc_attention_channels": 4}
    | {"enc_channels": [16, 16, 16, 16, 48], "enc_res2net_scale": 2, "enc_se_channels": 4},
    "bigvgan_config": {
        "mel_dim": 16,
        "upsample_initial_channel": 32,
        "upsample_rates": [2],
        "upsample_kernel_sizes": [4],
    }
    | {"resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3, 5]]},
}


def whole_qwen2_5_omni() -> Tiny:
    thinker, processor = qwen2_5_omni()
    sizes = TEXT | SPEECH | {"embedding_size": 32, "rope_parameters": SECTIONS}
    config = hf.Qwen2_5OmniConfig(thinker_config=thinker.config.to_dict(), talker_config=sizes, token2wav_config=WAVES)
    return hf.Qwen2_5OmniForConditionalGeneration(config), processor


def whole_qwen3_omni() -> Tiny:
    thinker, processor = qwen3_omni()
    speech = TEXT | SPEECH | {"rope_parameters": MROPE}
    talker = {
        "text_config": speech | EXPERTS | {"shared_expert_intermediate_size": 16},
        "code_predictor_config": TEXT | SPEECH,
        "thinker_hidden_size": 32,
        "accept_hidden_layer": 1,
        "num_code_groups": 2,
        "spatial_merge_size": 2,
    }
    waves = LAYERS | {"codebook_size": 32, "num_key_value_heads": 2, "num_quantizers": 2, "decoder_dim": 32}
    waves |= {"upsample_rates": [2, 2], "upsampling_ratios": [2]}
    config = hf.Qwen3OmniMoeConfig(thinker_config=thinker.config.to_dict(), talker_config=talker, code2wav_config=waves)
    return hf.Qwen3OmniMoeForConditionalGeneration(config), processor


def phi4_multimodal() -> Tiny:
    """Its template is in tokenizer_config.json; the processor's files have none."""
    tokenizer = tokenizer_with("<|user|>", "<|assistant|>", "<|end|>", image_token="<|image|>", audio_token="<|audio|>")
    tokenizer.chat_template = PHI_4
    processor = hf.Phi4MultimodalProcessor(
        hf.Phi4MultimodalImageProcessor(dynamic_hd=2), hf.Phi4MultimodalFeatureExtractor(), tokenizer
    )
    audio = {"hidden_size": 32, "intermediate_size": 48, "num_blocks": 1, "num_attention_heads": 2}
    audio |= {"ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32}
    config = hf.Phi4MultimodalConfig(
        **text_config(tokenizer, "phi4_multimodal"),
        vision_config=LAYERS | {"image_token_id": tokenizer.image_token_id},
        audio_config=audio | {"audio_token_id": tokenizer.audio_token_id},
    )
    return hf.Phi4MultimodalForCausalLM(config), processor


WHOLE = {"whole_qwen2_5_omni": whole_qwen2_5_omni, "whole_qwen3_omni": whole_qwen3_omni}
WHOLE["phi4_multimodal"] = phi4_multimodal
