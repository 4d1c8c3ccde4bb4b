"""PEFT's own DoRA layers at nearly the price of its LoRA: the line over a model that PEFT has adapted, and its report.

`formula` has what is computed, `layers` PEFT's layers with it, `steps` what is computed once per optimizer step.
"""

from dora_mm.peft.fuse import FuseReport, fuse_peft, unfuse_peft
from dora_mm.peft.steps import FusePeft, fixed_norms

__all__ = ["FusePeft", "FuseReport", "fixed_norms", "fuse_peft", "unfuse_peft"]
