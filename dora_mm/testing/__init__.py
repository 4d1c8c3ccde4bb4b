"""Checks of families of models, also of other packages: `check_image_family` and `check_vl_family`."""

from dora_mm.testing.image_family import check_image_family
from dora_mm.testing.vl_family import check_vl_family

__all__ = ["check_image_family", "check_vl_family"]
