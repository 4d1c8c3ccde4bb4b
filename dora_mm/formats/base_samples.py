"""A few weights of the base model in an adapter file, so that loading it into a model with other weights is noticed."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from dora_mm.core.adapted import AdaptedLayer
from dora_mm.formats.state import UNNAMED, joined
from dora_mm.utils.json_text import parse_json

KEY = "dora_mm_base"  # of the header: a JSON object of lists of numbers, by component and path of the layer
_LAYERS, _WEIGHTS = 3, 16
# Of |W - W0| / |W0|: two unrelated models of one variance have 1.4, storage in 4 bits 0.1, a fine-tuned model less.
_FAR = 0.5
_LARGEST = 1e39  # beyond float32, whose squares are still finite

log = logging.getLogger(__name__)


def header_of_base(components: Mapping[str, nn.Module]) -> dict[str, str]:
    """The entry of the header: some weights of the first, a middle and the last adapted layer.

    Args:
        components: The adapted models by component.

    Returns:
        The entry by its key; empty where no layer has a base weight that can be read.
    """
    layers = _layers(components)
    names = [name for name, layer in layers.items() if not layer.adaptation.assists]  # those that the file adapts
    chosen = dict.fromkeys(names[i * (len(names) - 1) // (_LAYERS - 1)] for i in range(_LAYERS)) if names else {}
    samples = {name: [float(f"{weight:.3g}") for weight in _sample(layers[name])] for name in chosen}
    return {KEY: json.dumps(samples)} if samples else {}


def samples_in(header: Mapping[str, str]) -> dict[str, list[float]]:
    """The weights that a header has, by component and path of the layer.

    Raises:
        ValueError: The entry is not what `header_of_base` writes.
    """
    found = parse_json(header.get(KEY, "{}"), f"its header key {KEY}")
    for name, sample in found.items():
        if not isinstance(sample, list) or not all(isinstance(w, int | float) and abs(w) < _LARGEST for w in sample):
            raise ValueError(f"its header key {KEY} has no list of numbers for {name}")
    return found


def warn_of_other_base(components: Mapping[str, nn.Module], samples: Mapping[str, Sequence[float]], file: Path) -> None:
    """Warns where the base weights of models are far from those that an adapter was trained on.

    Layers that the models lack are not compared.

    Args:
        components: The adapted models by component.
        samples: The weights of the adapter's own base, as in `samples_in`.
        file: The adapter file, for the message.
    """
    layers = _layers(components) if samples else {}
    both = [name for name in samples if name in layers]
    far = [name.removeprefix(f"{UNNAMED}.") for name in both if _is_far(_sample(layers[name]), samples[name])]
    if far:
        names = f"{far[0]} differs" if len(far) == 1 else f"{', '.join(far)} differ"
        log.warning(
            "%s was trained on a base model with other weights (%s): load those into the model first", file, names
        )


def _is_far(found: Sequence[float], expected: Sequence[float]) -> bool:
    return len(found) == len(expected) and math.dist(found, expected) > _FAR * math.hypot(*expected)


def _layers(components: Mapping[str, nn.Module]) -> dict[str, AdaptedLayer]:
    """The adapted layers whose base weight can be read, by component and path."""
    return {
        joined(component, path): layer
        for component, model in components.items()
        for path, layer in model.named_modules()
        if isinstance(layer, AdaptedLayer) and _has_base(layer)
    }


def _has_base(layer: AdaptedLayer) -> bool:
    state = layer.adaptation
    return state.spec.method != "full" and not (state.merged and state.base_weight is None) and not layer.weight.is_meta


@torch.no_grad()
def _sample(layer: AdaptedLayer) -> list[float]:
    """Weights from all over W0, always at the same positions."""
    matrix, steps = layer.base_matrix().flatten(1), torch.arange(_WEIGHTS)
    rows, columns = steps * matrix.shape[0] // _WEIGHTS, steps * 7919 % matrix.shape[1]  # a prime: columns spread
    return matrix[rows.to(matrix.device), columns.to(matrix.device)].float().nan_to_num().tolist()
