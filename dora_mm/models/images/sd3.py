"""Stable Diffusion 3: a transformer of two streams, which reads two CLIPs and T5, over a VAE of 16 channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor

from dora_mm.data.images.buckets import Framing
from dora_mm.models.images.flow_model import FlowModel
from dora_mm.models.images.image_model import Prompt

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")  # CLIP-L, OpenCLIP bigG and T5-XXL
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


class StableDiffusion3(FlowModel):
    """Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206), which are trained on samples of the posterior.

    A prompt is the tokens of both CLIPs, side by side and filled up with zeros to the width of T5's, then those of T5;
    and what both CLIPs pool. All prompts are filled up to one length, and the transformer reads what fills them.
    """

    name = "sd3"
    phases = ((*TOKENIZERS, "scheduler"), TEXT_ENCODERS, ("vae",), ("transformer",))
    maps: ClassVar = {"transformer": "sd3"}
    reads_denoisers = False
    has_unread_layers = True  # the queries of the text in the last block
    scheduler_makes_levels = True
    trains_on_mode = False

    def num_tokens(self, prompt: str) -> int:
        """T5's, which reads what the CLIPs cut off."""
        return len(self.tokenizer_3(prompt).input_ids)

    def encode_prompts(self, prompts: Sequence[str]) -> list[Prompt]:
        """One by one, so that none depends on the others in the last bits."""
        encoders = {name: self.components[name] for name in (*TEXT_ENCODERS, *TOKENIZERS)}
        pipe = self.pipeline_class()(scheduler=None, vae=None, transformer=None, **encoders)
        settings: dict[str, Any] = {"max_sequence_length": self.settings.max_tokens}
        settings["device"] = get_module_execution_device(self.text_encoder)
        found = []
        for prompt in prompts:
            text, _, pooled, _ = pipe.encode_prompt(prompt, None, None, do_classifier_free_guidance=False, **settings)
            found.append({"text": text[0], "pooled": pooled[0]})
        return found

    def normalized(self, latents: Tensor) -> Tensor:
        return (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def predict(self, noised: Tensor, time: Tensor, prompts: Sequence[Prompt], framings: Sequence[Framing]) -> Tensor:
        network = self.transformer
        text, pooled = (torch.stack([prompt[name] for prompt in prompts]) for name in ("text", "pooled"))
        return network(
            hidden_states=noised.to(network.dtype),
            timestep=time * self.scheduler.config.num_train_timesteps,
            encoder_hidden_states=text.to(network.dtype),
            pooled_projections=pooled.to(network.dtype),
            return_dict=False,
        )[0]

    def prompt_inputs(self, encoded: Sequence[Prompt], guidance: float) -> dict[str, Any]:
        names = {"prompt": "text", "pooled_prompt": "pooled"}
        names |= {"negative_prompt": "negative_text", "negative_pooled_prompt": "negative_pooled"}
        stacked = {f"{key}_embeds": torch.stack([each[name] for each in encoded]) for key, name in names.items()}
        return {**stacked, "guidance_scale": guidance}
