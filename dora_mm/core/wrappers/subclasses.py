"""Subclasses of layers that can be adapted: those that keep `forward` of the known class, and those named here."""

from __future__ import annotations

import functools

from torch import Tensor, nn

from dora_mm.core.adapted import AdaptedLayer, has_dense_weight
from dora_mm.core.layer import DoRAConv1d, DoRAConv2d, DoRAConv3d, DoRAEmbedding, DoRALinear
from dora_mm.core.ops import LINEAR

KNOWN = {kind.base_class: kind for kind in (DoRALinear, DoRAConv1d, DoRAConv2d, DoRAConv3d, DoRAEmbedding)}


class DoRABiasLast(DoRALinear):
    """An adapted Linear that rounds x W^T before it adds the bias, as code that computes `x @ W.T + b` does."""

    def forward(self, input: Tensor) -> Tensor:
        if self.is_base():
            return super().forward(input)
        y = self.adapted_product(input, LINEAR, use_bias=False)
        return y if self.bias is None else y + self.bias


# Classes with a `forward` of their own, by package. An adapted layer computes what their `forward` does with another
# weight. (transformers 5.24, diffusers 0.42, timm 1.0.31; tests/core/wrappers compares them.)

# All that they do with the weight is `super().forward`: they scale what it returns, say, or pad its input.
CALLS_SUPER = {
    "transformers": {
        "ScaledWordEmbedding": "Bart BigBirdPegasus BioGpt Blenderbot M2M100 MBart MiniCPM3 NllbMoe PLBart "
        "PPFormulaNet PegasusX SeamlessM4T SeamlessM4Tv2 TrOCR XGLM",
        "TextScaledWordEmbedding": "DiffusionGemma EmbeddingGemma2 Gemma Gemma2 Gemma3 Gemma3n Gemma4 Gemma4Unified "
        "T5Gemma2 VaultGemma",
        "NormedEmbedding": "Inkling Inkling2 Inkling2Loop MuseGlimmerText MuseSparkText",
        "LearnedPositionalEmbedding": "Bart BigBirdPegasus BioGpt Blenderbot BlenderbotSmall LED MBart Mvp OPT PLBart "
        "PPFormulaNet TrOCR",
        "SinusoidalPositionalEmbedding": "Autoformer Informer Marian Pegasus RoFormer TimeSeries",
        "CausalConv1d": "Gemma4Audio MoonshineStreaming MuseSparkAudio NemotronAsrStreamingEncoder VoxtralRealtime",
        "CausalConv2D": "NemotronAsrStreamingEncoder",
        "LMHead": "Dory",
    },
    "diffusers": {
        "CausalConv3d": "Cosmos QwenImage QwenImage21 Wan",
        "SafeConv3d": "CogVideoX KVAE Kandinsky6SR",
        "LatentUpscalerConv3d": "Kandinsky6SR",
        "CompatibleLinear": "LoRA",
    },
}
# They compute what the adapted class does, which is called instead.
REPLACED: dict[tuple[str, str], type[AdaptedLayer]] = {
    ("transformers", "FalconLinear"): DoRABiasLast,
    ("timm", "Linear"): DoRALinear,
}


def calls_super(package: str, name: str) -> bool:
    """Whether CALLS_SUPER has a class."""
    endings = CALLS_SUPER.get(package, {}).items()
    return any(name.endswith(end) and name.removesuffix(end) in starts.split() for end, starts in endings)


def class_for_subclass(layer: nn.Module) -> type[AdaptedLayer] | None:
    """The adapted class for a layer of a subclass of a known class; None where the table lacks it.

    It may compute something else with its weight than the known class does.
    """
    base = type(layer)
    known = next((kind for kind in KNOWN if isinstance(layer, kind)), None)
    if known is None or base is known or not has_dense_weight(layer):
        return None
    if "weight" not in layer._parameters:
        return KNOWN[known]  # a weight_norm, say, which `why_not` refuses with its reason
    if getattr(base, "_conv_forward", None) is not getattr(known, "_conv_forward", None):
        return None  # what a convolution calls with its weight
    if base.forward is known.forward:
        return subclass(KNOWN[known], base)
    package = base.__module__.partition(".")[0]
    if calls_super(package, base.__name__):
        return subclass(base, KNOWN[known])
    replacement = REPLACED.get((package, base.__name__))
    return None if replacement is None else subclass(replacement, base)


@functools.cache
def subclass(first: type[nn.Module], second: type[nn.Module]) -> type[AdaptedLayer]:
    """An adapted class of two: an AdaptedLayer and another class of layers, or `TrainedWeight` and an AdaptedLayer.

    `super().forward` of the first one calls the second one's.
    """
    base = second if issubclass(first, AdaptedLayer) else first

    def reduce(self, protocol):  # such a class cannot be found by its name
        return new_layer, (first, second), self.__dict__

    return type(f"DoRA{base.__name__.removeprefix('DoRA')}", (first, second), {"__reduce_ex__": reduce})  # pyright: ignore[reportReturnType]


def new_layer(first: type[nn.Module], second: type[nn.Module]) -> AdaptedLayer:
    """An empty layer of a `subclass`, for unpickling and copying."""
    kind = subclass(first, second)
    return kind.__new__(kind)
