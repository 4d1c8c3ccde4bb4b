"""Losses and gradients of tiny models by diffusers' own training scripts, which official_losses.json keeps.

`python -m tests.models.images.official_losses CHECKOUT` takes from a git checkout of huggingface/diffusers the lines
of examples/dreambooth/train_dreambooth_lora_*.py as they are, from the draw of the times to the mean of the losses,
runs them, and writes the file, with the commit. What goes into them, latents and prompts, is by the pipelines' code.

Weights, pixels and noise are multiples of powers of two, the same on every machine and with every release of torch.
The scripts of Qwen-Image and Krea 2 draw latents from the VAE's posterior; here they get its mode, as the others do.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.shared.images.tiny_flows import FLOWS, TinyFlow

# The script of sd3 has lines of its own, of which there are no figures yet; Qwen-Image-2.1 has none
OF_SCRIPTS = [flow for flow in FLOWS if flow.name not in ("sd3", "qwen_image_21")]
FIGURES = Path(__file__).with_suffix(".json")
SCRIPT = "examples/dreambooth/train_dreambooth_lora_{}.py"
PROMPTS = ["a TOK icon of a red ball", "Describe this image in detail. " * 2, ""]
SCHEMES = ("none", "sigma_sqrt", "cosmap", "logit_normal")
SIZE = (64, 96)  # height and width in pixels
OF_MASKS = (  # functions of the scripts with masks, which make a batch of embeddings
    "_materialize_prompt_embedding_mask",
    "_pad_prompt_embedding_pair",
    "concat_prompt_embedding_batches",
)


# --- the same numbers everywhere ---


def exact(name: str, *shape: int) -> Tensor:
    """Numbers of variance 1 on a grid of 2^-8, by a name: integers are drawn, which no kind of processor rounds."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")
    return torch.randint(-443, 444, shape, generator=torch.Generator().manual_seed(seed)) / 256


def refilled(name: str, tensor: Tensor) -> Tensor:
    """A parameter or buffer with numbers that depend on its name alone, of a size with which networks work."""
    if not tensor.is_floating_point():
        return tensor
    numbers = exact(name, *tensor.shape)
    if name.endswith("running_var"):
        return 1 + numbers / 4
    if tensor.numel() == max(tensor.shape, default=1):  # biases, and factors of norms
        is_factor = "norm" in name and not name.endswith(("bias", "running_mean"))
        return is_factor + numbers / 8
    return numbers * 2.0 ** -round(torch.tensor(tensor[0].numel()).log2().item() / 2)


def build(flow: TinyFlow, folder: Path) -> Path:
    """The tiny model of a family in a folder, with such weights in all files."""
    flow.build(folder)
    for file in sorted(folder.rglob("*.safetensors")):
        tensors = {name: refilled(name, tensor).contiguous() for name, tensor in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    return folder


def pixels() -> Tensor:
    return exact("pixels", len(PROMPTS), 3, *SIZE).clamp(-1, 1)


def noise(shape: Any) -> Tensor:
    return exact("noise", *shape)


# --- what the scripts do ---


def lines_of(source: str) -> str:
    """The lines of a script from the draw of the times to the mean of the losses."""
    lines = source.splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip() == "u = compute_density_for_timestep_sampling(")
    end = next(i for i, line in enumerate(lines) if i > start and line.strip() == "loss = loss.mean()")
    return textwrap.dedent("\n".join(lines[start : end + 1]))


def function_of(source: str, name: str) -> str:
    """A function of a script; nothing where it has none of that name."""
    found = re.search(rf"^( *)def {name}\(.*?(?=\n\1[^\s)]|\Z)", source, re.M | re.S)
    return textwrap.dedent(found[0]) if found else ""


def latents_of(flow: TinyFlow, pipe: Any) -> Tensor:
    """The mode of the posterior of the pixels, normalised by the formulas of the scripts."""
    vae, config = pipe.vae, pipe.vae.config
    frames = pixels().unsqueeze(2) if flow.is_over_frames else pixels()
    mode = vae.encode(frames).latent_dist.mode()
    if flow.name == "flux2_klein":
        patches, bn = flow.kind._patchify_latents(mode), vae.bn
        mean, variance = bn.running_mean.view(1, -1, 1, 1), bn.running_var.view(1, -1, 1, 1)
        return (patches - mean) / torch.sqrt(variance + config.batch_norm_eps)
    if flow.name == "z_image":
        return (mode - config.shift_factor) * config.scaling_factor
    shape = (1, config.z_dim, 1, 1, 1)
    return (mode - torch.tensor(config.latents_mean).view(shape)) * (1.0 / torch.tensor(config.latents_std).view(shape))


def prompts_of(flow: TinyFlow, pipe: Any, source: str) -> dict[str, Any]:
    """The variables of a script that hold the encoded prompts."""
    if flow.name == "z_image":
        return {"prompt_embeds": pipe.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)[0]}
    if flow.name == "flux2_klein":
        embeds, ids = pipe.encode_prompt(list(PROMPTS), max_sequence_length=flow.settings["max_tokens"])
        return {"prompt_embeds": embeds, "text_ids": ids}
    scope: dict[str, Any] = {"torch": torch}
    for name in OF_MASKS:
        exec(function_of(source, name), scope)
    embeds, mask = scope[OF_MASKS[-1]](*(pipe.encode_prompt(prompt, max_sequence_length=512) for prompt in PROMPTS))
    return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}


def run_lines(flow: TinyFlow, pipe: Any, source: str, scheme: str, latents: Tensor, prompts: Any) -> dict[str, Any]:
    """The variables of a script after its lines, with gradients in the transformer."""
    args = {"weighting_scheme": scheme, "logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29}
    scope = vars(diffusers) | prompts | {
        "torch": torch,
        "compute_density_for_timestep_sampling": compute_density_for_timestep_sampling,
        "compute_loss_weighting_for_sd3": compute_loss_weighting_for_sd3,
        flow.kind.__name__: flow.kind,
        "args": SimpleNamespace(**args, with_prior_preservation=False, guidance_scale=3.5),
        "accelerator": SimpleNamespace(device=torch.device("cpu")),
        "transformer": pipe.transformer,
        "unwrap_model": lambda model: model,
        "noise_scheduler_copy": type(pipe.scheduler).from_config(pipe.scheduler.config),
        "model_input": latents.clone(),
        "noise": noise(latents.shape),
        "bsz": len(latents),
        "vae_scale_factor": 8,
    }  # fmt: skip
    if flow.name == "flux2_klein":
        scope["model_input_ids"] = flow.kind._prepare_latent_ids(latents)
    exec(function_of(source, "get_sigmas"), scope)
    pipe.transformer.zero_grad()
    torch.manual_seed(7)
    exec(lines_of(source), scope)
    scope["loss"].backward()
    return scope


# --- the figures ---


def figures_of(flow: TinyFlow, source: str, folder: Path) -> dict[str, Any]:
    """All figures of a family."""
    pipe = flow.plain(build(flow, folder))
    pipe.transformer.requires_grad_(True).eval()
    with torch.no_grad():
        latents, prompts = latents_of(flow, pipe), prompts_of(flow, pipe, source)
    mask = prompts.get("prompt_embeds_mask")
    texts = [text if mask is None else text[mask[row].bool()] for row, text in enumerate(prompts["prompt_embeds"])]
    figures: dict[str, Any] = {"latents": norms(latents), "prompts": norms(texts), "schemes": {}}
    for scheme in SCHEMES:
        scope = run_lines(flow, pipe, source, scheme, latents, prompts)
        figures["schemes"][scheme] = {
            "sigmas": scope["sigmas"].flatten().tolist(),
            "loss": shortened(scope["loss"]),
            "gradients": gradient_norms(pipe.transformer),
        }
    return figures | {"times": times_of(flow, pipe, latents)}


def norms(tensors: Any) -> list[float]:
    return [shortened(tensor.float().norm()) for tensor in tensors]


def shortened(number: Tensor) -> float:
    """A float32 in the digits that it has."""
    return float(f"{number.item():.8g}")


def gradient_norms(network: torch.nn.Module) -> dict[str, float]:
    """The norms of the gradients by parameter, of those that have one."""
    return {name: shortened(p.grad.norm()) for name, p in network.named_parameters() if p.grad is not None}


def times_of(flow: TinyFlow, pipe: Any, latents: Tensor) -> dict[str, list[float]]:
    """Nine times that the scripts' formula draws of logit_normal, before the shift and after it.

    Where the shift depends on the size of a picture, the scripts leave it out: it is that of the pipeline, by the
    scheduler over 1,000 levels, but for the stretch to `shift_terminal`, which depends on the number of levels.
    """
    scheduler, own = type(pipe.scheduler).from_config(pipe.scheduler.config, shift_terminal=None), pipe.scheduler.config
    u = compute_density_for_timestep_sampling("logit_normal", 9, 0.0, 1.0, generator=torch.Generator().manual_seed(7))
    indices = (u * own.num_train_timesteps).long()
    levels = torch.linspace(1, 1 / own.num_train_timesteps, own.num_train_timesteps)
    height, width = latents.shape[-2:]
    tokens = height * width // (1 if flow.name == "flux2_klein" else 4)
    mu = compute_empirical_mu(tokens, 50)
    if flow.name != "flux2_klein":
        lengths, shifts = (own.base_image_seq_len, own.max_image_seq_len), (own.base_shift, own.max_shift)
        mu = calculate_shift(tokens, *lengths, *shifts)
    scheduler.set_timesteps(sigmas=levels.tolist(), mu=mu if own.use_dynamic_shifting else None)
    return {"before": levels[indices].tolist(), "after": scheduler.sigmas[indices].tolist()}


def main(checkout: str) -> None:
    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", checkout, *command], capture_output=True, text=True, check=True).stdout

    commit = git("rev-parse", "HEAD").strip()
    made_with = {package.__name__: package.__version__ for package in (torch, diffusers, transformers)}
    found: dict[str, Any] = {"huggingface/diffusers": commit, "made with": made_with, "families": {}}
    for flow in OF_SCRIPTS:
        with tempfile.TemporaryDirectory() as folder:
            source = git("show", f"{commit}:{SCRIPT.format(flow.name)}")
            found["families"][flow.name] = figures_of(flow, source, Path(folder) / "model")
    FIGURES.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
