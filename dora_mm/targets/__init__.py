"""The target maps by name: one file per architecture, one line here."""

from dora_mm.core.targets import TargetMap
from dora_mm.targets import bart, clip, open_clip, sdxl, timm_vit

MAPS: dict[str, TargetMap] = {
    "sdxl-unet": sdxl.UNET,
    "clip-text": clip.TEXT,
    "bart": bart.BART,
    "open-clip-visual": open_clip.VISUAL,
    "timm-vit": timm_vit.VIT,
}


def find(name: str) -> TargetMap:
    """Returns the target map of this name, with all its parts.

    Raises:
        ValueError: There is none.
    """
    if name not in MAPS:
        raise ValueError(f"there is no target map {name!r}; there are {', '.join(MAPS)}")
    return MAPS[name]
