"""The maps against models of their architectures, including the full-size SDXL UNet (on the meta device)."""

import re
from pathlib import Path

import pytest
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import dora_mm
from dora_mm import DoRASpec, targets
from dora_mm.core.targets import match_modules
from dora_mm.models.images.sdxl.random_weights import build_unet
from dora_mm.registries.target_maps import TARGET_MAPS
from tests.shared.full_size import full_size_unet


def test_full_size_sdxl():
    unet = full_size_unet()
    report = dora_mm.inject(unet, "sdxl-unet", DoRASpec(rank=8))
    assert (report.num_modules, report.num_parameters) == (560, 12_277_760)
    assert {m.part for m in report.modules} == {"attn", "cross"}


@pytest.mark.parametrize(("part", "count"), [("attn", 280), ("cross", 280), ("ff", 140), ("conv", 49)])
def test_parts_of_full_size_sdxl(part, count):
    assert len(match_modules(full_size_unet(), targets.find("sdxl-unet").select([part]))) == count


def test_small_sdxl_and_everything_that_is_excluded():
    unet = build_unet(8, latent_channels=4, channels=(16, 32, 64), heads=(1, 2, 4), text_widths=(16, 32))
    taken = match_modules(unet, targets.find("sdxl-unet").select(["attn", "cross", "ff", "conv"]))
    assert sum(part in ("attn", "cross") for part in taken.values()) == 136
    layers = {path for path, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    excluded = {re.sub(r"\d+", "N", path) for path in layers - set(taken)}
    assert excluded == {
        "conv_in",
        "conv_out",
        "time_embedding.linear_N",
        "add_embedding.linear_N",
        *(f"{block}.resnets.N.time_emb_proj" for block in ("down_blocks.N", "mid_block", "up_blocks.N")),
        *(
            f"{b}.attentions.N.proj_{end}"
            for b in ("down_blocks.N", "mid_block", "up_blocks.N")
            for end in ("in", "out")
        ),
    }


@pytest.mark.parametrize("model_class", [CLIPTextModel, CLIPTextModelWithProjection])
def test_clip_text_encoders(model_class):
    config = CLIPTextConfig(
        vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    )
    encoder = model_class(config)
    assert len(match_modules(encoder, targets.find("clip-text").select())) == 12
    assert len(match_modules(encoder, targets.find("clip-text").select(["attn", "ff"]))) == 18


def test_maps_have_their_names_and_the_document_lists_all_maps():
    assert {name: targets.find(name).name for name in TARGET_MAPS} == {name: name for name in TARGET_MAPS}
    table = Path("docs/targets.md").read_text(encoding="utf-8").partition("## Which there are")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`([^`]+)`", " ".join(rows))) == sorted([*TARGET_MAPS, "derived"])


def test_a_map_for_another_architecture():
    unet = build_unet(8, latent_channels=4, channels=(16, 32, 64), heads=(1, 2, 4), text_widths=(16, 32))
    with pytest.raises(ValueError, match="clip-text matches no module"):
        dora_mm.inject(unet, "clip-text", DoRASpec())
    with pytest.raises(ValueError, match="no target map 'sdxl'; there are sdxl-unet, clip-text"):
        dora_mm.inject(unet, "sdxl", DoRASpec())


def test_the_name_of_a_module_in_place_of_a_map_is_answered_with_a_list():
    net = nn.ModuleDict({"mid": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r"no target map 'mid'; for modules of that name use a list: \['mid'\]$"):
        dora_mm.inject(net, "mid", DoRASpec(rank=2))
