"""What a config trains of an image model: adapters, new tokens, and what both start with."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from dora_mm.adapting import networks
from dora_mm.adapting.initial import load_initial_file
from dora_mm.adapting.networks import TrainedNetworks
from dora_mm.adapting.new_tokens import load_initial_tokens, train_tokens
from dora_mm.config.images import TrainDiffusionConfig
from dora_mm.core import base_model
from dora_mm.models.images.image_model import ImageModel


def adapt_image_model(model: ImageModel, config: TrainDiffusionConfig) -> TrainedNetworks:
    """Injects the adapters of the config, trains its new tokens, and loads `init_from`."""
    found = networks.adapt(model.adaptable, model.target_maps, config.adapter, seed=config.seed, backend=config.backend)
    train_tokens(config.tokens, model, found)
    if config.adapter.init_from:
        load_initial_file(found, config.adapter, config.backend)
        load_initial_tokens(config.tokens, model, config.adapter)
    return found


@contextmanager
def bare(adapted: Iterable[nn.Module], model: ImageModel) -> Iterator[None]:
    """A context in which a model is that without adapters and new tokens."""
    with base_model(adapted), model.new_tokens.off():
        yield
