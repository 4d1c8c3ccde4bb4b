"""Tiny models of the classes with a chat template, but for the Qwen-VL ones."""

import torch
from transformers import (
    CLIPImageProcessor,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessor,
    MllamaProcessor,
    PreTrainedModel,
    ProcessorMixin,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from tests.shared.vl import templates, vocabularies
from tests.shared.vl.sizes import LAYERS, square, text_config, tower

TILES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
IDEFICS_TOKENS = ["<fake_token_around_image>", "<image>", "<global-img>", *TILES]
IDEFICS_PIXELS = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}


def llava() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = vocabularies.llama(extra_special_tokens={"image_token": "<image>"})
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=square(28)),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=templates.LLAVA,
    )
    config = LlavaConfig(
        text_config=text_config(tokenizer, "llama"),
        vision_config=tower("clip_vision_model"),
        image_token_index=processor.image_token_id,
        image_seq_length=4,
    )
    return LlavaForConditionalGeneration(config), processor


def llava_onevision() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = vocabularies.qwen(extra_special_tokens=["<image>", "<video>"])
    grid = [[28, 28], [28, 56], [56, 28], [56, 56]]
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=square(28), image_grid_pinpoints=grid),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=square(28)),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=templates.LLAVA_ONEVISION,
    )
    config = LlavaOnevisionConfig(
        text_config=text_config(tokenizer, "qwen2"),
        vision_config=tower("siglip_vision_model", vision_use_head=False),
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        image_grid_pinpoints=grid,
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


def fast_vlm() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = vocabularies.qwen(extra_special_tokens={"image_token": "<image>"})
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=square(64)),
        tokenizer,
        patch_size=32,  # the stride of the tower
        vision_feature_select_strategy="full",
        chat_template=templates.FAST_VLM,
    )
    vision = {"model_type": "timm_wrapper", "architecture": "test_efficientnet", "do_pooling": False}
    config = FastVlmConfig(
        text_config=text_config(tokenizer, "llama"),
        vision_config=vision | {"hidden_size": 256},
        image_token_index=processor.image_token_id,
        image_seq_length=4,
    )
    model = FastVlmForConditionalGeneration(config)
    for module in model.model.vision_tower.modules():
        if isinstance(module, torch.nn.Conv2d):  # transformers expects a trained tower; its small weights end in zeros
            torch.nn.init.kaiming_normal_(module.weight)
    return model, processor


def smolvlm() -> tuple[PreTrainedModel, ProcessorMixin]:
    names = {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"}
    tokenizer = vocabularies.gpt2(**names, extra_special_tokens=IDEFICS_TOKENS)
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(**IDEFICS_PIXELS),
        tokenizer,
        SmolVLMVideoProcessor(size={"longest_edge": 28}, max_image_size={"longest_edge": 28}),
        image_seq_len=4,
        chat_template=templates.idefics("<|im_start|>"),
    )
    config = SmolVLMConfig(
        text_config=text_config(tokenizer, "llama"),
        vision_config=tower("smolvlm_vision", patch_size=7),
        image_token_id=processor.image_token_id,
    )
    return SmolVLMForConditionalGeneration(config), processor


def idefics3() -> tuple[PreTrainedModel, ProcessorMixin]:
    names = {"eos_token": "<end_of_utterance>", "pad_token": "<|end_of_text|>"}
    tokenizer = vocabularies.llama3(**names, extra_special_tokens=IDEFICS_TOKENS)
    processor = Idefics3Processor(
        Idefics3ImageProcessor(**IDEFICS_PIXELS),
        tokenizer,
        image_seq_len=4,
        chat_template=templates.idefics("<|begin_of_text|>"),
    )
    config = Idefics3Config(
        text_config=text_config(tokenizer, "llama"),
        vision_config=tower("idefics3_vision", patch_size=7),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return Idefics3ForConditionalGeneration(config), processor


def gemma3() -> tuple[PreTrainedModel, ProcessorMixin]:
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = vocabularies.gemma(extra_special_tokens=names)
    tokenizer.add_tokens(["<start_of_turn>", "<end_of_turn>"], special_tokens=True)
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size=square(56)), tokenizer, image_seq_length=4, chat_template=templates.GEMMA3
    )
    layers = {"head_dim": 16, "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]}
    config = Gemma3Config(
        text_config=text_config(tokenizer, "gemma3_text", sliding_window=64, **layers),
        vision_config=tower("siglip_vision_model", image_size=56, vision_use_head=False),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)  # zeros when made
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
    return model, processor


def internvl() -> tuple[PreTrainedModel, ProcessorMixin]:
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = vocabularies.qwen(extra_special_tokens=names | {"video_token": "<video>"})
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=square(28), max_patches=4),
        tokenizer,
        InternVLVideoProcessor(size=square(28)),
        image_seq_length=4,
        chat_template=templates.chatml("<IMG_CONTEXT>\\n"),
    )
    config = InternVLConfig(
        text_config=text_config(tokenizer, "qwen2"),
        vision_config=tower("internvl_vision", patch_size=7),
        image_token_id=processor.image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return InternVLForConditionalGeneration(config), processor


def mllama() -> tuple[PreTrainedModel, ProcessorMixin]:
    names = {"eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"}
    headers = ["<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"]
    tokenizer = vocabularies.llama3(**names, extra_special_tokens=[*headers, "<|image|>"])
    processor = MllamaProcessor(
        MllamaImageProcessor(size=square(28), max_image_tiles=4), tokenizer, chat_template=templates.MLLAMA
    )
    vision = {"model_type": "mllama_vision_model", "image_size": 28, "patch_size": 14, "vision_output_dim": 64}
    sizes = {"num_global_layers": 1, "intermediate_layers_indices": [0]}
    config = MllamaConfig(
        text_config=text_config(
            tokenizer,
            "mllama_text_model",
            num_hidden_layers=3,
            cross_attention_layers=[1],
            vocab_size=len(tokenizer) - 1,  # the image's token has an embedding and no logit
        ),
        vision_config=LAYERS | vision | sizes,
        image_token_index=processor.image_token_id,
    )
    model = MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "gate" in name.rpartition(".")[2]:
            torch.nn.init.constant_(parameter, 0.5)  # closed when made: no image would reach the text
    return model, processor
