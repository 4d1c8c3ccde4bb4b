"""The part of the embedded vision-language model that is trained here: the end of its tower, and the projector.

EfficientNet-Lite0 was trained to name one object. Its last stage loses what scenes are about: in features of the last
layer, at an object's centre, a linear probe finds 75 % of the colours and 87 % of the names; one stage before it finds
89 % and 97 %. FastVLM reads the last layer only. So the last stage is trained along with the projector.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

GRID = 7  # features of an image, along each side


class VisionEnd(nn.Module):
    """The tower's last stage and the projector of a FastVLM model, whose own modules they are.

    Args:
        model: A FastVlmForConditionalGeneration with an EfficientNet of timm.
    """

    def __init__(self, model: Any):
        super().__init__()
        tower = model.model.vision_tower.timm_model
        self.stage, self.conv_head, self.bn2 = tower.blocks[-1], tower.conv_head, tower.bn2
        self.projector = model.model.multi_modal_projector

    def train(self, mode: bool = True) -> "VisionEnd":
        """Batch normalization keeps its running statistics; nothing else here depends on the mode."""
        return super().train(False)

    def forward(self, features_BNC: Tensor) -> Tensor:
        """Features of the stage before (B, 49, channels) -> tokens of the language model (B, 49, D)."""
        features = features_BNC.transpose(1, 2).unflatten(2, (GRID, GRID)).contiguous(memory_format=torch.channels_last)
        return self.projector(self.bn2(self.conv_head(self.stage(features))).flatten(2).transpose(1, 2))


@torch.no_grad()
def features_before(model: Any, images: Iterable[Image.Image]) -> np.ndarray:
    """The features (B, 49, channels) that VisionEnd takes, in half precision.

    Args:
        model: A FastVlmForConditionalGeneration with an EfficientNet of timm.
        images: RGB images of 224 x 224 pixels.
    """
    tower = model.model.vision_tower.timm_model
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    features = tower.bn1(tower.conv_stem((pixels / 127.5 - 1).contiguous(memory_format=torch.channels_last)))
    for stage in tower.blocks[:-1]:
        features = stage(features)
    return features.flatten(2).transpose(1, 2).half().numpy()
