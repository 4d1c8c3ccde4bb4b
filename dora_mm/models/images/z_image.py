"""Z-Image: a single-stream transformer, Qwen3 as its text encoder, and Flux.1's VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor

from dora_mm.config.models import ModelConfig
from dora_mm.data.images.buckets import Framing
from dora_mm.data.syntax import Wording
from dora_mm.formats.files.model_folder import ModelFolder
from dora_mm.models.images.flow_model import FlowModel
from dora_mm.models.images.image_model import Distilled, Prompt

GROUP = 32  # tokens: the transformer fills prompts and images up to multiples of it
SHIFT_OF_BASE = 6.0  # Turbo's is 3


class ZImage(FlowModel):
    """Z-Image (Tongyi-MAI, 2025), the base model: the distilled one, Turbo, loses its few steps when it is trained."""

    name = "z_image"
    maps: ClassVar = {"transformer": "z-image"}
    chat: ClassVar[Mapping[str, Any]] = {"add_generation_prompt": True, "enable_thinking": True}

    @classmethod
    def distilled(cls, files: ModelFolder) -> Distilled | None:
        """Turbo, which nothing but the shift of its scheduler tells from the base model."""
        shift = files.config("scheduler").get("shift", 1.0)
        return Distilled(8, 1.0, f"the shift of its scheduler, {shift:g}") if shift < SHIFT_OF_BASE else None

    def check(self, config: ModelConfig) -> None:
        super().check(config)
        num_positions = self.components.config("transformer")["axes_lens"][
            0
        ]  # of prompt and image, one after the other
        most = (num_positions - 2) // GROUP * GROUP
        if self.settings.max_tokens > most:
            raise ValueError(f"model.z_image.max_tokens must be at most {most} for {config.path}.")

    def prompt_length(self, prompt: Wording) -> int:
        """In groups of tokens."""
        assert isinstance(prompt, str)  # it does not `weigh_words`
        return -(-min(self.num_tokens(prompt), self.most_tokens) // GROUP)

    def encode_prompts(self, prompts: Sequence[str]) -> list[Prompt]:
        """One by one, so that none depends on the others in the last bits."""
        encoders: dict[str, Any] = {"text_encoder": self.text_encoder, "tokenizer": self.tokenizer}
        pipe = self.pipeline_class()(scheduler=None, vae=None, transformer=None, **encoders)
        settings: dict[str, Any] = {
            "max_sequence_length": self.settings.max_tokens,
            "device": get_module_execution_device(self.text_encoder),
        }
        each = (pipe.encode_prompt(p, do_classifier_free_guidance=False, **settings)[0] for p in prompts)
        return [{"text": rows[0]} for rows in each]

    def normalized(self, latents: Tensor) -> Tensor:
        return (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def predict(self, noised: Tensor, time: Tensor, prompts: Sequence[Prompt], framings: Sequence[Framing]) -> Tensor:
        network = self.transformer
        rows = list(noised.to(network.dtype).unsqueeze(2).unbind())
        found = network(rows, 1 - time, [prompt["text"] for prompt in prompts], return_dict=False)[0]
        return -torch.stack(list(found)).squeeze(2)  # it predicts x - e

    def prompt_inputs(self, encoded: Sequence[Prompt], guidance: float) -> dict[str, Any]:
        return {
            "prompt_embeds": [each["text"] for each in encoded],
            "negative_prompt_embeds": [each["negative_text"] for each in encoded],
            "guidance_scale": guidance - 1,  # the pipeline adds the difference to the prediction with the prompt
        }
