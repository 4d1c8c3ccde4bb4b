"""Checkpoints of whole models in one file, with the names of the code that SDXL was published with."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dora_mm.formats.naming.names import owners

ENCODERS = ("text_encoder", "text_encoder_2")


def open_clip_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The second text encoder as in open_clip's checkpoints, written out by hand."""
    state = dict(state)
    found = {
        "text_projection": state.pop("text_projection.weight").T.contiguous(),
        "positional_embedding": state.pop("text_model.embeddings.position_embedding.weight"),
        "token_embedding.weight": state.pop("text_model.embeddings.token_embedding.weight"),
        "logit_scale": torch.tensor(1.0),
    }
    for end in ("weight", "bias"):
        found[f"ln_final.{end}"] = state.pop(f"text_model.final_layer_norm.{end}")
        layer = 0
        while (old := f"text_model.encoder.layers.{layer}") + f".mlp.fc1.{end}" in state:
            new = f"transformer.resblocks.{layer}"
            fused = [state.pop(f"{old}.self_attn.{x}_proj.{end}") for x in "qkv"]
            found[f"{new}.attn.in_proj_{end}"] = torch.cat(fused)
            for ours, theirs in (
                ("self_attn.out_proj", "attn.out_proj"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
            ):
                found[f"{new}.{theirs}.{end}"] = state.pop(f"{old}.{ours}.{end}")
            layer += 1
    assert not state
    return found


def compvis_names(state: dict[str, torch.Tensor], levels: int) -> dict[str, torch.Tensor]:
    """A VAE as in the checkpoints of CompVis, written out by hand.

    Args:
        state: Its weights in diffusers' names.
        levels: The number of its levels: the decoder's are counted from the other end.
    """
    found = {}
    for key, tensor in state.items():
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", key)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_shortcut", "nin_shortcut")
        if "attn_1" in name:
            name = name.replace("group_norm", "norm").replace("to_out.0", "proj_out")
            name = re.sub(r"to_([qkv])", r"\1", name)
            tensor = tensor[..., None, None] if tensor.dim() == 2 else tensor
        found[name.replace("conv_norm_out", "norm_out")] = tensor.contiguous()
    return found


def single_tensors(networks: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors of the networks of an SDXL pipeline in SGM's names; they may be on the meta device."""
    own = {name.path: path for name, path in owners("sdxl").items()}
    tensors = {}
    for key, tensor in networks["unet"].items():
        path, _, end = key.rpartition(".")
        tensors[f"model.diffusion_model.{own[path]}.{end}"] = tensor
    for key, tensor in networks["text_encoder"].items():
        tensors[f"conditioner.embedders.0.transformer.text_model.{key.removeprefix('text_model.')}"] = tensor
    for key, tensor in open_clip_names(dict(networks["text_encoder_2"])).items():
        tensors[f"conditioner.embedders.1.model.{key}"] = tensor
    levels = len({key.split(".")[2] for key in networks["vae"] if key.startswith("decoder.up_blocks.")})
    for key, tensor in compvis_names(dict(networks["vae"]), levels).items():
        tensors[f"first_stage_model.{key}"] = tensor
    return tensors


def write_single_file(pipeline: Path, file: Path, markers: Sequence[str] = ()) -> Path:
    """Writes the networks of an SDXL pipeline as one file in SGM's names, with marker tensors; returns the file."""
    stems = dict.fromkeys(("unet", "vae"), "diffusion_pytorch_model") | dict.fromkeys(ENCODERS, "model")
    networks = {name: load_file(pipeline / name / f"{stem}.safetensors") for name, stem in stems.items()}
    tensors = single_tensors(networks) | {marker: torch.zeros(()) for marker in markers}
    save_file(tensors, file, metadata={"modelspec.title": "tiny"})
    return file
