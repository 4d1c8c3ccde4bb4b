"""The maps of vision-language models on the meta device: counts, and what is left out.

The models have the sizes that their configs have by default, mostly those of the first published one.
"""

import re
from collections import Counter

import pytest
import torch
import transformers
from torch import nn

import dora_mm
from dora_mm import DoRASpec, targets
from dora_mm.core.targets import adaptable, match_modules, parts_in
from dora_mm.core.wrappers.attention import with_projections

PATCHES = {"model.vision_tower.embeddings.patch_embedding"}
HEAD = {"lm_head"}
OPT_HEAD = {"language_model.lm_head"}
BLIP_HEAD = {"text_decoder.cls.predictions.transform.dense", "text_decoder.cls.predictions.decoder"}
BLIP_PATCHES = {"vision_model.embeddings.patch_embedding"}
SIGLIP_HEAD = {f"model.vision_tower.head.{layer}" for layer in ("attention.out_proj", "mlp.fc1", "mlp.fc2")}
SIGLIP_HEAD |= {f"model.vision_tower.head.attention.{name}_proj" for name in "qkv"}
DAVIT = {"model.vision_tower.convs.N.conv"}
DAVIT |= {f"model.vision_tower.blocks.N.N.{kind}_block.conv{i}" for kind in ("spatial", "channel") for i in (1, 2)}

# Class -> its map, the number of modules of text.attn, text.mlp, vision.attn, vision.mlp, connector and cross, and the
# other modules that could be adapted, embeddings apart.
CASES = {
    "LlavaForConditionalGeneration": ("llava", (128, 96, 96, 48, 2), HEAD | PATCHES),
    "LlavaNextForConditionalGeneration": ("llava", (128, 96, 96, 48, 2), HEAD | PATCHES),
    "LlavaOnevisionForConditionalGeneration": ("llava", (128, 96, 104, 52, 2), HEAD | PATCHES),
    "VipLlavaForConditionalGeneration": ("llava", (128, 96, 96, 48, 2), HEAD | PATCHES),
    "PaliGemmaForConditionalGeneration": ("paligemma", (72, 54, 108, 54, 1), HEAD | PATCHES),
    "Gemma3ForConditionalGeneration": ("gemma3", (104, 78, 48, 24), HEAD | PATCHES | SIGLIP_HEAD),
    "InternVLForConditionalGeneration": (
        "internvl",
        (128, 96, 96, 48, 2),
        HEAD | {"model.vision_tower.embeddings.patch_embeddings.projection"},
    ),
    "Qwen2VLForConditionalGeneration": ("qwen2-vl", (320, 240, 64, 64, 2), HEAD | {"model.visual.patch_embed.proj"}),
    "Qwen2_5_VLForConditionalGeneration": ("qwen2-vl", (320, 240, 64, 96, 2), HEAD | {"model.visual.patch_embed.proj"}),
    "Qwen3VLForConditionalGeneration": ("qwen3-vl", (128, 96, 54, 54, 8), HEAD | {"model.visual.patch_embed.proj"}),
    "Idefics3ForConditionalGeneration": (
        "idefics3",
        (128, 96, 48, 24, 1),
        HEAD | {"model.vision_model.embeddings.patch_embedding"},
    ),
    "SmolVLMForConditionalGeneration": (
        "idefics3",
        (128, 96, 48, 24, 1),
        HEAD | {"model.vision_model.embeddings.patch_embedding"},
    ),
    "MllamaForConditionalGeneration": (
        "mllama",
        (128, 120, 160, 80, 1, 32),
        HEAD | {"model.vision_model.patch_embedding"},
    ),
    "Florence2ForConditionalGeneration": ("florence2", (96, 48, 48, 48, 1, 48), HEAD | DAVIT),
    "BlipForQuestionAnswering": ("blip", (96, 48, 24, 24, 0, 96), BLIP_HEAD | BLIP_PATCHES),
    "BlipForConditionalGeneration": ("blip", (48, 24, 24, 24, 0, 48), BLIP_HEAD | BLIP_PATCHES),
    "Blip2ForConditionalGeneration": ("blip-2", (48, 24, 78, 78, 97), OPT_HEAD | BLIP_PATCHES),
    "InstructBlipForConditionalGeneration": (
        "blip-2",
        (48, 24, 78, 78, 121),
        OPT_HEAD | BLIP_PATCHES,
    ),
    "GitForCausalLM": (
        "git",
        (24, 12, 48, 24, 1),
        {"output", "git.image_encoder.vision_model.embeddings.patch_embedding"},
    ),
    "T5ForConditionalGeneration": ("t5", (48, 24, 0, 0, 0, 24), HEAD),
    "MT5ForConditionalGeneration": ("t5", (64, 48, 0, 0, 0, 32), HEAD),
    "UMT5EncoderModel": ("t5", (32, 24), set()),
}
PARTS = ("text.attn", "text.mlp", "vision.attn", "vision.mlp", "connector", "cross")


def on_meta(kind, config=None):
    with torch.device("meta"):
        return kind(config or kind.config_class())


def taken_by(model, name):
    chosen = targets.find(name)
    return match_modules(model, chosen.select(parts_in(model, chosen)))


def left_out_by(model, taken):
    modules = with_projections(dict(model.named_modules()))
    paths = {path for path, module in modules.items() if adaptable(module) and not isinstance(module, nn.Embedding)}
    return {re.sub(r"(?<=\.)\d+(?=\.)", "N", path) for path in paths - set(taken)}


@pytest.mark.parametrize("name", CASES)
def test_every_class(name):
    expected_map, numbers, left_out = CASES[name]
    model = on_meta(getattr(transformers, name))
    for asked in (model, model.config, model.config.to_dict()):
        assert targets.map_of(asked) is targets.find(expected_map)
    taken = taken_by(model, expected_map)
    assert Counter(taken.values()) == Counter(dict(zip(PARTS, numbers, strict=False)))
    assert left_out_by(model, taken) == left_out


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        (transformers.MistralConfig(num_hidden_layers=2), (8, 6)),
        (transformers.Phi3Config(num_hidden_layers=2), (4, 4)),
        (transformers.Starcoder2Config(num_hidden_layers=2), (8, 4)),
    ],
)
def test_a_llava_with_another_language_model_and_tower(text, counts):
    vision = transformers.PixtralVisionConfig(num_hidden_layers=3)
    model = on_meta(
        transformers.LlavaForConditionalGeneration, transformers.LlavaConfig(text_config=text, vision_config=vision)
    )
    found = Counter(taken_by(model, "llava").values())
    assert found == dict(zip(PARTS, (*counts, 12, 9, 2), strict=False))


def test_the_language_model_inside():
    model = on_meta(transformers.Qwen2_5_VLForConditionalGeneration).model.language_model
    assert targets.map_of(model) is targets.find("llm")
    assert len(taken_by(model, "llm")) == 560


def test_a_bart_with_and_without_its_head():
    """facebook/bart-base names BartModel as its class."""
    config = transformers.BartConfig(encoder_layers=2, decoder_layers=3)
    for kind in (transformers.BartModel, transformers.BartForConditionalGeneration):
        model = on_meta(kind, config)
        assert targets.map_of(model) is targets.find("bart")
        found = Counter(taken_by(model, "bart").values())
        assert found == {"text.qv": 10, "text.ko": 10, "text.mlp": 10, "cross.qv": 6, "cross.ko": 6}


def test_blip_2_with_t5():
    config = transformers.Blip2Config(text_config=transformers.T5Config(num_layers=2, num_decoder_layers=3))
    found = Counter(taken_by(on_meta(transformers.Blip2ForConditionalGeneration, config), "blip-2").values())
    assert (found["text.attn"], found["text.mlp"], found["cross"]) == (20, 10, 12)


@pytest.mark.parametrize(
    ("tower", "width", "attention", "mlp"),
    [("fastvit_mci0", 1024, 4, 40), ("tf_efficientnet_lite0", 1280, 0, 31)],
)
def test_fastvlm_with_towers_of_timm(tower, width, attention, mlp):
    vision = transformers.TimmWrapperConfig(architecture=tower, do_pooling=False, hidden_size=width)
    text = transformers.LlamaConfig(num_hidden_layers=2)
    config = transformers.FastVlmConfig(text_config=text, vision_config=vision)
    model = on_meta(transformers.FastVlmForConditionalGeneration, config)
    assert targets.map_of(model) is targets.find("fastvlm")
    found = Counter(taken_by(model, "fastvlm").values())
    assert found == Counter(dict(zip(PARTS, (8, 6, attention, mlp, 2), strict=False)))


# --- full size -------------------------------------------------------------------------------------------------------


def added(rank, *layers):
    """Parameters of DoRA: A, B and m of layers (in, out)."""
    return sum(rank * (inside + outside) + outside for inside, outside in layers)


def test_llava_1_5_7b():
    """Llama 7B: 32 blocks of width 4096 and 11,008; CLIP ViT-L: 24 blocks of width 1024."""
    config = transformers.LlavaConfig(text_config=transformers.LlamaConfig(vocab_size=32_064))
    model = on_meta(transformers.LlavaForConditionalGeneration, config)
    assert sum(p.numel() for p in model.parameters()) == 7_063_427_072
    report = dora_mm.inject(model, "llava", DoRASpec(rank=8))
    width, inner = 4096, 11_008
    block = added(8, *[(width, width)] * 4, *[(width, inner)] * 2, (inner, width))
    assert (report.num_modules, report.num_parameters) == (224, 32 * block)
    dora_mm.remove(model)
    report = dora_mm.inject(model, "llava", DoRASpec(rank=8), parts=["vision.attn", "vision.mlp", "connector"])
    tower = 24 * added(8, *[(1024, 1024)] * 4, (1024, 4096), (4096, 1024))
    assert (report.num_modules, report.num_parameters) == (146, tower + added(8, (1024, width), (width, width)))


def test_qwen2_5_vl_7b():
    """28 blocks of width 3584 with 4 of 28 heads for keys and values; a tower of 32 blocks of width 1280."""
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584, "num_heads": 16}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    model = on_meta(transformers.Qwen2_5_VLForConditionalGeneration, config)
    assert sum(p.numel() for p in model.parameters()) == 8_292_166_656
    report = dora_mm.inject(model, "qwen2-vl", DoRASpec(rank=8), parts=PARTS[:5])
    block = added(8, (3584, 3584), (3584, 512), (3584, 512), (3584, 3584), *[(3584, 18_944)] * 2, (18_944, 3584))
    tower = added(8, (1280, 3840), (1280, 1280), *[(1280, 3420)] * 2, (3420, 1280))
    merger = added(8, (5120, 5120), (5120, 3584))
    assert report.num_modules == 28 * 7 + 32 * 5 + 2
    assert report.num_parameters == 28 * block + 32 * tower + merger


# --- models that do not fit ------------------------------------------------------------------------------------------


def test_a_block_with_other_layers_is_refused():
    vision = transformers.CLIPVisionConfig(num_hidden_layers=3)
    config = transformers.LlavaConfig(text_config=transformers.LlamaConfig(num_hidden_layers=2), vision_config=vision)
    model = on_meta(transformers.LlavaForConditionalGeneration, config)
    block = model.model.vision_tower.encoder.layers[1].mlp
    block.fc_two = block.fc2
    del block.fc2
    with pytest.raises(ValueError, match="expects 2 or 3 modules of part vision.mlp in each block") as error:
        dora_mm.inject(model, "llava", DoRASpec(), parts=["vision.mlp"])
    assert "layers.1 has 1: model.vision_tower.encoder.layers.1.mlp.fc1; nearest of the others: " in str(error.value)
    assert "fc_two" in str(error.value)


def test_models_without_a_map():
    with pytest.raises(ValueError, match="^there is no target map for llava_next_video; nearest: llava_next, "):
        targets.map_of(transformers.LlavaNextVideoConfig())
    with pytest.raises(ValueError, match="^there is no target map for Sequential; nearest: "):
        targets.map_of(nn.Sequential())
