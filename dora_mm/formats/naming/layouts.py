"""How the authors' own code names the modules of a network that diffusers or transformers name otherwise.

Own path -> path of diffusers or transformers. `#` is the number of a block; braces list the modules whose rows the own
weight stacks, in this order. SDXL and Stable Diffusion 1 are named by block index (SGM's code), the second
text encoder of SDXL as in open_clip.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


def _fused(block: str, *, added: bool = False) -> dict[str, str]:
    """The names of an attention's stacked projections in diffusers, after `fuse_qkv_projections`."""
    found = {f"{block}.to_qkv": f"{block}.{{to_q,to_k,to_v}}"}
    return found | ({f"{block}.to_added_qkv": f"{block}.{{add_q_proj,add_k_proj,add_v_proj}}"} if added else {})


FLUX = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "double_blocks.#.img_mod.lin": "transformer_blocks.#.norm1.linear",
    "double_blocks.#.txt_mod.lin": "transformer_blocks.#.norm1_context.linear",
    "double_blocks.#.img_attn.qkv": "transformer_blocks.#.attn.{to_q,to_k,to_v}",
    "double_blocks.#.txt_attn.qkv": "transformer_blocks.#.attn.{add_q_proj,add_k_proj,add_v_proj}",
    "double_blocks.#.img_attn.proj": "transformer_blocks.#.attn.to_out.0",
    "double_blocks.#.txt_attn.proj": "transformer_blocks.#.attn.to_add_out",
    "double_blocks.#.img_mlp.0": "transformer_blocks.#.ff.net.0.proj",
    "double_blocks.#.img_mlp.2": "transformer_blocks.#.ff.net.2",
    "double_blocks.#.txt_mlp.0": "transformer_blocks.#.ff_context.net.0.proj",
    "double_blocks.#.txt_mlp.2": "transformer_blocks.#.ff_context.net.2",
    "single_blocks.#.modulation.lin": "single_transformer_blocks.#.norm.linear",
    "single_blocks.#.linear1": "single_transformer_blocks.#.{attn.to_q,attn.to_k,attn.to_v,proj_mlp}",
    "single_blocks.#.linear2": "single_transformer_blocks.#.proj_out",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "double_blocks.#.processor.qkv_lora1": "transformer_blocks.#.attn.{to_q,to_k,to_v}",  # of XLabs
    "double_blocks.#.processor.qkv_lora2": "transformer_blocks.#.attn.{add_q_proj,add_k_proj,add_v_proj}",
    "double_blocks.#.processor.proj_lora1": "transformer_blocks.#.attn.to_out.0",
    "double_blocks.#.processor.proj_lora2": "transformer_blocks.#.attn.to_add_out",
    "single_blocks.#.processor.qkv_lora": "single_transformer_blocks.#.attn.{to_q,to_k,to_v}",
    "single_blocks.#.processor.proj_lora": "single_transformer_blocks.#.proj_out",
    **_fused("transformer_blocks.#.attn", added=True),
    **_fused("single_transformer_blocks.#.attn"),
}
CHROMA = {  # a Flux.1 without modulation
    **{own: path for own, path in FLUX.items() if not own.startswith(("time_in", "vector_in", "guidance_in"))},
    "distilled_guidance_layer.in_proj": "distilled_guidance_layer.in_proj",
    "distilled_guidance_layer.out_proj": "distilled_guidance_layer.out_proj",
    "distilled_guidance_layer.layers.#.in_layer": "distilled_guidance_layer.layers.#.linear_1",
    "distilled_guidance_layer.layers.#.out_layer": "distilled_guidance_layer.layers.#.linear_2",
}
for _modulation in ("double_blocks.#.img_mod.lin", "double_blocks.#.txt_mod.lin", "single_blocks.#.modulation.lin"):
    del CHROMA[_modulation]
del CHROMA["final_layer.adaLN_modulation.1"]
HUNYUAN_VIDEO = {
    "img_in.proj": "x_embedder.proj",
    "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    **{
        f"txt_in.individual_token_refiner.blocks.#.{own}": f"context_embedder.token_refiner.refiner_blocks.#.{path}"
        for own, path in {
            "self_attn_qkv": "attn.{to_q,to_k,to_v}",
            "self_attn_proj": "attn.to_out.0",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
            "adaLN_modulation.1": "norm_out.linear",
        }.items()
    },
    **{
        f"double_blocks.#.{stream}_{own}": f"transformer_blocks.#.{path}"
        for stream, paths in {
            "img": ("norm1.linear", "attn.{to_q,to_k,to_v}", "attn.to_out.0", "ff.net.0.proj", "ff.net.2"),
            "txt": (
                "norm1_context.linear",
                "attn.{add_q_proj,add_k_proj,add_v_proj}",
                "attn.to_add_out",
                "ff_context.net.0.proj",
                "ff_context.net.2",
            ),
        }.items()
        for own, path in zip(("mod.linear", "attn_qkv", "attn_proj", "mlp.fc1", "mlp.fc2"), paths, strict=True)
    },
    "single_blocks.#.modulation.linear": "single_transformer_blocks.#.norm.linear",
    "single_blocks.#.linear1": "single_transformer_blocks.#.{attn.to_q,attn.to_k,attn.to_v,proj_mlp}",
    "single_blocks.#.linear2": "single_transformer_blocks.#.proj_out",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_IN_COMFYUI = {  # which names some modules of HunyuanVideo as Flux.1's
    "_mod.linear": "_mod.lin",
    "_attn_qkv": "_attn.qkv",
    "_attn_proj": "_attn.proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    ".modulation.linear": ".modulation.lin",
    "_in.mlp.0": "_in.in_layer",
    "_in.mlp.2": "_in.out_layer",
    "_embedder.mlp.0": "_embedder.in_layer",
    "_embedder.mlp.2": "_embedder.out_layer",
    "_embedder.linear_1": "_embedder.in_layer",
    "_embedder.linear_2": "_embedder.out_layer",
}
for _own, _path in tuple(HUNYUAN_VIDEO.items()):
    for _theirs, _comfy in _IN_COMFYUI.items():
        if _own.endswith(_theirs):
            HUNYUAN_VIDEO[_own.removesuffix(_theirs) + _comfy] = _path
WAN = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    **{
        f"blocks.#.{own}.{letter}": f"blocks.#.{path}.{name}"
        for own, path in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for letter, name in zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"), strict=True)
    },
    "blocks.#.cross_attn.k_img": "blocks.#.attn2.add_k_proj",
    "blocks.#.cross_attn.v_img": "blocks.#.attn2.add_v_proj",
    "blocks.#.ffn.0": "blocks.#.ffn.net.0.proj",
    "blocks.#.ffn.2": "blocks.#.ffn.net.2",
    "head.head": "proj_out",
}
FLUX2 = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "double_blocks.#.img_attn.qkv": "transformer_blocks.#.attn.{to_q,to_k,to_v}",
    "double_blocks.#.txt_attn.qkv": "transformer_blocks.#.attn.{add_q_proj,add_k_proj,add_v_proj}",
    "double_blocks.#.img_attn.proj": "transformer_blocks.#.attn.to_out.0",
    "double_blocks.#.txt_attn.proj": "transformer_blocks.#.attn.to_add_out",
    "double_blocks.#.img_mlp.0": "transformer_blocks.#.ff.linear_in",
    "double_blocks.#.img_mlp.2": "transformer_blocks.#.ff.linear_out",
    "double_blocks.#.txt_mlp.0": "transformer_blocks.#.ff_context.linear_in",
    "double_blocks.#.txt_mlp.2": "transformer_blocks.#.ff_context.linear_out",
    "single_blocks.#.linear1": "single_transformer_blocks.#.attn.to_qkv_mlp_proj",
    "single_blocks.#.linear2": "single_transformer_blocks.#.attn.to_out",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
SD3 = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "joint_blocks.#.x_block.adaLN_modulation.1": "transformer_blocks.#.norm1.linear",
    "joint_blocks.#.context_block.adaLN_modulation.1": "transformer_blocks.#.norm1_context.linear",
    "joint_blocks.#.x_block.attn.qkv": "transformer_blocks.#.attn.{to_q,to_k,to_v}",
    "joint_blocks.#.x_block.attn2.qkv": "transformer_blocks.#.attn2.{to_q,to_k,to_v}",
    "joint_blocks.#.context_block.attn.qkv": "transformer_blocks.#.attn.{add_q_proj,add_k_proj,add_v_proj}",
    "joint_blocks.#.x_block.attn.proj": "transformer_blocks.#.attn.to_out.0",
    "joint_blocks.#.x_block.attn2.proj": "transformer_blocks.#.attn2.to_out.0",
    "joint_blocks.#.context_block.attn.proj": "transformer_blocks.#.attn.to_add_out",
    "joint_blocks.#.x_block.mlp.fc1": "transformer_blocks.#.ff.net.0.proj",
    "joint_blocks.#.x_block.mlp.fc2": "transformer_blocks.#.ff.net.2",
    "joint_blocks.#.context_block.mlp.fc1": "transformer_blocks.#.ff_context.net.0.proj",
    "joint_blocks.#.context_block.mlp.fc2": "transformer_blocks.#.ff_context.net.2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    **_fused("transformer_blocks.#.attn", added=True),
    **_fused("transformer_blocks.#.attn2"),
}


def _same(*paths: str) -> dict[str, str]:
    return {path: path for path in paths}


_QWEN_LAYERS = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{stream}_{name}" for stream in ("img", "txt") for name in ("mlp.net.0.proj", "mlp.net.2", "mod.1")),
)
QWEN_IMAGE = _same(
    "img_in",
    "txt_in",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    *(f"transformer_blocks.#.{layer}" for layer in _QWEN_LAYERS),
    "norm_out.linear",
    "proj_out",
)


def _z_image_block(block: str) -> dict[str, str]:
    return {
        f"{block}.attention.qkv": f"{block}.attention.{{to_q,to_k,to_v}}",
        f"{block}.attention.out": f"{block}.attention.to_out.0",
        **_fused(f"{block}.attention"),
        **_same(*(f"{block}.{name}" for name in ("adaLN_modulation.0", *(f"feed_forward.w{i}" for i in (1, 2, 3))))),
    }


Z_IMAGE = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    **_same("cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2"),
    **_z_image_block("layers.#"),
    **_z_image_block("noise_refiner.#"),
    **_z_image_block("context_refiner.#"),
}


def _krea2_block(own: str, path: str) -> dict[str, str]:
    names = {"wq": "to_q", "wk": "to_k", "wv": "to_v", "wo": "to_out.0", "gate": "to_gate"}
    found = {f"{own}.attn.{name}": f"{path}.attn.{projection}" for name, projection in names.items()}
    return found | {f"{own}.mlp.{name}": f"{path}.ff.{name}" for name in ("gate", "up", "down")}


KREA2 = {
    **{"first": "img_in", "tmlp.0": "time_embed.linear_1", "tmlp.2": "time_embed.linear_2", "tproj.1": "time_mod_proj"},
    **{"txtmlp.1": "txt_in.linear_1", "txtmlp.3": "txt_in.linear_2", "txtfusion.projector": "text_fusion.projector"},
    **_krea2_block("txtfusion.layerwise_blocks.#", "text_fusion.layerwise_blocks.#"),
    **_krea2_block("txtfusion.refiner_blocks.#", "text_fusion.refiner_blocks.#"),
    **_krea2_block("blocks.#", "transformer_blocks.#"),
    "last.linear": "final_layer.linear",
}

_CLIP_LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
CLIP_L = _same(
    "text_model.embeddings.token_embedding",
    "text_model.embeddings.position_embedding",
    *(f"text_model.encoder.layers.#.{name}" for name in (*_CLIP_LAYERS, "layer_norm1", "layer_norm2")),
    "text_model.final_layer_norm",
    "text_projection",
)
CLIP_G = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding",
    "transformer.resblocks.#.attn.in_proj": "text_model.encoder.layers.#.self_attn.{q_proj,k_proj,v_proj}",
    "transformer.resblocks.#.attn.out_proj": "text_model.encoder.layers.#.self_attn.out_proj",
    "transformer.resblocks.#.mlp.c_fc": "text_model.encoder.layers.#.mlp.fc1",
    "transformer.resblocks.#.mlp.c_proj": "text_model.encoder.layers.#.mlp.fc2",
    "transformer.resblocks.#.ln_1": "text_model.encoder.layers.#.layer_norm1",
    "transformer.resblocks.#.ln_2": "text_model.encoder.layers.#.layer_norm2",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection",
}

# --- SGM's UNet ------------------------------------------------------------------------------------------------------

_LAYERS = 2  # resnets per down block; an up block has one more
_LEVELS = 4  # blocks of different resolution: 3 in SDXL, 4 in Stable Diffusion 1
_DEPTH = 10  # transformer blocks in the deepest attention of SDXL
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = (
    "norm",
    "proj_in",
    "proj_out",
    *(
        f"transformer_blocks.{block}.{layer}"
        for block in range(_DEPTH)
        for layer in (
            *(
                f"{attention}.{name}"
                for attention in ("attn1", "attn2")
                for name in ("to_q", "to_k", "to_v", "to_out.0")
            ),
            *("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"),
        )
    ),
)


def _resnet(own: str, path: str) -> dict[str, str]:
    return {f"{own}.{name}": f"{path}.{renamed}" for name, renamed in _RESNET.items()}


def _attention(own: str, path: str) -> dict[str, str]:
    return {f"{own}.{name}": f"{path}.{name}" for name in _ATTENTION}


def _unet(attention_first: bool) -> dict[str, str]:
    """The names of a UNet.

    An upsampler comes after the attention of its block, if that has one. The first up block of SDXL has, that of Stable
    Diffusion 1 has not. Both positions are read; of several own names, the first is written.
    """
    found = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
        **_resnet("middle_block.0", "mid_block.resnets.0"),
        **_attention("middle_block.1", "mid_block.attentions.0"),
        **_resnet("middle_block.2", "mid_block.resnets.1"),
    }
    for level in range(_LEVELS):
        down, up = f"down_blocks.{level}", f"up_blocks.{level}"
        first = level * (_LAYERS + 1)
        for layer in range(_LAYERS):
            found |= _resnet(f"input_blocks.{first + layer + 1}.0", f"{down}.resnets.{layer}")
            found |= _attention(f"input_blocks.{first + layer + 1}.1", f"{down}.attentions.{layer}")
        found[f"input_blocks.{first + _LAYERS + 1}.0.op"] = f"{down}.downsamplers.0.conv"
        for layer in range(_LAYERS + 1):
            found |= _resnet(f"output_blocks.{first + layer}.0", f"{up}.resnets.{layer}")
            found |= _attention(f"output_blocks.{first + layer}.1", f"{up}.attentions.{layer}")
        for index in (1, 2) if level == 0 and not attention_first else (2, 1):
            found[f"output_blocks.{first + _LAYERS}.{index}.conv"] = f"{up}.upsamplers.0.conv"
    return found


SDXL = _unet(attention_first=True)
SD1 = {own: path for own, path in _unet(attention_first=False).items() if not own.startswith("label_emb.")}


class Layout(NamedTuple):
    """The names of an architecture.

    Attributes:
        component: The component that it is of.
        names: The table.
        mark: The key of a weight by which a checkpoint in its own names is recognised; empty for text encoders, which
            are parts of other checkpoints.
        without: A key that checkpoints of another architecture have, and its own have not.
        optional: Matches the paths of modules that some models of the architecture do not have.
        like: An architecture of which an adapter is taken to be where its names fit both.
        beyond: Matches the paths of blocks that the architecture has not, which tell it from another one.
    """

    component: str
    names: Mapping[str, str]
    mark: str = ""
    without: str = ""
    optional: str = r"(?!)"
    like: str = ""
    beyond: str = r"(?!)"


_SDXL, _FLUX2 = "label_emb.0.0.weight", "double_stream_modulation_img.lin.weight"
_AFTER_FLUX = r"transformer_blocks\.(19|[2-9]\d)\.|single_transformer_blocks\.(3[89]|[4-9]\d)\."
_BLOCKS, _GUIDANCE = r"(down|up)_blocks|mid_block", ".*guidance_embedder"
LAYOUTS = {
    "sdxl": Layout("unet", SDXL, _SDXL, optional=_BLOCKS),
    "sd1": Layout("unet", SD1, "input_blocks.0.0.weight", without=_SDXL, optional=_BLOCKS),
    "chroma": Layout("transformer", CHROMA, "distilled_guidance_layer.in_proj.weight", like="flux", beyond=_AFTER_FLUX),
    "flux": Layout(
        "transformer",
        FLUX,
        "double_blocks.0.img_attn.qkv.weight",
        without=_FLUX2,
        optional=_GUIDANCE,
        beyond=_AFTER_FLUX,
    ),
    "sd3": Layout("transformer", SD3, "joint_blocks.0.x_block.attn.qkv.weight", optional=r".*\.attn2\."),
    "z-image": Layout(
        "transformer", Z_IMAGE, "noise_refiner.0.attention.qkv.weight", optional="context_refiner.*adaLN"
    ),
    "qwen-image": Layout("transformer", QWEN_IMAGE, "transformer_blocks.0.img_mod.1.weight"),
    "krea2": Layout("transformer", KREA2, "txtfusion.projector.weight"),
    "flux2": Layout("transformer", FLUX2, _FLUX2, optional=_GUIDANCE),
    "wan": Layout("transformer", WAN, "blocks.0.self_attn.q.weight", optional=".*image_embedder|.*add_[kv]_proj"),
    "hunyuan-video": Layout(
        "transformer", HUNYUAN_VIDEO, "double_blocks.0.img_attn_qkv.weight", optional=_GUIDANCE, like="flux"
    ),
    "clip-l": Layout("text_encoder", CLIP_L),
    "clip-g": Layout("text_encoder_2", CLIP_G),
}
