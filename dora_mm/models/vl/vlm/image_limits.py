"""How large the images of a model may be, which decides on the number of their tokens: keys of the `model` section.

Which keys a processor takes follows from the settings that it has. Squares of one size are what most towers read, since
they have a position for each patch: such a size cannot be changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from dora_mm.config.models import VLMModelConfig

TILES = (
    "max_num_tiles",
    "max_slice_nums",
    "max_tiles",
    "max_crops",
    "dynamic_hd",
)  # attributes that bound the number of tiles
SOFT_TOKENS = (70, 140, 280, 560, 1120)  # that an image of Gemma 4 may have


def set_limits(processor: Any, config: VLMModelConfig, model_config: Any) -> None:
    """Applies the keys of a config for the sizes of images to a processor.

    Args:
        processor: The processor.
        config: The `model` section.
        model_config: The model's own config.

    Raises:
        ValueError: The processor does not take a key, or not with this value; the message says what it takes.
    """
    images, given = processor.image_processor, limits_in(config)
    if images is None:
        if given:
            raise ValueError(f"model.{next(iter(given))}: {config.path} reads no images: leave it out")
        return
    known, kind = limits_of(processor, model_config), type(images).__name__
    for key, value in given.items():
        if key not in known:
            others = " or ".join(f"model.{name}" for name in known)
            raise ValueError(
                f"model.{key}: the images of {config.path} {_why_not(key, images)}; its processor, a {kind}, takes "
                + (f"{others} instead" if others else "no other size")
            )
        known[key](value)


def limits_in(config: VLMModelConfig) -> dict[str, int]:
    """The keys for the sizes of images that a config sets, with their values."""
    values = {
        "image_size": config.image_size,
        "min_pixels": config.min_pixels,
        "max_pixels": config.max_pixels,
        "max_tiles": config.max_tiles,
    }
    return {key: value for key, value in values.items() if value is not None}


def limits_of(processor: Any, model_config: Any) -> dict[str, Callable[[int], None]]:
    """The keys that a processor takes, each with what sets it.

    Args:
        processor: The processor.
        model_config: The config of its model.
    """
    images = processor.image_processor
    size = dict(images.size or {})
    found: dict[str, Callable[[int], None]] = {}
    if set_tokens := _token_limit(processor):
        found["max_pixels"] = set_tokens
    elif {"shortest_edge", "longest_edge"} <= size.keys() and hasattr(
        images, "merge_size"
    ):  # areas, whatever their names
        found["max_pixels"] = lambda value: _set_size(images, longest_edge=value)
        found["min_pixels"] = lambda value: _set_size(images, shortest_edge=value)
    elif {"min_pixels", "max_pixels"} <= size.keys():
        found["max_pixels"] = lambda value: _set_pixels(images, "max_pixels", value)
        found["min_pixels"] = lambda value: _set_pixels(images, "min_pixels", value)
    elif "longest_edge" in size:
        found["image_size"] = lambda value: _set_longest(images, value)
    elif model_config is not None and model_config.model_type == "fast_vlm":  # whose tower has convolutions alone
        found["image_size"] = lambda value: _set_square(images, value, processor.patch_size)
    if name := tile_limit(processor):
        found["max_tiles"] = lambda value: _set_tiles(images, name, value)
    elif getattr(images, "image_grid_pinpoints", None):
        found["max_tiles"] = lambda value: _set_grid(images, value)
    return found


def tile_limit(processor: Any) -> str | None:
    """The setting of an image processor that bounds its number of tiles; None: it has none, or cuts no tiles.

    Mllama's is not one: the numbers of its embeddings of shapes depend on it.
    """
    images = processor.image_processor
    cuts = getattr(processor, "images_kwargs", {}).get("crop_to_patches", getattr(images, "crop_to_patches", None))
    if hasattr(images, "max_patches") and (cuts or hasattr(images, "resize_to_max_canvas")):
        return "max_patches"
    return next((name for name in TILES if getattr(images, name, None) is not None), None)


def in_fewest_tiles(processor: Any, model_config: Any) -> None:
    """Makes a processor cut no image into more tiles than it has to: each is a pass of the tower."""
    known, tile = limits_of(processor, model_config), getattr(processor.image_processor, "max_image_size", None)
    if tile_limit(processor):
        known["max_tiles"](1)
    elif tile and "image_size" in known:  # larger images are cut into tiles of this side (Idefics3, SmolVLM)
        known["image_size"](dict(tile)["longest_edge"])


def within(grid: Sequence[Sequence[int]], tile: int, max_tiles: int) -> list[list[int]]:
    """The sizes of a grid that have at most so many tiles.

    Raises:
        ValueError: None has.
    """
    kept = [list(sizes) for sizes in grid if prod(sizes) <= max_tiles * tile * tile]
    if not kept:
        fewest = min(prod(sizes) for sizes in grid) // (tile * tile)
        raise ValueError(f"model.max_tiles {max_tiles}: an image of this model has at least {fewest} tiles")
    return kept


def limited_grid(model_config: Any, max_tiles: int | None) -> list[list[int]] | None:
    """The grid of a model's config with at most so many tiles, as its processor's; None: it has none, or no limit."""
    grid = getattr(model_config, "image_grid_pinpoints", None)
    return within(grid, model_config.vision_config.image_size, max_tiles) if grid and max_tiles else None


def _why_not(key: str, images: Any) -> str:
    if key == "max_tiles":
        return "are not cut into tiles whose number could be limited"
    if key == "image_size":
        size = dict(images.size or {})
        fixed = size.get("height") or dict(images.crop_size or {}).get("height") or size.get("shortest_edge")
        bounded = {"shortest_edge", "longest_edge"} <= size.keys()
        return (
            "keep their shape"
            if bounded or not fixed
            else f"are squares of {fixed} pixels, which its tower has places for"
        )
    return "have a fixed size" if images.size else "have no such limit"


def _token_limit(processor: Any) -> Callable[[int], None] | None:
    """A function that sets the most tokens or patches of an image from pixels; None: there is no such setting."""
    images = processor.image_processor
    patch = next((found for name in ("encoder_patch_size", "patch_size") if (found := getattr(images, name, None))), 0)
    if not isinstance(patch, int) or not patch:
        return None
    for name, scale in (("max_image_tokens", "downsample_factor"), ("max_soft_tokens", "pooling_kernel_size")):
        if hasattr(images, name):
            side = patch * (getattr(images, scale, None) or getattr(images, "merge_size", None) or 1)
            allowed = SOFT_TOKENS if name == "max_soft_tokens" else ()
            return lambda pixels: _set_tokens(images, name, pixels, side, allowed)
    if tile_limit(processor) is None:
        for name in ("max_num_patches", "max_patches"):
            if hasattr(images, name):
                return lambda pixels: _set_tokens(images, name, pixels, patch, ())
    return None


def _set_tokens(images: Any, name: str, pixels: int, side: int, allowed: Sequence[int]) -> None:
    count = pixels // (side * side)
    least = next((found for key in ("min_image_tokens", "min_num_patches") if (found := getattr(images, key, None))), 1)
    count = max((number for number in allowed if number <= count), default=0) if allowed else count
    if count < least:
        fewest = (allowed[0] if allowed else least) * side * side
        raise ValueError(f"model.max_pixels {pixels:,}: an image of this model has at least {fewest:,} pixels")
    setattr(images, name, count)


def _set_size(images: Any, **changed: int) -> None:
    images.size = {key: value for key, value in dict(images.size).items() if value is not None} | changed


def _set_pixels(images: Any, name: str, value: int) -> None:
    _set_size(images, **{name: value})
    if hasattr(images, name):
        setattr(images, name, value)


def _set_longest(images: Any, side: int) -> None:
    shortest = dict(images.size).get("shortest_edge")
    images.size = {"longest_edge": side} | ({"shortest_edge": min(side, shortest)} if shortest else {})


def _set_square(images: Any, side: int, patch: int) -> None:
    if side % patch:
        raise ValueError(f"model.image_size {side}: the sides of this model's images are multiples of {patch}")
    images.size, images.crop_size = {"shortest_edge": side}, {"height": side, "width": side}


def _set_tiles(images: Any, name: str, count: int) -> None:
    if count < (getattr(images, "min_tiles", None) or 1):  # LFM2-VL's tiles are two at least, or there are none
        images.do_image_splitting = False
    else:
        setattr(images, name, count)


def _set_grid(images: Any, max_tiles: int) -> None:
    size = dict(images.size)
    tile = size.get("height") or size["shortest_edge"]
    images.image_grid_pinpoints = within(images.image_grid_pinpoints, tile, max_tiles)
