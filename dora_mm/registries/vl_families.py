"""The families of vision-language models, as far as they are known before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dora_mm.registries.registry import Registry


@dataclass(frozen=True)
class VLFamily:
    """A family of vision-language models. Its name is the value of `model.family` in the config.

    Attributes:
        title: Its name in messages.
        import_path: Its class, which implements `VLModel`, as `module:class`.
        section: The class of its `model` section, a subclass of `VLFamilyConfig`, likewise.
        model_types: What `model_type` is in the config.json of folders that no other family reads.
        starts: The configs that `dora-mm new` starts from, by the GB of the GPU that each needs.
    """

    title: str
    import_path: str
    section: str
    model_types: tuple[str, ...] = ()
    starts: Mapping[int, str] = field(default_factory=dict)


DEFAULT = "vlm"  # of a config that names none
VL_FAMILIES: Registry[VLFamily] = Registry(
    "vl_families",
    "family of vision-language models",
    {
        DEFAULT: VLFamily(
            title="model of transformers",
            import_path="dora_mm.models.vl.vlm.family:VLM",
            section="dora_mm.config.models:VLMModelConfig",
            starts={
                5: "configs/vlm/smolvlm_256m.yaml",
                9: "configs/vlm/lfm2_vl_1_6b.yaml",
                15: "configs/vlm/gemma3_4b.yaml",
                24: "configs/vlm/qwen2_5_vl_7b.yaml",
                25: "configs/vlm/qwen3_vl_8b.yaml",
            },
        ),
        "vl_bart": VLFamily(
            title="VL-BART",
            import_path="dora_mm.models.vl.vl_bart.family:VLBartModel",
            section="dora_mm.config.models:VLBartModelConfig",
            model_types=("vl_bart",),
        ),
    },
)
