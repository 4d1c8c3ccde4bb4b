"""The classes of the models of packaged recipes."""

MODELS = {  # the class of each recipe's model
    "llava_1_5_7b": "llava",
    "llava_onevision_7b": "llava_onevision",
    "qwen2_5_vl_7b": "qwen2_5_vl",
    "qwen3_vl_8b": "qwen3_vl",
    "qwen3_vl_30b_a3b": "qwen3_vl_moe",
    "internvl3_8b": "internvl",
    "qwen3_5_27b": "qwen3_5",
    "gemma4_e2b": "gemma4",
    "mistral_small_3_1_24b": "mistral3",
    "glm_4_1v_9b": "glm4v",
    "lfm2_vl_1_6b": "lfm2_vl",
    "gemma3_4b": "gemma3",
    "smolvlm_256m": "idefics3",
    "paligemma2_3b": "paligemma",
    "florence2_base": "florence2",
    "blip_vqa_base": "blip_vqa",
}
