"""Qwen-Image: a transformer of two streams, Qwen2.5-VL as its text encoder, and a VAE of videos.

Krea 2 shares the VAE, the patches, and that its pipeline writes a template around prompts: `WithQwenVAE` has these.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from dora_mm.data.images.buckets import Framing
from dora_mm.data.syntax import Wording
from dora_mm.models.images.flow_model import FlowModel
from dora_mm.models.images.image_model import Prompt, pad_prompts

RESOLUTION = 1024  # pixels: the pipeline's own; its VAE's config has none


class WithQwenVAE(FlowModel):
    """A flow model over the latents of Qwen-Image's VAE, whose prompts are as long as they are, in a template."""

    vae_name = "AutoencoderKLQwenImage"
    vae_keys = ("z_dim", "dim_mult")

    @property
    def resolution(self) -> int:
        return self.components.config("vae").get("sample_size", RESOLUTION)

    @property
    def vae_downscale(self) -> int:
        return 2 ** len(self.vae.config.temperal_downsample)

    @abstractmethod
    def in_template(self, pipe: Any, prompt: str) -> str:
        """The prompt in the template of the pipeline."""

    def num_tokens(self, prompt: str) -> int:
        """Without those of the template before it, which are cut off."""
        pipe = self.encoding(None)
        ids = self.tokenizer(self.in_template(pipe, prompt)).input_ids
        return len(ids) - pipe.prompt_template_encode_start_idx

    def prompt_length(self, prompt: Wording) -> int:
        """In tokens."""
        assert isinstance(prompt, str)  # it does not `weigh_words`
        return min(self.num_tokens(prompt), self.most_tokens)

    def encoding(self, text_encoder: Any) -> Any:
        """The pipeline with what encodes prompts, which has their template."""
        parts = {"vae": None, "transformer": None, "text_encoder": text_encoder}
        return self.make_pipeline({**parts, "tokenizer": self.tokenizer})

    def normalized(self, latents: Tensor) -> Tensor:
        config = self.vae.config
        mean, std = (
            torch.tensor(each).view(1, -1, 1, 1).to(latents) for each in (config.latents_mean, config.latents_std)
        )
        return (latents - mean) / std


def full_mask(text: Tensor, mask: Tensor | None) -> Tensor:
    """The mask (B, L) of a batch of embeddings (B, L, ...), True where nothing is padded: pipelines ask for one."""
    return torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask


class QwenImage(WithQwenVAE):
    """Qwen-Image (Alibaba, 2025), of 20 billion parameters."""

    name = "qwen_image"
    maps: ClassVar = {"transformer": "qwen-image"}
    rescales_guided_tokens = True
    has_unread_layers = True  # those of the text in the last block

    def in_template(self, pipe: Any, prompt: str) -> str:
        return pipe.prompt_template_encode.format(prompt)

    def encode_prompts(self, prompts: Sequence[str]) -> list[Prompt]:
        """One by one, so that none depends on the others in the last bits."""
        pipe, device = self.encoding(self.text_encoder), get_module_execution_device(self.text_encoder)
        settings: dict[str, Any] = {"device": device, "max_sequence_length": self.settings.max_tokens}
        return [{"text": pipe.encode_prompt(prompt, **settings)[0][0]} for prompt in prompts]

    def predict(self, noised: Tensor, time: Tensor, prompts: Sequence[Prompt], framings: Sequence[Framing]) -> Tensor:
        return self.velocity([noised], time, prompts)

    def velocity(self, images: Sequence[Tensor], time: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The velocity (B, C, h, w) of the first of the images, latents (B, C, ., .) of own sizes.

        The tokens of the others follow its own in the sequence.
        """
        network = self.transformer
        patches = [pixel_unshuffle(latents.to(network.dtype), 2) for latents in images]
        text, mask = pad_prompts(prompts, "text")
        found = network(
            hidden_states=torch.cat([each.flatten(2).mT for each in patches], dim=1),
            timestep=time,
            guidance=None,
            encoder_hidden_states=text.to(network.dtype),
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, *each.shape[2:]) for each in patches]] * len(time),  # a list for each row
            return_dict=False,
        )[0]
        first = patches[0]
        return pixel_shuffle(found[:, : first.shape[2] * first.shape[3]].mT.reshape(first.shape), 2)

    def prompt_inputs(self, encoded: Sequence[Prompt], guidance: float) -> dict[str, Any]:
        (text, mask), (negative, its_mask) = (pad_prompts(encoded, name) for name in ("text", "negative_text"))
        return {
            "prompt_embeds": text,
            "prompt_embeds_mask": full_mask(text, mask),
            "negative_prompt_embeds": negative,
            "negative_prompt_embeds_mask": full_mask(negative, its_mask),
            "true_cfg_scale": guidance,
        }
