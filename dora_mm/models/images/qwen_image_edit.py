"""Qwen-Image-Edit: Qwen-Image's transformer beside reference images, which Qwen2.5-VL sees with the prompt, too."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, ClassVar

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as published
from diffusers.pipelines.qwenimage.pipeline_output import QwenImagePipelineOutput
from diffusers.utils.torch_utils import get_module_execution_device
from PIL import Image
from torch import Tensor

from dora_mm.data.images.buckets import Framing, Size
from dora_mm.data.syntax import Wording
from dora_mm.models.images.components import META
from dora_mm.models.images.editing import EditingModel
from dora_mm.models.images.image_model import Prompt
from dora_mm.models.images.qwen_image import QwenImage

EDITED_AREA = 1024 * 1024  # pixels of an image that is given no size


class QwenImageEditPlusPipeline(published.QwenImageEditPlusPipeline):
    """Diffusers' pipeline, which also generates several images of encoded prompts, one after another."""

    num_images = 1  # of the batch

    @property
    def num_timesteps(self) -> int:
        """Of all images of the batch together."""
        return self._num_timesteps * self.num_images

    def __call__(self, *args: Any, **settings: Any) -> Any:
        embeds = settings.get("prompt_embeds")
        self.num_images = 1 if embeds is None else len(embeds)
        if self.num_images == 1:
            return super().__call__(*args, **settings)
        generate: Any = super().__call__
        found = [generate(*args, **self._of_row(settings, row)).images for row in range(self.num_images)]
        images: Any = torch.cat(found) if isinstance(found[0], Tensor) else list(chain.from_iterable(found))
        return QwenImagePipelineOutput(images=images)

    def _of_row(self, settings: dict[str, Any], row: int) -> dict[str, Any]:
        """The arguments for one image of a batch."""
        own = {name: value[row : row + 1] for name, value in settings.items() if "prompt_embeds" in name}
        generator, callback = settings.get("generator"), settings.get("callback_on_step_end")
        if isinstance(generator, list):
            own["generator"] = generator[row]
        if callback is not None:
            own["callback_on_step_end"] = lambda pipe, step, *rest: callback(
                pipe, row * self._num_timesteps + step, *rest
            )
        return {**settings, **own}


class QwenImageEdit(EditingModel, QwenImage):
    """Qwen-Image-Edit 2509 and 2511 (Alibaba, 2025), of 20 billion parameters.

    References of every size come to the VAE at an area of 1024 x 1024 pixels, and to the text encoder at one of
    384 x 384. Their tokens follow the noised ones, each at a frame of its own. The transformer of 2511, whose config
    has `zero_cond_t`, modulates them as at time 0.
    """

    name = "qwen_image_edit"
    phases = (("tokenizer", "processor", "scheduler"), ("text_encoder",), ("vae",), ("transformer",))
    longest_reference: ClassVar[float] = 200.0  # the processor's of the text encoder
    needs_references = True
    prompts_see_references = True
    scales_references_up = True

    @classmethod
    def pipeline_class(cls) -> Any:
        return QwenImageEditPlusPipeline

    @property
    def most_tokens(self) -> int | None:
        """None: the pipeline cuts no prompt."""
        return None

    def prompt_length(self, prompt: Wording) -> int:
        """In tokens, without those of references."""
        assert isinstance(prompt, str)  # it does not `weigh_words`
        return self.num_tokens(prompt)

    @property
    def text_identity(self) -> str:
        """With the processor: how it resizes references, and its tokenizer."""
        processor = self.processor
        found = [super().text_identity, processor.image_processor.to_json_string()]
        found.append(processor.tokenizer.backend_tokenizer.to_str())
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    def encoding(self, text_encoder: Any) -> Any:
        parts = {"vae": None, "transformer": None, "text_encoder": text_encoder}
        return self.make_pipeline({**parts, "tokenizer": self.tokenizer, "processor": self.processor})

    def encode_prompts(self, prompts: Sequence[str]) -> list[Prompt]:
        """Refuses prompts without references, which the pipeline does not take.

        Raises:
            ValueError: Always.
        """
        raise self._refusal()

    def _refusal(self) -> ValueError:
        return ValueError(f"{self.title} needs references: it makes no images of text alone")

    def encode_edit_prompts(self, prompts: Sequence[str], references: Sequence[Sequence[Image.Image]]) -> list[Prompt]:
        """One by one, as the pipeline takes them.

        Raises:
            ValueError: A prompt has no references.
        """
        if not all(references):
            raise self._refusal()
        device = get_module_execution_device(self.text_encoder)
        pipe, device = self.encoding(self.text_encoder), torch.device("cpu") if device == META else device
        encoded = []
        with _positions_of_images(self.text_encoder, self.processor):
            for prompt, images in zip(prompts, references, strict=True):
                seen = [self._condition(pipe.image_processor, image) for image in images]
                encoded.append({"text": pipe.encode_prompt(prompt, image=seen, device=device)[0][0]})
        return encoded

    def _condition(self, processor: VaeImageProcessor, image: Image.Image) -> Any:
        """A prepared reference as the pipeline gives it to the processor of the text encoder."""
        height, width = _at_area((image.height, image.width), published.CONDITION_IMAGE_SIZE)
        return processor.resize(image, height, width)

    def reference_size(self, size: Size, area: int | None = None) -> Size:
        return _at_area(size, published.VAE_IMAGE_SIZE)

    def prepared_size(self, size: Size, area: int | None = None) -> Size:
        return size

    def scaled_reference(self, image: Image.Image, area: int) -> Image.Image:
        """The reference as it is: the pipeline would scale it up again."""
        return image

    def reference_pixels(self, image: Image.Image) -> Tensor:
        height, width = self.reference_size((image.height, image.width))
        return VaeImageProcessor(vae_scale_factor=2 * self.vae_downscale).preprocess(image, height, width)

    def edited_size(self, references: Sequence[Size]) -> Size:
        return _at_area(references[-1], EDITED_AREA)

    def predict_edit(
        self,
        noised: Tensor,
        time: Tensor,
        prompts: Sequence[Prompt],
        framings: Sequence[Framing],
        references: Sequence[Tensor],
    ) -> Tensor:
        return self.velocity([noised, *references], time, prompts)


def _at_area(size: Size, area: int) -> Size:
    """The size (h, w) to which the pipeline brings an image for an area in pixels."""
    width, height = published.calculate_dimensions(area, size[1] / size[0])
    return height, width


@contextmanager
def _positions_of_images(text_encoder: Any, processor: Any) -> Iterator[None]:
    """A context in which the text encoder gives tokens of images their positions in rows and columns.

    It was trained so. In transformers 5 it has to be told which tokens these are, and the pipeline of diffusers
    0.42 does not: it then counts them as words (https://github.com/huggingface/diffusers/issues/14194).
    """

    def with_types(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids = kwargs["input_ids"]
        types = torch.tensor(processor.create_mm_token_type_ids(ids.tolist()), device=ids.device)
        return args, {"mm_token_type_ids": types, **kwargs}

    hook = text_encoder.register_forward_pre_hook(with_types, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
