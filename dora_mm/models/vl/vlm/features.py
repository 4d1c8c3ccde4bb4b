"""How many features a model makes of images, by the sizes that its processor found: so many tokens stand for them.

Of the classes that are not listed here the number does not depend on such sizes, or on more than these: most read
tiles of one size, each of which has the same number of features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dora_mm.utils.messages import first_line

GRIDS = (  # patches that an image has (frames, rows, columns), of which each square becomes one feature
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp"),
    *("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "glm4v", "glm4v_moe", "glm46v", "glm_ocr", "glm5_next"),
    *("cohere_compass", "cosmos3_edge", "cosmos3_omni", "dots3_note", "ernie4_5_vl_moe", "exaone4_5"),
    *("hyperclovax_vision_v2", "kimi_k25", "lfm3_vl", "minimax_m3_vl", "muse_glimmer", "muse_spark", "paddleocr_vl"),
)
ROWS = {"hunyuan_vl": 2, "hy_v4_vl": 0}  # the same, with one more at the end of each row, and so many around an image
SHAPES = ("lfm2_vl",)  # the same, of each tile (rows, columns)
SIZES = ("mistral3", "mistral_large4", "lighton_ocr")  # pixels (height, width)
SEVERAL = ("mistral3", "mistral_large4")  # which take a single feature, of all images of a batch, for a list of numbers
MERGED = ("spatial_merge_size", "downsample_factor", "merge_size", "merge_kernel_size")  # the side of a square


def features_of(config: Any, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """The number of features that a model makes of each image, or each tile of one, of a row.

    Args:
        config: The config of the model.
        inputs: What its processor made of the row.

    Returns:
        The numbers (N,); None where they are not known, or the row has no images.
    """
    if config.model_type in GRIDS and "image_grid_thw" in inputs:
        grids = inputs["image_grid_thw"]
        return grids[:, 0] * (grids[:, 1:] // _merged(config)).prod(1)
    if config.model_type in ROWS and "image_grid_thw" in inputs:
        num_frames, rows, columns = (inputs["image_grid_thw"] // torch.tensor([1, _merged(config), _merged(config)])).T
        return num_frames * rows * (columns + 1) + ROWS[config.model_type]
    if config.model_type in SHAPES and "spatial_shapes" in inputs:
        return (inputs["spatial_shapes"] // _merged(config)).prod(1)
    if config.model_type in SIZES and "image_sizes" in inputs:
        return (inputs["image_sizes"] // config.vision_config.patch_size // _merged(config)).prod(1)
    return None


def _merged(config: Any) -> int:
    found = (getattr(part, name, None) for part in (config, config.vision_config) for name in MERGED)
    side = next(value for value in found if value is not None)
    return side if isinstance(side, int) else side[0]


def check_features(config: Any, inputs: Mapping[str, Tensor]) -> None:
    """Checks that a row has as many tokens for its images as the model makes features of them.

    The model checks it, too, but in its forward pass, when a row cannot be left out any more, and other processes wait.

    Raises:
        ValueError: It has more or fewer, or an image is too small for the model, or has more patches than its
            processor marks.
    """
    check_marked(config, inputs)
    try:
        features = features_of(config, inputs)
    except (RuntimeError, ArithmeticError, TypeError, LookupError) as error:  # as sizes of 0 in a config bring
        raise ValueError(f"the model's config does not fit its images ({first_line(error)})") from error
    if features is None:
        return
    tokens, count = int((inputs["input_ids"] == config.image_token_id).sum()), int(features.sum())
    if tokens != count:
        raise ValueError(
            f"the model's processor writes {tokens:,} tokens for its images, of which the model makes {count:,} "
            "features: give them another shape, or leave the row out"
        )
    if not features.all() or (count == 1 and config.model_type in SEVERAL):
        raise ValueError("one of its images has fewer pixels than the model needs: enlarge it, or leave the row out")


def check_marked(config: Any, inputs: Mapping[str, Tensor]) -> None:
    """Checks that the mask of patches, of classes that have one, is as long as the patches of an image.

    LFM2-VL's processor pads images to the most patches that it expects, and leaves longer ones, such as those of narrow
    strips, as they are.

    Raises:
        ValueError: The two lengths differ.
    """
    if config.model_type not in SHAPES or "pixel_attention_mask" not in inputs:
        return
    patches, marked = inputs["pixel_values"].shape[1], inputs["pixel_attention_mask"].shape[1]
    if patches != marked:
        raise ValueError(
            f"the model's processor makes {patches:,} patches of its image, and marks {marked:,}: give it another "
            "shape, or leave the row out"
        )
