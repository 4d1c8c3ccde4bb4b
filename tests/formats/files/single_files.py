"""Checkpoints of whole models in one file, with the names of the code that SDXL was published with."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dora_mm.formats.naming.names import owners


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


def write_single_file(pipeline: Path, file: Path) -> Path:
    """Writes the networks of an SDXL pipeline, without its VAE, as one file in SGM's names; returns the file."""
    unet = load_file(pipeline / "unet/diffusion_pytorch_model.safetensors")
    own = {name.path: path for name, path in owners("sdxl").items()}
    tensors = {}
    for key, tensor in unet.items():
        path, _, end = key.rpartition(".")
        tensors[f"model.diffusion_model.{own[path]}.{end}"] = tensor
    for key, tensor in load_file(pipeline / "text_encoder/model.safetensors").items():
        tensors[f"conditioner.embedders.0.transformer.text_model.{key.removeprefix('text_model.')}"] = tensor
    for key, tensor in open_clip_names(load_file(pipeline / "text_encoder_2/model.safetensors")).items():
        tensors[f"conditioner.embedders.1.model.{key}"] = tensor
    tensors["first_stage_model.decoder.conv_in.weight"] = torch.randn(2, 2, 3, 3)
    save_file(tensors, file, metadata={"modelspec.title": "tiny"})
    return file
