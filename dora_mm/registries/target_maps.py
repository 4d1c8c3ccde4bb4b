"""The target maps by name: where each is, the models that it is for, and the words of its parts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from dora_mm.registries.registry import Registry


@dataclass(frozen=True)
class TargetMapRecord:
    """A target map, as far as it is known before torch is imported.

    Attributes:
        import_path: The `TargetMap`, as `module:object`.
        models: The models that it is for: model types of transformers, or classes of diffusers. A class of another
            package is `module:class`.
        parts: The names of its parts, all of them.
        networks: For image models, the networks of a pipeline that it can be for: a config names its parts
            `<network>.<part>`. Empty for vision-language and language models, whose parts keep their names.
    """

    import_path: str
    models: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names that configs have for its parts."""
        return tuple(f"{network}.{part}" for network in self.networks for part in self.parts) or self.parts


DERIVED_PARTS = (  # of a map that is derived from the structure of a model
    *("text.attn", "text.mlp", "text.experts", "cross", "vision.attn", "vision.mlp", "vision.experts", "connector"),
)
DECODERS = {  # the model types of decoder language models whose layers have the same names, by one of them
    "llama": """
        cohere cohere2 cwm diffllama ernie4_5 exaone4 gemma gemma2 gemma3_text granite helium llama ministral
        ministral3 mistral olmo olmo2 olmo3 qwen2 qwen2_vl_text qwen2_5_vl_text qwen3 qwen3_vl_text seed_oss
        smollm3 stablelm vaultgemma
    """,
    "nemotron": "apertus arcee jais2 nemotron",
    "glm": "glm glm4",
    "phi3": "phi3",
    "phi": "phi",
    "nanochat": "nanochat",
    "starcoder2": "starcoder2",
    "persimmon": "persimmon",
    "gpt_neox": "gpt_neox gpt_neox_japanese",
    "bloom": "bloom falcon",
    "gpt2": "gpt2 gpt_bigcode openai-gpt",
    "gpt_neo": "gpt_neo",
    "gptj": "gptj",
    "codegen": "codegen",
    "mpt": "mpt",
    "xglm": "biogpt xglm",
    "opt": "opt",
}
MIXTURES = (  # of experts
    *("cohere2_moe", "flex_olmo", "gpt_oss", "granitemoe", "minimax_m2", "mixtral"),
    *("olmoe", "phimoe", "qwen2_moe", "qwen3_moe"),
)

_TARGETS = "dora_mm.targets"
_TEXT, _VISION = ("text.attn", "text.mlp"), ("vision.attn", "vision.mlp")
_ENCODERS, _TRANSFORMER = ("text_encoder", "text_encoder_2"), ("transformer",)
_BLOCKS = ("attn", "ff", "mod")  # mod: shifts, scales and gates from the time
TARGET_MAPS: Registry[TargetMapRecord] = Registry(
    "target_maps",
    "target map",
    {
        "sdxl-unet": TargetMapRecord(
            f"{_TARGETS}.sdxl:UNET", ("UNet2DConditionModel",), ("attn", "cross", "ff", "conv"), ("unet",)
        ),
        "clip-text": TargetMapRecord(f"{_TARGETS}.clip:TEXT", ("clip_text_model",), ("attn", "ff"), _ENCODERS),
        "bart": TargetMapRecord(
            f"{_TARGETS}.bart:BART",
            ("bart", "vl_bart"),
            ("text.qv", "text.ko", "text.mlp", "cross.qv", "cross.ko"),
        ),
        "open-clip-visual": TargetMapRecord(f"{_TARGETS}.open_clip:VISUAL", parts=_VISION),
        "timm-vit": TargetMapRecord(f"{_TARGETS}.timm_vit:VIT", parts=_VISION),
        "llm": TargetMapRecord(
            f"{_TARGETS}.decoders:DECODER", tuple(name for names in DECODERS.values() for name in names.split()), _TEXT
        ),
        "llm-moe": TargetMapRecord(f"{_TARGETS}.decoders:MIXTURE", MIXTURES, ("text.attn", "text.experts")),
        "t5": TargetMapRecord(f"{_TARGETS}.t5:T5", ("t5", "mt5", "umt5"), (*_TEXT, "cross")),
        "flux": TargetMapRecord(f"{_TARGETS}.flux:FLUX", ("FluxTransformer2DModel",), _BLOCKS, _TRANSFORMER),
        "flux2": TargetMapRecord(f"{_TARGETS}.flux:FLUX2", ("Flux2Transformer2DModel",), _BLOCKS, _TRANSFORMER),
        "sd3": TargetMapRecord(f"{_TARGETS}.sd3:SD3", ("SD3Transformer2DModel",), _BLOCKS, _TRANSFORMER),
        "qwen-image": TargetMapRecord(
            f"{_TARGETS}.qwen_image:QWEN_IMAGE", ("QwenImageTransformer2DModel",), _BLOCKS, _TRANSFORMER
        ),
        "qwen-image-21": TargetMapRecord(
            f"{_TARGETS}.qwen_image:QWEN_IMAGE_21",
            ("QwenImage21Transformer2DModel",),
            ("attn", "ff", "text", "mod"),
            _TRANSFORMER,
        ),
        "krea2": TargetMapRecord(
            f"{_TARGETS}.krea2:KREA2", ("Krea2Transformer2DModel",), ("attn", "ff", "text", "mod"), _TRANSFORMER
        ),
        "z-image": TargetMapRecord(f"{_TARGETS}.z_image:Z_IMAGE", ("ZImageTransformer2DModel",), _BLOCKS, _TRANSFORMER),
    },
)


def map_for(names: Collection[str]) -> str | None:
    """The name of the target map of a model, by its model type and the name of its class; None: it has none."""
    return TARGET_MAPS.first(lambda record: any(model.rpartition(":")[2] in names for model in record.models))


def outside_class(name: str) -> str | None:
    """The import path of a class of another package by its name, from the record of its target map; else None."""
    models = TARGET_MAPS[found].models if (found := map_for([name])) else ()
    return next((model for model in models if model.endswith(f":{name}")), None)
