"""Krea 2: a transformer of one stream over Qwen-Image's latents, which reads twelve hidden states of Qwen3-VL."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from dora_mm.data.images.buckets import Framing
from dora_mm.models.images.image_model import Prompt, pad_prompts
from dora_mm.models.images.noise import Flow
from dora_mm.models.images.qwen_image import WithQwenVAE, full_mask

MU_OF_TURBO = 1.15  # its pipeline's own, for images of all sizes


class TurboFlow(Flow):
    """The noise levels of what was distilled, whose shift does not depend on the size of the image."""

    def mu(self, num_tokens: int, num_steps: int | None) -> float:
        return MU_OF_TURBO


class Krea2(WithQwenVAE):
    """Krea 2 (Krea, 2026), of 13 billion parameters: Raw, which is trained, and Turbo, distilled of it.

    The pipeline fills prompts up in the middle, before the end of their template. What fills them up takes no positions
    and is masked everywhere: text without it, (L, layers, D), gives the same.
    """

    name = "krea2"
    maps: ClassVar = {"transformer": "krea2"}
    distilled_steps = 8

    @cached_property
    def noise(self) -> Flow:
        kind = TurboFlow if self.components.index.get("is_distilled") else Flow
        return kind(self.scheduler, self.patch)

    def in_template(self, pipe: Any, prompt: str) -> str:
        return f"{pipe.prompt_template_encode_prefix}{prompt}{pipe.prompt_template_encode_suffix}"

    def encode_prompts(self, prompts: Sequence[str]) -> list[Prompt]:
        """One by one, each filled up to its own length: not at all."""
        pipe, device = self.encoding(self.text_encoder), get_module_execution_device(self.text_encoder)
        found = (pipe.get_text_hidden_states(prompt, self.prompt_length(prompt), device) for prompt in prompts)
        return [{"text": text[0][mask[0]]} for text, mask in found]

    def predict(self, noised: Tensor, time: Tensor, prompts: Sequence[Prompt], framings: Sequence[Framing]) -> Tensor:
        network = self.transformer
        patches = pixel_unshuffle(noised.to(network.dtype), 2)
        text, mask = pad_prompts(prompts, "text")
        positions = self.pipeline_class().prepare_position_ids(text.shape[1], *patches.shape[2:], device=noised.device)
        found = network(
            hidden_states=patches.flatten(2).mT,
            timestep=time,
            encoder_hidden_states=text.to(network.dtype),
            encoder_attention_mask=mask,
            position_ids=positions,
            return_dict=False,
        )[0]
        return pixel_shuffle(found.mT.reshape(patches.shape), 2)

    def prompt_inputs(self, encoded: Sequence[Prompt], guidance: float) -> dict[str, Any]:
        """All of one length, since the pipeline takes the places of negative prompts from the others."""
        rows = [{"text": each[name]} for name in ("text", "negative_text") for each in encoded]
        text, mask = pad_prompts(rows, "text")
        (prompts, negative), (kept, its_kept) = text.chunk(2), full_mask(text, mask).chunk(2)
        return {
            "prompt_embeds": prompts,
            "prompt_embeds_mask": kept,
            "negative_prompt_embeds": negative,
            "negative_prompt_embeds_mask": its_kept,
            "guidance_scale": guidance - 1,  # the pipeline adds the difference to the prediction with the prompt
        }
