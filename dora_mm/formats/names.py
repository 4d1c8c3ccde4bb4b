"""Names of modules: how each tool spells them in adapter files, and the neutral name that all of them stand for."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple


class Name(NamedTuple):
    """A module by its neutral name.

    Attributes:
        component: `unet`, `transformer`, `text_encoder`, `text_encoder_2`, or `model` where there is only one.
        path: The path that diffusers or transformers gives it. In text encoders it begins with `text_model.`, whether
            or not the installed transformers has that prefix; `text_projection` does not.
    """

    component: str
    path: str


@dataclass(frozen=True)
class Target:
    """What a module name in a file stands for.

    Attributes:
        names: One module; or several whose rows the file stacks in this order (a fused projection).
        modulation: Whether the module computes shifts and scales, whose two halves of rows change places between the
            layouts where it has 2 I rows.
    """

    names: tuple[Name, ...]
    modulation: bool = False

    def rows(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """The number of rows of each module, in the order of `names`.

        Args:
            out_features: The rows of the fused weight.
            in_features: The columns of the weight.

        Raises:
            ValueError: The rows cannot be divided like this.
        """
        raise NotImplementedError


class Names:
    """Translates the module names of one adapter file.

    Args:
        known: The names of the modules of the base model. They decide where an underscored name has several readings,
            and a name that is not among them is refused. Without them, tables of the known architectures decide.
        architecture: `sdxl`, `sd1`, `flux`, `flux2`, `sd3` or `z-image`: whose own layout is read and written where
            `known` does not tell.
    """

    def __init__(self, known: Iterable[Name] = (), architecture: str | None = None): ...

    def read(self, key: str) -> Target:
        """The modules that a module name of a file stands for.

        Args:
            key: The key in the file without the name of the tensor: `lora_unet_input_blocks_4_1_proj_in` of
                `lora_unet_input_blocks_4_1_proj_in.lora_down.weight`. Any spelling is accepted.

        Raises:
            ValueError: There is no such module; the message has the nearest known names.
        """
        raise NotImplementedError

    def write(self, names: Collection[Name], spelling: str) -> dict[str, Target]:
        """The module names of a file.

        Args:
            names: The modules to write.
            spelling: One of `SPELLINGS`.

        Returns:
            By the name in the file: the modules that it holds. A fused one lists all modules that it consists of, in the
            order of its rows, also those that are not in `names`: see `fused.untouched`.

        Raises:
            ValueError: The spelling has no name for a module.
        """
        raise NotImplementedError


SPELLINGS: tuple[str, ...] = (
    "diffusers",  # unet.<path>, transformer.<path>, text_encoder.text_model...
    "peft",  # base_model.model.<path>, of one component
    "kohya",  # lora_unet_<own path>, lora_te1_, lora_te2_: SGM's names for SDXL, fused projections for Flux and SD3
    "kohya-diffusers",  # lora_unet_<diffusers path>, lora_te1_, lora_te2_
    "lycoris",  # lycoris_<diffusers path>, of one component
    "comfy",  # diffusion_model.<own path>, text_encoders.clip_l.transformer.<path>
)


def canonical(component: str, path: str) -> Name:
    """The neutral name of a module that diffusers or transformers calls `path`, with or without `text_model.`."""
    raise NotImplementedError
