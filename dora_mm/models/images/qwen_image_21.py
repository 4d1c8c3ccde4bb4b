"""Qwen-Image-2.1: a transformer of one stream that draws and edits, Qwen3-VL as its text encoder, and a VAE of RGBA."""

# Annotations are evaluated here: diffusers reads those of the pipeline's components.

import hashlib
import json
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Transformer2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.qwenimage21 import pipeline_qwenimage21 as published
from diffusers.utils.torch_utils import get_module_execution_device
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from dora_mm.core.wrappers.sharded import is_sharded
from dora_mm.data.images.buckets import Framing, Size
from dora_mm.data.syntax import Wording
from dora_mm.models.images.components import META
from dora_mm.models.images.editing import EditingModel
from dora_mm.models.images.image_model import Prompt
from dora_mm.models.images.noise import Flow, LatentSize
from dora_mm.models.images.qwen_image import WithQwenVAE

TEXT, SLOT = 1, 2  # kinds of tokens of a prompt; a slot stands for 2 x 2 latents of a reference, and 0 for padding
SLOT_SIDE = 2  # latents
RESOLUTION = "resolution"  # key of what a prepared reference says in its `info`


class QwenImage21Pipeline(published.QwenImage21Pipeline):
    """Diffusers' pipeline, which also takes encoded prompts with references.

    `prompt_embeds_mask` has the kinds of tokens (B, L): 0 for padding, `TEXT`, or `SLOT`. Diffusers' own takes the
    embeddings, but not which of them are slots. It can also be built without a processor.
    """

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKLQwenImage21,
        text_encoder: Qwen3VLForConditionalGeneration,
        processor: Qwen3VLProcessor,
        transformer: QwenImage21Transformer2DModel,
        sample_sigmas: list[float] | None = None,
    ):
        if processor is not None:
            super().__init__(scheduler, vae, text_encoder, processor, transformer, sample_sigmas)
            return
        super(published.QwenImage21Pipeline, self).__init__()  # where only other components are loaded
        self.register_modules(
            vae=vae, text_encoder=text_encoder, processor=processor, transformer=transformer, scheduler=scheduler
        )
        self.register_to_config(sample_sigmas=sample_sigmas)

    def encode_prompt(self, prompt: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers, with the kinds of the tokens of embeddings as their mask."""
        kinds = kwargs.get("prompt_embeds_mask")
        if kwargs.get("prompt_embeds") is not None and kinds is not None:
            kwargs |= {"prompt_embeds_mask": kinds != 0, "image_pad_mask": kinds == SLOT}
        return super().encode_prompt(prompt, *args, **kwargs)


class SampleFlow(Flow):
    """Noise levels that begin from the `sample_sigmas` of a pipeline where as many steps are asked for.

    Args:
        scheduler: The model's scheduler.
        patch: As of `Flow`.
        sample_sigmas: The levels of sampling before the shift; None: evenly spaced ones.
    """

    def __init__(self, scheduler: Any, patch: int, sample_sigmas: Sequence[float] | None):
        super().__init__(scheduler, patch)
        self.sample_sigmas = sample_sigmas or ()

    def schedule(self, num_steps: int, size: LatentSize) -> list[float]:
        if len(self.sample_sigmas) != num_steps:
            return super().schedule(num_steps, size)
        return self.sigma(torch.tensor(self.sample_sigmas), size[0] * size[1], num_steps).tolist()


class QwenImage21(WithQwenVAE, EditingModel):
    """Qwen-Image-2.1 (Alibaba, 2026), of 7 billion parameters.

    References of every size come to one area, where the text encoder and the VAE see them alike, but for alpha, which
    the VAE alone sees. Their latents take the slots that they have in the text, before the prompt; the noised ones
    follow the text. Text and references do not see the noised latents, and are modulated as at time 0.
    """

    name = "qwen_image_21"
    phases = (("processor", "scheduler"), ("text_encoder",), ("vae",), ("transformer",))
    vae_name = "AutoencoderKLQwenImage21"
    maps: ClassVar = {"transformer": "qwen-image-21"}
    cell = 32  # 16 pixels per latent, 2 x 2 latents per slot
    patch = 1
    smallest_reference = 1
    longest_reference = 200.0  # the processor's
    prompts_see_references = True
    references_have_alpha = True

    @classmethod
    def pipeline_class(cls) -> Any:
        return QwenImage21Pipeline

    @cached_property
    def noise(self) -> Flow:
        return SampleFlow(self.scheduler, self.patch, self.components.index.get("sample_sigmas"))

    # --- prompts -----------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """That of the processor."""
        return self.processor.tokenizer

    @property
    def text_identity(self) -> str:
        """With the processor: its tokenizer, and how it resizes references."""
        processor = self.processor
        found = [super().text_identity, processor.chat_template, processor.image_processor.to_json_string()]
        found.append(processor.tokenizer.backend_tokenizer.to_str())
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    @property
    def most_tokens(self) -> int | None:
        """None: the pipeline cuts no prompt."""
        return None

    def in_template(self, pipe: Any, prompt: str) -> str:
        return pipe.prompt_template_t2i.format(prompt or " ")

    def num_tokens(self, prompt: str) -> int:
        """Without those of the system's turn, which are cut off, and without references."""
        pipe = self.encoding(None)
        return len(self.tokenizer(self.in_template(pipe, prompt)).input_ids) - pipe._drop_idx

    def prompt_length(self, prompt: Wording) -> int:
        """In tokens, without those of references."""
        assert isinstance(prompt, str)  # it does not `weigh_words`
        return self.num_tokens(prompt)

    def encoding(self, text_encoder: Any) -> Any:
        return self.make_pipeline(
            {"vae": None, "transformer": None, "text_encoder": text_encoder, "processor": self.processor}
        )

    def encode_prompts(self, prompts: Sequence[str]) -> list[Prompt]:
        """One by one, so that none depends on the others in the last bits."""
        return self.encode_edit_prompts(prompts, [()] * len(prompts))

    def encode_edit_prompts(self, prompts: Sequence[str], references: Sequence[Sequence[Image.Image]]) -> list[Prompt]:
        """One by one; the text encoder's last layer is read before its final norm, as the pipeline does.

        Raises:
            ValueError: The processor brings a reference to another size than the VAE sees.
        """
        pipe, device = self.encoding(self.text_encoder), get_module_execution_device(self.text_encoder)
        device = torch.device("cpu") if device == META else device
        return [self._encoded(pipe, device, *each) for each in zip(prompts, references, strict=True)]

    def _encoded(self, pipe: Any, device: torch.device, prompt: str, references: Sequence[Image.Image]) -> Prompt:
        sizes = [self._size_of(image) for image in references]
        seen = [
            pipe.image_processor.resize(image.convert("RGBA"), height=height, width=width)
            for image, (height, width) in zip(references, sizes, strict=True)
        ]
        text, _, slots = pipe._get_qwen_prompt_embeds(prompt, seen or None, device)
        if int(slots.sum()) != sum(height * width for height, width in sizes) // self.cell**2:
            given = ", ".join(f"{width} x {height}" for height, width in sizes)
            raise ValueError(
                f"data.reference_area: the processor of the text encoder brings references of {given} pixels to other "
                "sizes, which the transformer cannot take: set a larger area"
            )
        return {"text": text[0], "kinds": torch.where(slots[0], SLOT, TEXT).to(text.device)}

    # --- references --------------------------------------------------------------------------------------------------

    def resolution_of(self, area: int | None) -> int:
        """The pipeline's `output_resolution` with which references have at most an area."""
        return self.resolution if area is None else min(self.resolution, math.isqrt(area))

    def reference_size(self, size: Size, area: int | None = None) -> Size:
        width, height, _ = published.calculate_dimensions(self.resolution_of(area) ** 2, size[1] / size[0])
        return height, width

    def prepared_size(self, size: Size, area: int | None = None) -> Size:
        return size

    def scaled_reference(self, image: Image.Image, area: int) -> Image.Image:
        """The reference with the resolution of the area in its `info`: the pipeline scales each once, up or down."""
        image = image.copy()
        image.info[RESOLUTION] = self.resolution_of(area)
        return image

    def _size_of(self, image: Image.Image) -> Size:
        """The size at which text encoder and VAE see a prepared reference."""
        return self.reference_size((image.height, image.width), self._resolution(image) ** 2)

    def _resolution(self, image: Image.Image) -> int:
        return image.info.get(RESOLUTION, self.resolution)

    def reference_pixels(self, image: Image.Image) -> Tensor:
        height, width = self._size_of(image)
        processor = VaeImageProcessor(vae_scale_factor=self.vae_downscale)
        return processor.preprocess(image.convert("RGBA"), height=height, width=width)

    def edited_size(self, references: Sequence[Size]) -> Size:
        return self.reference_size(references[-1])

    # --- the transformer ---------------------------------------------------------------------------------------------

    def predict_edit(
        self,
        noised: Tensor,
        time: Tensor,
        prompts: Sequence[Prompt],
        framings: Sequence[Framing],
        references: Sequence[Tensor],
    ) -> Tensor:
        """Prompts of one length go together: positions of latents follow the text, and padding would move them.

        Raises:
            ValueError: The transformer is divided among processes, and there are several prompts: processes with other
                lengths would wait for passes that this one does not have.
        """
        groups: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            groups.setdefault(len(prompt["text"]), []).append(row)
        if len(prompts) > 1 and any(map(is_sharded, self.transformer.parameters())):
            raise ValueError(f"train.shard: {self.title} takes prompts of one length at a time: set train.batch_size 1")
        if len(groups) == 1:
            return self._velocity(noised, time, prompts, references)
        found = []
        for rows in groups.values():
            own = [prompts[row] for row in rows], [latents[rows] for latents in references]
            found.append(self._velocity(noised[rows], time[rows], *own))
        order = torch.tensor([row for rows in groups.values() for row in rows], device=noised.device)
        return torch.cat(found)[order.argsort()]

    def _velocity(
        self, noised: Tensor, time: Tensor, prompts: Sequence[Prompt], references: Sequence[Tensor]
    ) -> Tensor:
        """The velocity (B, C, h, w), of prompts of one length."""
        network, images = self.transformer, [*references, noised]
        slots = torch.stack([prompt["kinds"] for prompt in prompts]) == SLOT
        of_target = slots.new_ones(len(noised), noised.shape[2] * noised.shape[3] // SLOT_SIDE**2)
        found = network(
            hidden_states=torch.cat([latents.to(network.dtype).flatten(2).mT for latents in images], dim=1),
            timestep=time,
            encoder_hidden_states=torch.stack([prompt["text"] for prompt in prompts]).to(network.dtype),
            img_shapes=[[(1, *latents.shape[2:]) for latents in images]] * len(noised),
            img_mask=torch.cat([slots, of_target], dim=1),
            return_dict=False,
        )[0]
        return found[:, -noised.shape[2] * noised.shape[3] :].mT.reshape(noised.shape)

    # --- generating --------------------------------------------------------------------------------------------------

    def prompt_inputs(self, encoded: Sequence[Prompt], guidance: float) -> dict[str, Any]:
        found = {"true_cfg_scale": guidance, **_padded(encoded, "")}
        return {**found, **_padded(encoded, "negative_")} if guidance > 1 else found

    def reference_inputs(self, references: Sequence[Image.Image]) -> dict[str, Any]:
        return {"image": list(references), "output_resolution": self._resolution(references[0])}


def _padded(encoded: Sequence[Prompt], prefix: str) -> dict[str, Tensor]:
    """The embeddings of prompts and the kinds of their tokens, as `QwenImage21Pipeline` takes them."""
    text, kinds = (pad_sequence([each[prefix + name] for each in encoded], True) for name in ("text", "kinds"))
    return {f"{prefix}prompt_embeds": text, f"{prefix}prompt_embeds_mask": kinds}
