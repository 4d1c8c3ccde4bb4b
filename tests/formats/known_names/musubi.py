"""What musubi-tuner reads as it generates: the modules of its own networks that its own loaders change.

Two ways: a file is added to the weights of the checkpoint while they are read, or a network is built for it.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import nn

from tests.formats.known_names import stubs
from tests.formats.known_names.cases import Case, file_of

_FLUX = {
    **{"in_channels": 64, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0},
    **{"num_heads": 24, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True, "guidance_embed": True},
}
_SHALLOW = {"depth": 1, "depth_single_blocks": 1}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # the place of the class, and its settings
    "wan": ("wan.modules.model:WanModel", {"model_type": "i2v", "num_layers": 1, "attn_mode": "torch"}),
    "z-image": ("zimage.zimage_model:ZImageTransformer2DModel", {"n_layers": 1, "n_refiner_layers": 1}),
    "qwen-image": ("qwen_image.qwen_image_model:QwenImageTransformer2DModel", {"num_layers": 1}),
    "krea2": (
        "krea2.krea2_mmdit:SingleStreamDiT",
        {
            **{"features": 64, "tdim": 16, "txtdim": 40, "heads": 4, "multiplier": 2, "layers": 1, "patch": 2},
            **{"channels": 4, "txtlayers": 2, "txtheads": 2, "txtkvheads": 2},
        },
    ),
    "flux2": ("flux_2.flux2_models:Flux2", _SHALLOW),
    "flux": ("flux.flux_models:Flux", {**_FLUX, **_SHALLOW}),
    "hunyuan-video": (
        "hunyuan_model.models:HYVideoDiffusionTransformer",
        {
            **{"text_states_dim": 4096, "text_states_dim_2": 768, "in_channels": 16, "guidance_embed": True},
            **{"mm_double_blocks_depth": 1, "mm_single_blocks_depth": 1, "attn_mode": "torch"},
        },
    ),
}
_PARAMS = {"Flux": "FluxParams", "Flux2": "Flux2Params", "SingleStreamDiT": "SingleMMDiTConfig"}
_NETWORKS = {"flux": "lora_flux", "hunyuan-video": "lora"}  # of those that build one


class Musubi:
    """Its loaders.

    Args:
        checkout: A checkout of musubi-tuner.
    """

    layers_alone = True
    forms = ("down alpha", "down", "A")

    def __init__(self, checkout: Path):
        stubs.use(checkout, "src", stubbed=())
        self.merging = import_module("musubi_tuner.utils.lora_utils").load_safetensors_with_lora_and_fp8
        self.models = {name: _network(*place) for name, place in _MODELS.items()}

    def __call__(self, case: Case, paths: Collection[str], form: str) -> set[str]:
        """The paths of a case that it reads."""
        return {path for path in paths if case.architecture in _MODELS and self._reads(case, path, form)}

    def _reads(self, case: Case, path: str, form: str) -> bool:
        tensors, meant = file_of(case, form, [path])
        with suppress(KeyError, RuntimeError):  # it needs alpha, or reads no convolution of this kind
            if case.architecture in _NETWORKS:
                networks = import_module(f"musubi_tuner.networks.{_NETWORKS[case.architecture]}")
                model = self.models[case.architecture]
                return bool(networks.create_arch_network_from_weights(1.0, tensors, unet=model).unet_loras)
            shape = torch.cat([change for _, change in meant.values()]).shape
            return self._changes(case, tensors, shape)
        return False

    def _changes(self, case: Case, tensors: dict[str, torch.Tensor], shape: torch.Size) -> bool:
        """Whether a checkpoint of zeros is changed, whose weights all have the shape that the file is for."""
        paths = [path for path, module in self.models[case.architecture].named_modules() if hasattr(module, "weight")]
        with TemporaryDirectory() as folder:
            file = f"{folder}/model.safetensors"
            save_file({f"{path}.weight": torch.zeros(shape) for path in paths}, file)
            found = self.merging(file, [tensors], [1.0], False, torch.device("cpu"))
        return any(bool(weight.any()) for weight in found.values())


def _network(place: str, settings: dict[str, Any]) -> nn.Module:
    """One of its networks, without values."""
    module, _, name = place.partition(":")
    with patch("torch.cuda.current_device", lambda: 0), torch.device("meta"):  # a default of Wan's attention
        found = import_module(f"musubi_tuner.{module}")
        params = getattr(found, _PARAMS.get(name, ""), None)
        return getattr(found, name)(params(**settings)) if params else getattr(found, name)(**settings)
