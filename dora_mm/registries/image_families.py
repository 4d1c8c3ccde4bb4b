"""The families of image models, as far as they are known before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dora_mm.registries.registry import Registry


@dataclass(frozen=True)
class ImageFamily:
    """A family of image models. Its name is the key of its section in the config.

    Attributes:
        title: Its name in messages.
        import_path: Its class, a subclass of `ImageModel`, as `module:class`.
        section: The class of its section, a subclass of `ImageFamilyConfig`, likewise.
        pipeline: The class of diffusers that the index of its models names.
        tensors: Each is the beginning of the name of a tensor in its single checkpoints; empty: these are not read.
        denoiser: Beginnings of names of tensors: files with its denoiser alone have one of them; empty: not known.
        edits: Whether it takes reference images: its class is an `EditingModel`.
        target_map: The target map of its denoiser, by which configs of other families are told; empty: not known.
        starts: The configs that `dora-mm new` starts from, by the GB of the GPU that each needs; 0: for a small model.
        example: What builds a small model with random weights for `dora-mm example`, as `module:function`; empty: none.
    """

    title: str
    import_path: str
    section: str
    pipeline: str
    tensors: tuple[str, ...] = ()
    denoiser: tuple[str, ...] = ()
    edits: bool = False
    target_map: str = ""
    starts: Mapping[int, str] = field(default_factory=dict)
    example: str = ""

    def is_checkpoint(self, names: Sequence[str]) -> bool:
        """Whether the tensors of a file, by their names, are those of a single checkpoint of the family."""
        return bool(self.tensors) and all(any(name.startswith(start) for name in names) for start in self.tensors)


IMAGE_FAMILIES: Registry[ImageFamily] = Registry(
    "image_families",
    "family of image models",
    {
        "sdxl": ImageFamily(
            title="SDXL",
            import_path="dora_mm.models.images.sdxl.family:SDXL",
            section="dora_mm.config.models:SDXLConfig",
            pipeline="StableDiffusionXLPipeline",
            tensors=("model.diffusion_model.label_emb.", "conditioner.embedders.1."),
            target_map="sdxl-unet",
            starts={
                0: "configs/sdxl/tiny_3d_icon.yaml",
                8: "configs/sdxl/3d_icon_8gb.yaml",
                12: "configs/sdxl/3d_icon_12gb.yaml",
                16: "configs/sdxl/3d_icon_16gb.yaml",
                24: "configs/sdxl/3d_icon_24gb.yaml",
            },
            example="dora_mm.models.images.sdxl.random_weights:build_example",
        ),
        "z_image": ImageFamily(
            title="Z-Image",
            import_path="dora_mm.models.images.z_image:ZImage",
            section="dora_mm.config.models:ZImageConfig",
            pipeline="ZImagePipeline",
            denoiser=("noise_refiner.",),
            target_map="z-image",
            starts={
                8: "configs/z_image/style_8gb.yaml",
                12: "configs/z_image/style_12gb.yaml",
                24: "configs/z_image/style.yaml",
            },
        ),
        "flux2_klein": ImageFamily(
            title="FLUX.2 klein",
            import_path="dora_mm.models.images.flux2_klein:Flux2Klein",
            section="dora_mm.config.models:Flux2KleinConfig",
            pipeline="Flux2KleinPipeline",
            denoiser=("double_stream_modulation_img.",),
            edits=True,
            target_map="flux2",
            starts={
                8: "configs/flux2_klein/style_8gb.yaml",
                12: "configs/flux2_klein/style_12gb.yaml",
                16: "configs/flux2_klein/style.yaml",
            },
        ),
        "qwen_image": ImageFamily(
            title="Qwen-Image",
            import_path="dora_mm.models.images.qwen_image:QwenImage",
            section="dora_mm.config.models:QwenImageConfig",
            pipeline="QwenImagePipeline",
            denoiser=("transformer_blocks.0.img_mod.1.",),
            target_map="qwen-image",
            starts={
                8: "configs/qwen_image/style_8gb.yaml",
                24: "configs/qwen_image/style_24gb.yaml",
                32: "configs/qwen_image/style_32gb.yaml",
                48: "configs/qwen_image/style.yaml",
            },
        ),
        "qwen_image_edit": ImageFamily(
            title="Qwen-Image-Edit",
            import_path="dora_mm.models.images.qwen_image_edit:QwenImageEdit",
            section="dora_mm.config.models:QwenImageEditConfig",
            pipeline="QwenImageEditPlusPipeline",
            edits=True,
            target_map="qwen-image",
            starts={
                12: "configs/qwen_image_edit/edit_12gb.yaml",
                24: "configs/qwen_image_edit/edit_24gb.yaml",
                48: "configs/qwen_image_edit/edit_48gb.yaml",
                80: "configs/qwen_image_edit/edit.yaml",
            },
        ),
        "qwen_image_21": ImageFamily(
            title="Qwen-Image-2.1",
            import_path="dora_mm.models.images.qwen_image_21:QwenImage21",
            section="dora_mm.config.models:QwenImage21Config",
            pipeline="QwenImage21Pipeline",
            denoiser=("transformer_blocks.0.img_mlp.gate_",),
            edits=True,
            target_map="qwen-image-21",
            starts={12: "configs/qwen_image_21/style_12gb.yaml", 24: "configs/qwen_image_21/style.yaml"},
        ),
        "krea2": ImageFamily(
            title="Krea 2",
            import_path="dora_mm.models.images.krea2:Krea2",
            section="dora_mm.config.models:Krea2Config",
            pipeline="Krea2Pipeline",
            denoiser=("txtfusion.", "text_fusion."),  # of its authors' files, and of diffusers
            target_map="krea2",
            starts={
                12: "configs/krea2/style_12gb.yaml",
                16: "configs/krea2/style_16gb.yaml",
                24: "configs/krea2/style_24gb.yaml",
                32: "configs/krea2/style.yaml",
            },
        ),
        "sd3": ImageFamily(
            title="Stable Diffusion 3",
            import_path="dora_mm.models.images.sd3:StableDiffusion3",
            section="dora_mm.config.models:StableDiffusion3Config",
            pipeline="StableDiffusion3Pipeline",
            target_map="sd3",
            starts={8: "configs/sd3/style_8gb.yaml", 16: "configs/sd3/style.yaml"},
        ),
    },
)
