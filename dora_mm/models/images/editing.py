"""The seam of models that edit: what training and sampling need of a family that takes reference images.

Sizes are (height, width) in pixels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from PIL import Image, ImageOps
from torch import Tensor

from dora_mm.data.images.buckets import Framing, Size
from dora_mm.data.syntax import Wording
from dora_mm.models.images.flow_model import FlowModel
from dora_mm.models.images.image_model import Prompt


class EditingModel(FlowModel):
    """A flow model whose denoiser sees latents of reference images beside those that it denoises.

    An area, in pixels, is that to which a larger reference is scaled down before the pipeline's own rule; None: by
    that rule alone.
    """

    most_references: ClassVar[int] = 10  # of an image
    smallest_reference: ClassVar[int] = 1  # pixels, the shorter side
    longest_reference: ClassVar[float] = float("inf")  # the longer side by the shorter one
    needs_references: ClassVar[bool] = False  # whether it makes no images of text alone
    prompts_see_references: ClassVar[bool] = False  # whether its text encoder sees them beside the prompt
    scales_references_up: ClassVar[bool] = False  # whether its pipeline does, so that no area makes them smaller
    pixels_per_token: ClassVar[int] = 16  # along one side
    references_have_alpha: ClassVar[bool] = False  # whether it takes them as RGBA; else they are RGB on white

    @abstractmethod
    def reference_size(self, size: Size, area: int | None = None) -> Size:
        """The size at which the VAE sees a reference."""

    @abstractmethod
    def prepared_size(self, size: Size, area: int | None = None) -> Size:
        """The size of a reference that `prepare_reference` returns."""

    @abstractmethod
    def scaled_reference(self, image: Image.Image, area: int) -> Image.Image:
        """A reference that is scaled down to an area where it is larger, as the pipeline scales."""

    def prepare_reference(self, image: Image.Image, area: int | None = None, *, flip: bool = False) -> Image.Image:
        """A reference as the pipeline is given it."""
        image = self.scaled_reference(image, area) if area else image
        return ImageOps.mirror(image) if flip else image

    @abstractmethod
    def reference_pixels(self, image: Image.Image) -> Tensor:
        """The pixels of a prepared reference as the pipeline has them, of its size there.

        Returns:
            (1, 3, H, W) in [-1, 1], or (1, 4, H, W) with alpha.
        """

    def why_not_reference(self, size: Size) -> str | None:
        """Why the pipeline does not take a prepared reference of a size; None: it does."""
        shorter, longer = sorted(size)
        if shorter < self.smallest_reference:
            return f"is {size[1]} x {size[0]}, and {self.title} takes no side below {self.smallest_reference} pixels"
        if longer > self.longest_reference * shorter:
            return f"is {size[1]} x {size[0]}, and {self.title} takes no ratio above {self.longest_reference:g} : 1"
        return None

    def predict(self, noised: Tensor, time: Tensor, prompts: Sequence[Prompt], framings: Sequence[Framing]) -> Tensor:
        return self.predict_edit(noised, time, prompts, framings, ())

    @abstractmethod
    def predict_edit(
        self,
        noised: Tensor,
        time: Tensor,
        prompts: Sequence[Prompt],
        framings: Sequence[Framing],
        references: Sequence[Tensor],
    ) -> Tensor:
        """As `predict`, beside references: normalized latents (B, C, h, w), each of one reference of every image."""

    def encode_edit_prompts(self, prompts: Sequence[str], references: Sequence[Sequence[Image.Image]]) -> list[Prompt]:
        """Encodes prompts beside the prepared references of each, of a family whose `prompts_see_references`."""
        return self.encode_prompts(prompts)

    def encode_edit_for_sampling(
        self, prompt: Wording, negative_prompt: Wording | None, references: Sequence[Image.Image]
    ) -> Prompt:
        """As `encode_for_sampling`, beside prepared references."""
        assert isinstance(prompt, str)  # it does not `weigh_words`
        assert not isinstance(negative_prompt, tuple)
        encoded, negative = self.encode_edit_prompts([prompt, negative_prompt or ""], [references, references])
        return {**encoded, **{f"negative_{name}": tensor for name, tensor in negative.items()}}

    @abstractmethod
    def edited_size(self, references: Sequence[Size]) -> Size:
        """The size of an image that is given none, from those of its prepared references."""

    def reference_inputs(self, references: Sequence[Image.Image]) -> dict[str, Any]:
        """The arguments of the pipeline for prepared references, which all images of the batch have."""
        return {"image": list(references)}
