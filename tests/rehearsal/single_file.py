"""The names and shapes of the tensors in SDXL's single file, as Stability AI has published it: 2,515 tensors."""

import re
from collections.abc import Mapping

import torch

from dora_mm.formats.files.header import TensorEntry

Specs = Mapping[str, TensorEntry]
UNET, FIRST, SECOND = "model.diffusion_model.", "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
VAE = "first_stage_model."
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
OF_RESNETS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
OF_CLIP = {  # in OpenCLIP's words
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
OUTSIDE_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
OF_ATTENTION = {"group_norm": "norm", "to_out.0": "proj_out", "to_q": "q", "to_k": "k", "to_v": "v"}  # in the VAE


def single_specs(networks: Mapping[str, Specs]) -> dict[str, TensorEntry]:
    """The tensors of the single file, sorted by name, by those of a folder's networks."""
    found = {f"{UNET}{unet_name(name)}": entry for name, entry in networks["unet"].items()}
    found |= {f"{FIRST}{name}": entry for name, entry in networks["text_encoder"].items()}
    found |= {f"{SECOND}{name}": entry for name, entry in open_clip(networks["text_encoder_2"]).items()}
    for name, entry in networks["vae"].items():
        new = vae_name(name)
        is_product = "mid.attn_1" in new and new.endswith("weight") and ".norm." not in new
        found[f"{VAE}{new}"] = entry._replace(shape=(*entry.shape, 1, 1)) if is_product else entry
    return dict(sorted(found.items()))


def unet_name(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{ENDS.get(module) or _inside_unet(module)}.{leaf}"


def _inside_unet(module: str) -> str:
    if found := re.fullmatch(r"(down|up)_blocks\.(\d)\.(?:down|up)samplers\.0\.conv", module):
        block = int(found[2])
        return f"input_blocks.{3 * block + 3}.0.op" if found[1] == "down" else f"output_blocks.{3 * block + 2}.2.conv"
    found = re.fullmatch(r"(down|up|mid)_blocks?(?:\.(\d))?\.(resnets|attentions)\.(\d)\.(.*)", module)
    assert found, module
    is_resnet, number, block = found[3] == "resnets", int(found[4]), int(found[2] or 0)
    start = {
        "down": f"input_blocks.{3 * block + number + 1}.{int(not is_resnet)}",
        "up": f"output_blocks.{3 * block + number}.{int(not is_resnet)}",
        "mid": f"middle_block.{2 * number if is_resnet else 1}",
    }[found[1]]
    return f"{start}.{OF_RESNETS[found[5]] if is_resnet else found[5]}"


def open_clip(specs: Specs) -> dict[str, TensorEntry]:
    """Those of the second text encoder: q, k and v are one tensor, and the projection is transposed."""
    found = {"logit_scale": TensorEntry(torch.float16, (), 0)}
    for name, entry in specs.items():
        own = name.removeprefix("text_model.")
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", own)
        if own == "text_projection.weight":
            found["text_projection"] = entry._replace(shape=entry.shape[::-1])
        elif own in OUTSIDE_CLIP:
            found[OUTSIDE_CLIP[own]] = entry
        elif layer and layer[2] in OF_CLIP:
            found[f"transformer.resblocks.{layer[1]}.{OF_CLIP[layer[2]]}.{layer[3]}"] = entry
        elif layer and layer[2] == "self_attn.q_proj":
            stacked = entry._replace(shape=(3 * entry.shape[0], *entry.shape[1:]))
            found[f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"] = stacked
    return found


def vae_name(name: str) -> str:
    name = re.sub(r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"decoder\.up_blocks\.(\d)", lambda found: f"decoder.up.{3 - int(found[1])}", name)
    name = re.sub(r"(up\.\d)\.upsamplers\.0", r"\1.upsample", name)
    name = re.sub(r"(up\.\d)\.resnets", r"\1.block", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_shortcut", "nin_shortcut")
    if "mid.attn_1" in name:
        for old, new in OF_ATTENTION.items():
            name = name.replace(f".{old}.", f".{new}.")
    return name.replace("conv_norm_out", "norm_out")
