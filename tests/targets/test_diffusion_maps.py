"""The maps of diffusion transformers: full-size counts, gradients, and files that diffusers loads."""

import inspect
import re
from collections import Counter

import diffusers
import pytest
import torch
from torch import nn

import dora_mm
from dora_mm import DoRASpec, adapter_parameters, load_adapter, save_adapter, targets
from dora_mm.core import adapted_layers
from dora_mm.core.targets import match_modules
from dora_mm.models.images.qwen_image_21 import QwenImage21Pipeline
from tests.shared import reference

TIME = {f"time_text_embed.timestep_embedder.linear_{i}" for i in (1, 2)}
POOLED = {f"time_text_embed.text_embedder.linear_{i}" for i in (1, 2)}
GUIDANCE = {f"time_guidance_embed.{kind}_embedder.linear_{i}" for kind in ("timestep", "guidance") for i in (1, 2)}
ENDS = {"norm_out.linear", "proj_out"}
EMBEDDERS = {"x_embedder", "context_embedder"}
DUAL = {"dual_attention_layers": tuple(range(13)), "num_layers": 24, "qk_norm": "rms_norm"}

# Class -> settings of the published size, the map, modules of attn, ff, mod (and text), and the other linear layers.
FULL_SIZE = {
    "FluxTransformer2DModel": ({}, "flux", (19 * 8 + 38 * 3, 19 * 4 + 38 * 2, 76), TIME | POOLED | EMBEDDERS | ENDS),
    "Flux2Transformer2DModel": ({}, "flux2", (8 * 8 + 48 * 2, 8 * 4, 3), GUIDANCE | EMBEDDERS | ENDS),
    "SD3Transformer2DModel": (
        DUAL,
        "sd3",
        (24 * 8 - 1 + 13 * 4, 24 * 4 - 2, 48),
        TIME | POOLED | {"context_embedder", "pos_embed.proj"} | ENDS,
    ),
    "QwenImageTransformer2DModel": ({}, "qwen-image", (480, 240, 120), TIME | {"img_in", "txt_in"} | ENDS),
    "QwenImage21Transformer2DModel": ({}, "qwen-image-21", (32 * 4, 32 * 3, 1, 2), TIME | {"img_in"} | ENDS),
    "Krea2Transformer2DModel": (
        {},
        "krea2",
        (28 * 5, 28 * 3, 1, 4 * 8 + 2),
        {"img_in", "time_embed.linear_1", "time_embed.linear_2", "text_fusion.projector", "final_layer.linear"},
    ),
    "ZImageTransformer2DModel": (
        {},
        "z-image",
        (34 * 4, 34 * 3, 32),
        {
            "all_x_embedder.2-1",
            "all_final_layer.2-1.linear",
            "all_final_layer.2-1.adaLN_modulation.1",
            "t_embedder.mlp.0",
            "t_embedder.mlp.2",
            "cap_embedder.1",
        },
    ),
}


KLEIN = {  # FLUX.2 klein base 4B
    "num_layers": 5,
    "num_single_layers": 20,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}


def test_full_size_qwen_image():
    with torch.device("meta"):
        model = diffusers.QwenImageTransformer2DModel()
    assert sum(p.numel() for p in model.parameters()) == 20_430_401_088
    report = dora_mm.inject(model, "qwen-image", DoRASpec(rank=16))
    assert (report.num_modules, report.num_parameters) == (720, 109_486_080)


def test_full_size_qwen_image_21():
    """With the defaults of its class: blocks of width 4096 and 12,288."""
    with torch.device("meta"):
        model = diffusers.QwenImage21Transformer2DModel()
    assert sum(p.numel() for p in model.parameters()) == 7_115_124_736
    width, inner = 4096, 12_288
    report = dora_mm.inject(model, "qwen-image-21", DoRASpec(rank=16))
    added = 16 * (4 * 2 * width + 3 * (width + inner)) + 4 * width + 2 * inner + width
    assert (report.num_modules, report.num_parameters) == (224, 32 * added)


def test_full_size_krea2():
    """musubi-tuner's default are all 264 linear layers, as the authors recommend it."""
    with torch.device("meta"):
        model = diffusers.Krea2Transformer2DModel()
    assert sum(p.numel() for p in model.parameters()) == 12_820_073_036
    assert sum(isinstance(module, nn.Linear) for module in model.modules()) == 264
    report = dora_mm.inject(model, "krea2", DoRASpec(rank=32))
    assert (report.num_modules, report.num_parameters) == (224, 109_039_616)


def test_full_size_klein():
    """The counts that PEFT publishes for rank 64 on 80 of its layers, and ours on all 100 of its blocks."""
    with torch.device("meta"):
        model = diffusers.Flux2Transformer2DModel(**KLEIN)
    assert sum(p.numel() for p in model.parameters()) == 3_875_544_576
    published = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    published += ["to_qkv_mlp_proj", "linear_in", "linear_out"]
    report = dora_mm.inject(model, published, DoRASpec(rank=64, method="lora"))
    assert (report.num_modules, report.num_parameters) == (80, 76_677_120)
    dora_mm.remove(model)
    report = dora_mm.inject(model, published, DoRASpec(rank=64))
    assert (report.num_modules, report.num_parameters) == (80, 76_677_120 + 890_880)
    dora_mm.remove(model)
    report = dora_mm.inject(model, "flux2", DoRASpec(rank=16))
    assert (report.num_modules, report.num_parameters) == (100, 25_036_800)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size(name):
    settings, expected_map, numbers, left_out = FULL_SIZE[name]
    with torch.device("meta"):
        model = getattr(diffusers, name)(**settings)
    chosen = targets.map_of(model)
    assert chosen is targets.find(expected_map) is targets.map_of({"_class_name": name})
    assert tuple(chosen.select().parts) == ("attn", "ff")
    taken = match_modules(model, chosen)
    assert Counter(taken.values()) == dict(zip(("attn", "ff", "mod", "text"), numbers, strict=False))
    assert {path for path, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)} - set(taken) == left_out


def test_flux_1_dev():
    """11.9 billion parameters in blocks of width 3072 and 12,288."""
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(guidance_embeds=True)
    assert sum(p.numel() for p in model.parameters()) == 11_901_408_320
    report = dora_mm.inject(model, "flux", DoRASpec(rank=16))

    def added(inside, outside):
        return 16 * (inside + outside) + outside

    width, inner = 3072, 12_288
    block = 8 * added(width, width) + 2 * (added(width, inner) + added(inner, width))
    single = 3 * added(width, width) + added(width, inner) + added(width + inner, width)
    assert (report.num_modules, report.num_parameters) == (418, 19 * block + 38 * single)


# --- tiny models -----------------------------------------------------------------------------------------------------


def flux():
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 4, 8),
    )


def flux2():
    return diffusers.Flux2Transformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )


def sd3():
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=12,
        caption_projection_dim=32,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def qwen_image():
    return diffusers.QwenImageTransformer2DModel(
        in_channels=4,
        out_channels=1,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 4, 8),
    )


def qwen_image_21():
    return diffusers.QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=12,
        axes_dims_rope=(4, 6, 6),
    )


def krea2():
    return diffusers.Krea2Transformer2DModel(
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        timestep_embed_dim=16,
        text_hidden_dim=12,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(8, 4, 4),
    )


def z_image():
    return diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=12,
        axes_dims=[4, 4, 8],
        axes_lens=[64, 16, 16],
    )


def inputs(model):
    """Noise of 4 x 4 latent pixels for a batch of two, and a prompt of 3 tokens."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    kind, time = type(model).__name__, torch.tensor([0.3, 0.8])
    if kind == "ZImageTransformer2DModel":
        return {"x": [noise(4, 1, 4, 4) for _ in time], "t": time, "cap_feats": [noise(3, 12) for _ in time]}
    if kind == "Krea2Transformer2DModel":
        places = diffusers.Krea2Pipeline.prepare_position_ids(3, 4, 4, torch.device("cpu"))
        text = {"timestep": time, "encoder_hidden_states": noise(2, 3, 3, 12), "position_ids": places}
        return {"hidden_states": noise(2, 16, 4), **text}
    text = {"timestep": time, "encoder_hidden_states": noise(2, 3, 12)}
    if kind == "SD3Transformer2DModel":
        return {"hidden_states": noise(2, 4, 4, 4), "pooled_projections": noise(2, 10), **text}
    text["hidden_states"] = noise(2, 16, 4)
    if kind == "QwenImage21Transformer2DModel":
        mask = torch.tensor([False] * 3 + [True] * 4).expand(2, -1)
        return {**text, "img_shapes": [[(1, 4, 4)]] * 2, "img_mask": mask}
    if kind == "QwenImageTransformer2DModel":
        mask = torch.ones(2, 3, dtype=torch.bool)
        return {**text, "img_shapes": [(1, 4, 4)] * 2, "encoder_hidden_states_mask": mask}
    axes = 4 if kind == "Flux2Transformer2DModel" else 3
    grid = torch.zeros(16, axes)
    grid[:, 1:3] = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    ids = {"img_ids": grid, "txt_ids": torch.zeros(3, axes)}
    extra = {"guidance": torch.ones(2)} if axes == 4 else {"pooled_projections": noise(2, 10)}
    return {**text, **ids, **extra}


def output(model):
    result = model(**inputs(model), return_dict=False)[0]
    return torch.stack(result) if isinstance(result, list) else result


TINY = {  # what builds it: the map, and the layers of the last block that get no gradient
    flux: ("flux", set()),
    flux2: ("flux2", set()),
    sd3: ("sd3", {"attn.add_q_proj"}),
    qwen_image: ("qwen-image", {"attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2"}),
    qwen_image_21: ("qwen-image-21", set()),
    krea2: ("krea2", set()),
    z_image: ("z-image", set()),
}
PIPELINES = {
    flux: diffusers.FluxPipeline,
    flux2: diffusers.Flux2Pipeline,
    sd3: diffusers.StableDiffusion3Pipeline,
    qwen_image: diffusers.QwenImagePipeline,
    qwen_image_21: QwenImage21Pipeline,  # diffusers' own cannot be built without a processor
    krea2: diffusers.Krea2Pipeline,
    z_image: diffusers.ZImagePipeline,
}


def build(builder):
    torch.manual_seed(0)
    model = builder()
    for parameter in model.parameters():  # some begin as zeros, behind which nothing gets a gradient
        nn.init.normal_(parameter, std=0.1)
    return model


def every(builder):
    """Its map, with all parts."""
    found = targets.find(TINY[builder][0])
    return found.select(list(found.parts))


def adapted(builder):
    model = build(builder)
    dora_mm.inject(model, every(builder), DoRASpec(rank=2, alpha=3))
    for seed, layer in enumerate(adapted_layers(model).values()):
        reference.randomize(layer, seed=seed)
    return model


@pytest.mark.parametrize("builder", TINY)
def test_a_fresh_adapter_changes_nothing_and_gradients_reach_every_layer(builder):
    _, unreached = TINY[builder]
    model = build(builder).requires_grad_(False)  # torch's own choice of a product depends on it
    before = output(model)
    dora_mm.inject(model, every(builder), DoRASpec(rank=2))
    assert torch.equal(output(model), before)
    model = adapted(builder)
    trained = adapter_parameters(model)
    gradients = torch.autograd.grad(output(model).square().sum(), list(trained.values()), allow_unused=True)
    without = [name for name, g in zip(trained, gradients, strict=True) if g is None or not g.any()]
    assert {re.sub(r"transformer_blocks\.1\.|\.[^.]*$", "", name) for name in without} == unreached


def empty_pipeline(builder, transformer):
    """A pipeline with nothing but its transformer."""
    kind = PIPELINES[builder]
    required = [name for name, p in inspect.signature(kind.__init__).parameters.items() if p.default is p.empty]
    return kind(**dict.fromkeys(required[1:]) | {"transformer": transformer})


@pytest.mark.parametrize("builder", TINY)
def test_files_that_diffusers_loads(builder, tmp_path):
    model = adapted(builder)
    expected = output(model)
    file = save_adapter(model, tmp_path, format="diffusers")
    theirs = build(builder)
    assert (output(theirs) - expected).abs().max() > 0.01 * expected.abs().max()
    theirs.load_lora_adapter(str(file.parent), weight_name=file.name, prefix="transformer")
    in_pipeline = build(builder)
    empty_pipeline(builder, in_pipeline).load_lora_weights(str(file.parent))
    for loaded in (theirs, in_pipeline):
        torch.testing.assert_close(output(loaded), expected, rtol=1e-4, atol=1e-5)
    ours = build(builder)
    load_adapter(ours, file)
    assert torch.equal(output(ours), expected)
