"""Vision towers of open_clip and timm."""
