"""Tiny models of the classes whose published models have no chat template."""

from tokenizers import processors
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedModel,
    ProcessorMixin,
    SiglipImageProcessor,
)

from tests.shared.vl import vocabularies
from tests.shared.vl.sizes import LAYERS, SPREAD, square, text_config, tower

BART_SIZES = {"layers": 2, "attention_heads": 2, "ffn_dim": 48}


def blip_vqa() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = vocabularies.bert()
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "extra_special_tokens": ["[ENC]"]})
    ends = {"eos_token_id": tokenizer.sep_token_id, "sep_token_id": tokenizer.sep_token_id}
    text = text_config(tokenizer, "blip_text_model", projection_dim=32, **ends)
    config = BlipConfig(text_config=text, vision_config=tower("blip_vision_model"))
    return BlipForQuestionAnswering(config), BlipProcessor(BlipImageProcessor(size=square(28)), tokenizer)


def blip_caption() -> tuple[PreTrainedModel, ProcessorMixin]:
    model, processor = blip_vqa()
    return BlipForConditionalGeneration(model.config), processor


def blip2() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = vocabularies.gpt2(bos_token="</s>", eos_token="</s>", pad_token="<pad>")
    begin = ("</s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[begin]
    )
    processor = Blip2Processor(BlipImageProcessor(size=square(28)), tokenizer, num_query_tokens=4)
    config = Blip2Config(
        text_config=text_config(tokenizer, "opt", ffn_dim=48, word_embed_proj_dim=32),
        vision_config=tower("blip_2_vision_model"),
        qformer_config=LAYERS,
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = Blip2ForConditionalGeneration(config)
    nn.init.normal_(model.query_tokens)  # fresh ones are all the same, and attention among them changes nothing
    return model, processor


def git() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = vocabularies.bert(model_input_names=["input_ids", "attention_mask"])
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=square(28))
    ends = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    text = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id} | ends
    config = GitConfig(vision_config=tower("git_vision_model"), **LAYERS, **text)
    return GitForCausalLM(config), GitProcessor(images, tokenizer)


def florence2() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = vocabularies.bart(extra_special_tokens={"image_token": "<image>"})
    images = CLIPImageProcessor(size=square(32), do_center_crop=False, image_seq_length=17)
    text = {f"{part}_{size}": value for part in ("encoder", "decoder") for size, value in BART_SIZES.items()}
    text |= {
        "model_type": "bart",
        "init_std": 0.1,
        "d_model": 32,
        "max_position_embeddings": 256,
        "vocab_size": len(tokenizer),
    }
    vision = SPREAD | {
        "depths": [1, 1],
        "patch_size": [7, 3],
        "patch_stride": [4, 2],  # 32 pixels become 4 x 4 features; their mean is one more
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [16, 32],
        "num_heads": [2, 2],
        "num_groups": [2, 2],
        "window_size": 4,
        "projection_dim": 32,
    }
    config = Florence2Config(
        text_config=text | {"init_std": 0.1}, vision_config=vision, image_token_id=tokenizer.image_token_id
    )
    model = Florence2ForConditionalGeneration(config)
    model.generation_config.update(num_beams=3, no_repeat_ngram_size=3, early_stopping=True, forced_bos_token_id=0)
    return model, Florence2Processor(images, tokenizer)


def paligemma() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = vocabularies.gemma(extra_special_tokens={"image_token": "<image>"})
    processor = PaliGemmaProcessor(SiglipImageProcessor(size=square(28), image_seq_length=4), tokenizer)
    config = PaliGemmaConfig(
        text_config=text_config(tokenizer, "gemma2", head_dim=16, query_pre_attn_scalar=16),
        vision_config=tower("siglip_vision_model", vision_use_head=False),
        image_token_index=processor.image_token_id,
        hidden_size=32,
        projection_dim=32,
    )
    return PaliGemmaForConditionalGeneration(config), processor
