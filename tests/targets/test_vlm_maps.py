"""The maps of vision-language models on the meta device: their modules, and what is left out.

The models have the sizes that their configs have by default, mostly those of the first published one.
"""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import dora_mm
from dora_mm import DoRASpec, targets
from dora_mm.core.targets import adaptable, match_modules, parts_in
from dora_mm.core.wrappers.separation import with_projections
from dora_mm.targets.derived import derive, numbered
from tests.shared.vl.rarest_models import inkling

PATCHES = {"model.vision_tower.embeddings.patch_embedding"}
HEAD = {"lm_head"}
OPT_HEAD = {"language_model.lm_head"}
BLIP_HEAD = {"text_decoder.cls.predictions.transform.dense", "text_decoder.cls.predictions.decoder"}
BLIP_PATCHES = {"vision_model.embeddings.patch_embedding"}
SIGLIP_HEAD = {f"model.vision_tower.head.{layer}" for layer in ("attention.out_proj", "mlp.fc1", "mlp.fc2")}
SIGLIP_HEAD |= {f"model.vision_tower.head.attention.{name}_proj" for name in "qkv"}
DAVIT = {"model.vision_tower.convs.N.conv"}
DAVIT |= {f"model.vision_tower.blocks.N.N.{kind}_block.conv{i}" for kind in ("spatial", "channel") for i in (1, 2)}

# Class -> the modules that could be adapted and are left out, embeddings apart.
LEFT_OUT = {
    "LlavaForConditionalGeneration": HEAD | PATCHES,
    "LlavaNextForConditionalGeneration": HEAD | PATCHES,
    "LlavaOnevisionForConditionalGeneration": HEAD | PATCHES,
    "VipLlavaForConditionalGeneration": HEAD | PATCHES,
    "PaliGemmaForConditionalGeneration": HEAD | PATCHES,
    "Gemma3ForConditionalGeneration": HEAD | PATCHES | SIGLIP_HEAD,
    "InternVLForConditionalGeneration": HEAD | {"model.vision_tower.embeddings.patch_embeddings.projection"},
    "Qwen2VLForConditionalGeneration": HEAD | {"model.visual.patch_embed.proj"},
    "Qwen2_5_VLForConditionalGeneration": HEAD | {"model.visual.patch_embed.proj"},
    "Qwen3VLForConditionalGeneration": HEAD | {"model.visual.patch_embed.proj"},
    "Idefics3ForConditionalGeneration": HEAD | {"model.vision_model.embeddings.patch_embedding"},
    "SmolVLMForConditionalGeneration": HEAD | {"model.vision_model.embeddings.patch_embedding"},
    "MllamaForConditionalGeneration": HEAD | {"model.vision_model.patch_embedding"},
    "Florence2ForConditionalGeneration": HEAD | DAVIT,
    "BlipForQuestionAnswering": BLIP_HEAD | BLIP_PATCHES,
    "BlipForConditionalGeneration": BLIP_HEAD | BLIP_PATCHES,
    "Blip2ForConditionalGeneration": OPT_HEAD | BLIP_PATCHES,
    "InstructBlipForConditionalGeneration": OPT_HEAD | BLIP_PATCHES,
    "GitForCausalLM": {"output", "git.image_encoder.vision_model.embeddings.patch_embedding"},
}
T5_COUNTS = {
    "T5ForConditionalGeneration": {"text.attn": 48, "text.mlp": 24, "cross": 24},
    "MT5ForConditionalGeneration": {"text.attn": 64, "text.mlp": 48, "cross": 32},
    "UMT5EncoderModel": {"text.attn": 32, "text.mlp": 24},
}
PARTS = ("text.attn", "text.mlp", "vision.attn", "vision.mlp", "connector")
MODULES = json.loads((Path(__file__).parent / "vlm_modules.json").read_text(encoding="utf-8"))
"""By case and part, the paths with N for numbers that maps written by hand took of these classes, and how often."""


def on_meta(kind, config=None):
    with torch.device("meta"):
        return kind(config or kind.config_class())


def taken_by(model):
    chosen = targets.map_of(model)
    return match_modules(model, chosen.select(parts_in(model, chosen)))


def left_out_by(model, taken):
    modules = with_projections(dict(model.named_modules()))
    paths = {path for path, module in modules.items() if adaptable(module) and not isinstance(module, nn.Embedding)}
    return {re.sub(r"(?<=\.)\d+(?=\.)", "N", path) for path in paths - set(taken)}


def fast_vlm(tower, width):
    vision = transformers.TimmWrapperConfig(architecture=tower, do_pooling=False, hidden_size=width)
    text = transformers.LlamaConfig(num_hidden_layers=2)
    config = transformers.FastVlmConfig(text_config=text, vision_config=vision)
    return on_meta(transformers.FastVlmForConditionalGeneration, config)


def llava_of(text):
    config = transformers.LlavaConfig(
        text_config=getattr(transformers, f"{text}Config")(num_hidden_layers=2),
        vision_config=transformers.PixtralVisionConfig(num_hidden_layers=3),
    )
    return on_meta(transformers.LlavaForConditionalGeneration, config)


def model_of(case):
    kind, _, other = case.partition(" ")
    if kind == "FastVLM":
        return fast_vlm(*{"mci0": ("fastvit_mci0", 1024), "lite0": ("tf_efficientnet_lite0", 1280)}[other])
    if kind == "Llava":
        return llava_of(other)
    if other == "t5":
        config = transformers.Blip2Config(text_config=transformers.T5Config(num_layers=2, num_decoder_layers=3))
        return on_meta(transformers.Blip2ForConditionalGeneration, config)
    return on_meta(getattr(transformers, kind))


FEW = list(MODULES)[::3]


@pytest.mark.parametrize("case", [c if c in FEW else pytest.param(c, marks=pytest.mark.slow) for c in MODULES])
def test_modules_of_a_derived_map_are_those_of_a_map_by_hand(case):
    model = model_of(case)
    found = defaultdict(Counter)
    for path, part in taken_by(model).items():
        found[part][re.sub(r"(?<=\.)\d+(?=\.)", "N", path)] += 1
    assert found == MODULES[case]
    if case in LEFT_OUT:
        assert left_out_by(model, taken_by(model)) == LEFT_OUT[case]


@pytest.mark.parametrize("name", T5_COUNTS)
def test_a_t5(name):
    model = on_meta(getattr(transformers, name))
    for asked in (model, model.config, model.config.to_dict()):
        assert targets.map_of(asked) is targets.find("t5")
    assert Counter(taken_by(model).values()) == T5_COUNTS[name]


def test_the_language_model_inside():
    model = on_meta(transformers.Qwen2_5_VLForConditionalGeneration).model.language_model
    assert targets.map_of(model) is targets.find("llm")
    assert len(taken_by(model)) == 560


def test_a_bart_with_and_without_its_head():
    """facebook/bart-base names BartModel as its class."""
    config = transformers.BartConfig(encoder_layers=2, decoder_layers=3)
    for kind in (transformers.BartModel, transformers.BartForConditionalGeneration):
        model = on_meta(kind, config)
        assert targets.map_of(model) is targets.find("bart")
        found = Counter(taken_by(model).values())
        assert found == {"text.qv": 10, "text.ko": 10, "text.mlp": 10, "cross.qv": 6, "cross.ko": 6}


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
    report = dora_mm.inject(model, "qwen2-vl", DoRASpec(rank=8), parts=PARTS)
    block = added(8, (3584, 3584), (3584, 512), (3584, 512), (3584, 3584), *[(3584, 18_944)] * 2, (18_944, 3584))
    tower = added(8, (1280, 3840), (1280, 1280), *[(1280, 3420)] * 2, (3420, 1280))
    merger = added(8, (5120, 5120), (5120, 3584))
    assert report.num_modules == 28 * 7 + 32 * 5 + 2
    assert report.num_parameters == 28 * block + 32 * tower + merger


# --- models that do not fit ------------------------------------------------------------------------------------------


def test_models_without_a_map():
    for model in (nn.Sequential(), transformers.LlavaNextVideoConfig()):  # a config alone has no structure
        with pytest.raises(ValueError, match="^there is no target map for .*; nearest: "):
            targets.map_of(model)
    with torch.device("meta"), pytest.raises(ValueError, match="for ViTModel: it has no blocks that read text"):
        targets.map_of(transformers.ViTModel(transformers.ViTConfig()))
    with pytest.raises(ValueError, match="the map llava is derived from a model"):
        targets.find("llava")


def test_experts_shared_ones_and_routers_are_told_apart():
    model, _ = inkling()
    found = {numbered(path): part for path, part in match_modules(model, derive(model)).items()}
    mlp = "model.language_model.layers.N.mlp"
    assert {path.removeprefix(f"{mlp}."): part for path, part in found.items() if "experts" in path} == {
        **dict.fromkeys(("experts.gate_up", "experts.down"), "text.experts"),
        **dict.fromkeys(("shared_experts.gate", "shared_experts.up", "shared_experts.down"), "text.mlp"),
    }
    assert not [path for path in found if re.search("router|mlp.gate$", path)]
    assert list(derive(model).default) == ["text.attn", "text.mlp"]
