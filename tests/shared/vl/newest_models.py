"""Tiny models of classes that transformers 5.25 added, with their real processors and ChatML as their template."""

import transformers as hf
from transformers import PreTrainedModel, ProcessorMixin

from tests.shared.vl import vocabularies
from tests.shared.vl.qwen_models import IMAGE, TOWER, ids, pixels_of, qwen_tokenizer
from tests.shared.vl.sizes import text_config, tower
from tests.shared.vl.templates import chatml

Tiny = tuple[PreTrainedModel, ProcessorMixin]
OVIS = ("image_start", "image_end", "video_start", "video_end", "image", "video")


def llava_onevision1_5() -> Tiny:
    tokenizer, pixels = qwen_tokenizer(), pixels_of(14) | {"temporal_patch_size": 1}
    images, videos = hf.Qwen2VLImageProcessor(**pixels), hf.Qwen2VLVideoProcessor(**pixels)
    config = hf.LlavaOnevision15Config(
        text_config=text_config(tokenizer, "qwen3", head_dim=16),
        vision_config=TOWER | {"intermediate_size": 48, "out_hidden_size": 32},
        **ids(tokenizer),
    )
    processor = hf.Exaone4_5_Processor(images, tokenizer, videos, chat_template=chatml(IMAGE))
    return hf.LlavaOnevision15ForConditionalGeneration(config), processor


def ovis2_5() -> Tiny:
    names = {f"{name}_token": f"<ovis_{name}>" for name in OVIS}
    tokenizer, pixels = vocabularies.qwen(extra_special_tokens=names), pixels_of(16)
    images, videos = hf.Ovis2_5ImageProcessor(**pixels), hf.Ovis2_5VideoProcessor(**pixels)
    processor = hf.Ovis2_5Processor(images, tokenizer, videos, chat_template=chatml(names["image_token"]))
    config = hf.Ovis2_5Config(
        text_config=text_config(tokenizer, "qwen3", head_dim=16),
        vision_config=tower("ovis2_5_vision", image_size=64, patch_size=16, vocab_size=40, window_size=64),
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(names[f"{name}_token"]) for name in OVIS},
    )
    return hf.Ovis2_5ForConditionalGeneration(config), processor


# Without those that the transformers of today lacks
NEWEST = {
    name: build
    for name, build in {"llava_onevision1_5": llava_onevision1_5, "ovis2_5": ovis2_5}.items()
    if name in hf.CONFIG_MAPPING
}
