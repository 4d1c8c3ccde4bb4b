"""Names of modules in the spellings of the tools, against the converters of diffusers."""

import re

import pytest
import torch
from diffusers import (
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    Krea2Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from diffusers.loaders import lora_conversion_utils, single_file_utils

from dora_mm.formats.algebra.fused import split_rows
from dora_mm.formats.naming.names import Name, architecture_of, canonical, own_table, owners
from dora_mm.formats.naming.spellings import DIFFUSERS, KOHYA, ONETRAINER, PEFT, Names
from tests.shared.full_size import FULL_SIZE


def names_of(model: torch.nn.Module, component: str) -> list[Name]:
    return [Name(component, key.removesuffix(".weight")) for key in model.state_dict() if key.endswith(".weight")]


@pytest.fixture(scope="module")
def sdxl() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**FULL_SIZE)


@pytest.fixture(scope="module")
def unet(sdxl) -> list[Name]:
    return names_of(sdxl, "unet")


# --- SDXL at full size -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", [DIFFUSERS, KOHYA, ONETRAINER], ids=lambda spelling: spelling.name)
@pytest.mark.parametrize("with_base", [True, False])
def test_every_name_of_sdxl_comes_back(unet, spelling, with_base):
    names = Names(unet if with_base else ())
    written = names.write(unet, spelling)
    assert len(unet) > 1000
    assert len({name.path.partition(".attn1")[0] for name in unet if ".attn1." in name.path}) == 70
    assert len(written) == len(unet)  # unique
    assert [names.read(key).names for key in written] == [(name,) for name in unet]


def test_sgm_names_are_those_of_diffusers_single_file_converter(sdxl, unet):
    written = {owners("sdxl")[name]: name.path for name in unet}
    ends = ("weight", "bias")
    checkpoint = {f"model.diffusion_model.{own}.{end}": path for own, path in written.items() for end in ends}
    converted = single_file_utils.convert_ldm_unet_checkpoint(checkpoint, dict(sdxl.config))
    assert converted == {f"{path}.{end}": path for path in written.values() for end in ends}
    for names in (Names(unet), Names()):
        read = [names.read(f"diffusion_model.{own}").names for own in written]
        assert read == [(Name("unet", path),) for path in written.values()]


def test_kohya_names_are_those_of_diffusers_adapter_converter(sdxl, unet):
    layers = [n for n in unet if re.search(r"attn|\.ff\.|proj_in|proj_out|conv|emb", n.path) and "norm" not in n.path]
    spelled = Names().write(layers, KOHYA)
    tensor = torch.zeros(1)
    state = {f"{key}.{part}.weight": tensor for key in spelled for part in ("lora_down", "lora_up")}
    mapped = lora_conversion_utils._maybe_map_sgm_blocks_to_diffusers(state, sdxl.config)
    converted, _ = lora_conversion_utils._convert_non_diffusers_lora_to_diffusers(mapped)
    found = {re.sub(r"\.processor\.(\w+)_lora\..*|\.lora\..*", r".\1", key).rstrip(".") for key in converted}
    found = {re.sub(r"to_out$", "to_out.0", key) for key in found}
    assert found == {f"unet.{name.path}" for name in layers}


def test_text_encoders():
    names = Names()
    path = "text_model.encoder.layers.11.self_attn.q_proj"
    for number, component in ((1, "text_encoder"), (2, "text_encoder_2")):
        name = Name(component, path)
        for spelling in (DIFFUSERS, KOHYA):
            (key,) = names.write([name], spelling)
            assert names.read(key).names == (name,)
        assert names.read(f"text_encoders.clip_{'lg'[number - 1]}.transformer.{path}").names == (name,)  # ComfyUI
        assert names.read(f"lora_te{number}_text_model_encoder_layers_11_self_attn_q_proj").names == (name,)
        assert names.read(f"{component}.encoder.layers.11.self_attn.q_proj").names == (name,)
        assert names.read(f"clip_{'lg'[number - 1]}.{path}").names == (name,)  # OneTrainer
    assert names.read("lora_te_text_model_encoder_layers_0_mlp_fc1").names[0].component == "text_encoder"
    t5 = Name("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q")
    for prefix in ("lora_te2_", "lora_te3_"):
        assert Names([t5]).read(f"{prefix}encoder_block_0_layer_0_SelfAttention_q").names == (t5,)
    assert canonical("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q").path.startswith("encoder")  # T5


def test_stable_diffusion_1_has_its_first_upsampler_at_another_place():
    config = {
        "block_out_channels": (8, 16, 16, 16),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 8,
    }
    with torch.device("meta"):
        unet = names_of(UNet2DConditionModel(**config), "unet")
    assert architecture_of(unet) == "sd1"
    own = {name: owners("sd1")[name] for name in unet}
    assert own[Name("unet", "up_blocks.0.upsamplers.0.conv")] == "output_blocks.2.1.conv"
    assert [Names(unet).read(f"diffusion_model.{path}").names for path in own.values()] == [(name,) for name in own]
    assert Names().read("lora_unet_output_blocks_2_1_conv") == Names(unet).read("lora_unet_output_blocks_2_1_conv")


# --- transformers ----------------------------------------------------------------------------------------------------


class Checkpoint(dict):
    """A checkpoint in which the converters find empty tensors for what is no weight or bias of a layer."""

    def pop(self, key, *default):
        return super().pop(key, torch.zeros(0))


def numbered(*shape: int) -> torch.Tensor:
    """A tensor that tells its rows apart, and takes the memory of one column."""
    rows = (torch.arange(shape[0]) % 251).to(torch.uint8)
    return rows.view(-1, *(1,) * (len(shape) - 1)).expand(shape)


def check_against_diffusers(model, convert):
    """Writes a model in its own names by our table, and compares what diffusers and we read from it."""
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    known = [
        n
        for n in names_of(model, "transformer")
        if not re.search(r"\.norm_(added_)?[qk]$|_norm|norm[123]$|norms\.\d+$|\.norm$|cap_embedder.0", n.path)
    ]
    checkpoint, expected = Checkpoint(), {}
    names = Names(names_of(model, "transformer"))
    layout = str(architecture_of(known))
    for own in dict.fromkeys(owners(layout)[name] for name in known):
        target = own_table(layout)[own]
        assert names.read(f"diffusion_model.{own}") == target
        assert names.read("lora_unet_" + own.replace(".", "_")) == target
        assert all(names.read(f"transformer.{n.path}").names == (n,) for n in target.names)
        inner = shapes[f"{target.names[0].path}.weight"][1:]
        weight = numbered(sum(shapes[f"{name.path}.weight"][0] for name in target.names), *inner)
        checkpoint |= {f"{own}.weight": weight, f"{own}.bias": numbered(weight.shape[0])}
        for name, part in zip(target.names, split_rows(target, weight) if weight.ndim == 2 else [weight], strict=True):
            expected[f"{name.path}.weight"] = part
    assert set(expected) == {f"{name.path}.weight" for name in known}
    converted = {key: tensor for key, tensor in convert(checkpoint).items() if tensor.ndim > 1}
    assert converted.keys() == expected.keys()
    for key, tensor in expected.items():
        assert tensor.shape == shapes[key] == converted[key].shape
        assert torch.equal(tensor[:, 0], converted[key][:, 0]), key


def on_meta(kind, **config):
    with torch.device("meta"):
        return kind(**config)


def test_flux_against_diffusers():
    model = on_meta(  # the converter is made for a width of 3072
        FluxTransformer2DModel, num_layers=1, num_single_layers=1, attention_head_dim=1024, num_attention_heads=3,
        joint_attention_dim=8, pooled_projection_dim=8, guidance_embeds=True,
    )  # fmt: skip
    assert architecture_of(names_of(model, "transformer")) == "flux"
    check_against_diffusers(model, single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)


def test_sd3_against_diffusers():
    model = on_meta(
        SD3Transformer2DModel, sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=8, pooled_projection_dim=8, dual_attention_layers=(0,),
    )  # fmt: skip
    assert architecture_of(names_of(model, "transformer")) == "sd3"

    def convert(checkpoint):
        checkpoint["x_embedder.proj.weight"] = checkpoint["x_embedder.proj.weight"].contiguous()
        return single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)

    check_against_diffusers(model, convert)


def test_chroma_against_diffusers():
    model = on_meta(
        ChromaTransformer2DModel, num_layers=1, num_single_layers=1, attention_head_dim=1024, num_attention_heads=3,
        joint_attention_dim=8, approximator_hidden_dim=8, approximator_layers=1, approximator_num_channels=8,
    )  # fmt: skip
    assert architecture_of(names_of(model, "transformer")) == "chroma"
    check_against_diffusers(model, single_file_utils.convert_chroma_transformer_checkpoint_to_diffusers)


def test_hunyuan_video_against_diffusers():
    model = on_meta(
        HunyuanVideoTransformer3DModel, num_layers=1, num_single_layers=1, num_refiner_layers=1,
        attention_head_dim=1024, num_attention_heads=3, text_embed_dim=8, pooled_projection_dim=8,
        rope_axes_dim=(2, 2, 2),
    )  # fmt: skip
    assert architecture_of(names_of(model, "transformer")) == "hunyuan-video"
    check_against_diffusers(model, single_file_utils.convert_hunyuan_video_transformer_to_diffusers)


@pytest.mark.parametrize("image_dim", [None, 8])
def test_wan_against_diffusers(image_dim):
    model = on_meta(
        WanTransformer3DModel, num_layers=1, attention_head_dim=8, num_attention_heads=2, text_dim=8, freq_dim=8,
        ffn_dim=16, image_dim=image_dim, added_kv_proj_dim=16 if image_dim else None,
    )  # fmt: skip
    assert architecture_of(names_of(model, "transformer")) == "wan"
    check_against_diffusers(model, single_file_utils.convert_wan_transformer_to_diffusers)


def test_adapters_of_networks_whose_names_are_those_of_flux():
    """HunyuanVideo has a 20th block, where Flux.1 and Chroma have 19; else they are taken to be of Flux.1."""
    single = Name("transformer", "single_transformer_blocks.0.attn.to_q")
    names = {block: Name("transformer", f"transformer_blocks.{block}.attn.to_q") for block in (18, 19)}
    assert architecture_of([names[18], single]) == "flux"
    assert architecture_of([names[18], names[19], single]) == "hunyuan-video"
    assert architecture_of([single, Name("transformer", "distilled_guidance_layer.in_proj")]) == "chroma"


def test_flux2_against_diffusers():
    model = on_meta(
        Flux2Transformer2DModel, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(2, 2, 2, 2),
    )  # fmt: skip
    assert architecture_of(names_of(model, "transformer")) == "flux2"
    check_against_diffusers(model, single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers)


def test_z_image_against_diffusers():
    model = on_meta(
        ZImageTransformer2DModel, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
        axes_dims=(4, 2, 2), axes_lens=(8, 8, 8),
    )  # fmt: skip
    assert architecture_of(names_of(model, "transformer")) == "z-image"
    check_against_diffusers(model, single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers)


def test_krea2_against_diffusers():
    model = on_meta(
        Krea2Transformer2DModel, num_layers=1, attention_head_dim=8, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=16, timestep_embed_dim=8, text_hidden_dim=8, num_text_layers=2, text_num_attention_heads=2,
        text_num_key_value_heads=2, text_intermediate_size=8, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    assert architecture_of(names_of(model, "transformer")) == "krea2"
    check_against_diffusers(model, single_file_utils.convert_krea2_transformer_checkpoint_to_diffusers)


def test_qwen_image_has_one_name_for_each_module():
    model = on_meta(
        QwenImageTransformer2DModel, num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    known = names_of(model, "transformer")
    linears = [Name("transformer", path) for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert architecture_of(known) == "qwen-image"
    for key, target in Names(known).write(linears, KOHYA).items():
        assert Names(known).read(key) == target
        assert len(target.names) == 1


def test_an_unknown_transformer_keeps_its_names():
    known = [Name("transformer", f"stages.{i}.attn1.{name}") for i in range(2) for name in ("to_q", "to_out.0")]
    names = Names(known)
    for key in (
        "diffusion_model.stages.1.attn1.to_out.0",
        "lora_unet_stages_1_attn1_to_out_0",
        "transformer.stages.1.attn1.to_out.0",
    ):
        assert names.read(key).names == (known[3],)
    with pytest.raises(ValueError, match="own name of transformer.stages.0.attn1.to_q is unknown, or differs between"):
        Names().write(known, KOHYA)


def test_own_names_need_an_architecture():
    shared = [Name("transformer", "transformer_blocks.0.attn.to_q")]
    assert architecture_of(shared) is None
    with pytest.raises(ValueError, match="name the base model"):
        Names().write(shared, KOHYA)
    (key,) = Names().write([*shared, Name("transformer", "single_transformer_blocks.0.proj_mlp")], KOHYA).keys() - {
        "lora_unet_single_blocks_0_linear1"
    }
    assert key == "lora_unet_double_blocks_0_img_attn_qkv"


def test_one_part_of_a_fused_projection():
    target = Names().read("transformer.double_blocks.3.img_attn.qkv.1")  # OneTrainer
    assert target.names == (Name("transformer", "transformer_blocks.3.attn.to_k"),)


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_down_blocks_1_attentions_9_transformer_blocks_0_attn1_to_q",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_p",
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn3.to_q",
        "lora_te1_text_model_encoder_layers_0_self_attn_p_proj",
    ],
)
def test_unknown_names_are_named_with_the_nearest(unet, key):
    known = [*unet, Name("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj")]
    with pytest.raises(
        ValueError, match=rf"^{re.escape(key)} is not the name of a module; nearest: (unet|text_encoder)\."
    ):
        Names(known).read(key)


@pytest.mark.parametrize(
    "key", ["", "to_q", "lora_unet_", "lora_unet_x" * 10_000, "lora_te1_\x00", "diffusion_model.", "é"]
)
def test_nonsense_is_refused(unet, key):
    for names in (Names(), Names(unet)):
        with pytest.raises(ValueError, match="is not the name of a module") as raised:
            names.read(key)
        assert len(str(raised.value)) < 600


def test_a_name_with_two_meanings_is_refused():
    known = [Name("model", "a.b_c"), Name("model", "a_b.c"), Name("model", "d.e")]
    with pytest.raises(ValueError, match=r"lycoris_a_b_c may stand for a.b_c or a_b.c, which are spelled the same"):
        Names(known).read("lycoris_a_b_c")
    assert Names(known).read("lycoris_d_e").names == (known[2],)


def test_a_missing_first_part_is_found():
    known = [Name("model", "layers.0.q"), Name("model", "layers.1.q")]
    assert Names(known).read("base_model.model.model.layers.1.q").names == (known[1],)
    other = [Name("unet", "conv_in"), Name("text_encoder", "text_model.final_layer_norm")]
    assert Names(other).read("base_model.model.conv_in").names == (other[0],)
    assert Names(other).read("base_model.model.final_layer_norm").names == (other[1],)


def test_what_a_spelling_does_not_have():
    with pytest.raises(ValueError, match="kohya files have no name for model.x: they hold unet, transformer, text"):
        Names().write([Name("model", "x")], KOHYA)
    both = [Name("text_encoder", "text_model.x"), Name("text_encoder_2", "text_model.x")]
    with pytest.raises(ValueError, match="the same name in peft files"):
        Names().write(both, PEFT)
