"""The names of weights in the class of a model of transformers, which are not always those of its checkpoint.

transformers renames, divides, stacks and reorders weights while it loads them. Adapters are for what it has loaded, so
its own functions are called here, on keys alone and without a model in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dora_mm.formats.files.model_folder import ModelFolder
from dora_mm.utils.guards import guarded
from dora_mm.utils.messages import first_line
from dora_mm.utils.requirements import check_extra

THINKERS = {  # of models that also speak: the class of the part that reads and writes text, by their type
    "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
}
SHARED = ("dtype", "quantization_config")  # what the config of the whole model may say for all of its parts


def reading_part(config: Any) -> Any:
    """The config of what reads and writes text: of a model that also speaks that of its thinker, else the config.

    transformers loads the thinker from the folder of the whole model, and gives its weights the same names there.

    Args:
        config: What transformers reads of a config.json.
    """
    if config.model_type not in THINKERS:
        return config
    found = config.thinker_config
    found.architectures = [THINKERS[config.model_type]]
    for name in SHARED:
        if getattr(found, name, None) is None and getattr(config, name, None) is not None:
            setattr(found, name, getattr(config, name))
    return found


def empty_model(folder: ModelFolder) -> Any:
    """Builds the model of a folder on the meta device.

    Returns:
        The model; None where the folder has no config, or its class is none of transformers'.

    Raises:
        ValueError: The config does not fit the class that it names.
    """
    config = folder.config() if folder.has_config() else {}
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(config.get("model_type"), str):
        return None
    check_extra("recipes", f"{folder.path}, a model of transformers,")
    import transformers

    kind = getattr(transformers, THINKERS.get(config["model_type"], str(names[0])), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        return None
    try:
        with guarded(""), torch.device("meta"):
            return kind(reading_part(transformers.AutoConfig.from_pretrained(folder.path, trust_remote_code=False)))
    except Exception as error:  # transformers raises anything for settings that do not fit
        raise ValueError(
            f"{folder.path}: no {kind.__name__} can be built from its config.json: {first_line(error)}"
        ) from error


@dataclass(frozen=True, eq=False)
class Converter:
    """Several tensors of a checkpoint that transformers makes weights of.

    Attributes:
        model: The model, on the meta device.
        transform: The `WeightConverter` of transformers.
        first: The name of the first weight that it makes.
        keys: The tensors, each with the pattern of the converter that it fits, in the order of loading.
    """

    model: Any
    transform: Any
    first: str
    keys: list[tuple[str, str]] = field(default_factory=list)

    def names(self) -> list[str]:
        """The weights that it makes."""
        first, *others = self.transform.target_patterns
        return [self.first, *(self.first.replace(first, other, 1) for other in others)]

    def weight(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """Computes a weight from tensors by key."""
        transform = copy.deepcopy(self.transform)  # it collects what it is given
        for pattern, key in self.keys:
            transform.add_tensor(self.first, key, pattern, partial(read, key))
        found = transform.convert(self.first, model=self.model, config=self.model.config)[name]
        return found[0] if isinstance(found, list) else found


class ClassWeights(NamedTuple):
    """The locations of the weights of a class in a checkpoint.

    Attributes:
        sources: By the name of a parameter or buffer of the class, or of one that it shares: the key of the tensor that
            it is loaded from, or what makes it from several.
        experts: The keys of weights that the class stacks in one parameter, without modules of their own, by the names
            that they would have.
    """

    sources: dict[str, str | Converter]
    experts: dict[str, str]


def weights_in_class(model: Any, keys: Iterable[str]) -> ClassWeights:
    """Finds the weights of a class in a checkpoint. Tensors that transformers does not load are left out.

    Args:
        model: The model, on the meta device.
        keys: The keys of the checkpoint.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [it for it in transforms if isinstance(it, WeightRenaming)]
    converters = [it for it in transforms if isinstance(it, WeightConverter)]
    by_pattern = {pattern: it for it in converters for pattern in it.source_patterns}
    meta, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, str | Converter] = {}
    experts: dict[str, str] = {}
    for key in sorted(keys, key=dot_natural_key):  # as transformers loads them: some renamings look at what came before
        name, pattern = rename_source_key(key, renamings, converters, prefix, meta)
        if name not in meta and key in meta:
            name, pattern = rename_source_key(key, [], [], prefix, meta)
        if name not in meta:
            continue
        if pattern is None:
            found[name] = key
            continue
        made = found.setdefault(name, Converter(model, by_pattern[pattern], name))
        assert isinstance(made, Converter)
        made.keys.append((pattern, key))
        found.update(dict.fromkeys(made.names(), made))
        if key.endswith(".weight") and not name.endswith(".weight"):
            experts[rename_source_key(key, renamings, [], prefix, meta)[0]] = key
    return ClassWeights(found | dict(_shared(model, found)), experts)


def _shared(model: nn.Module, found: dict[str, str | Converter]) -> Iterator[tuple[str, str | Converter]]:
    """The parameters that a checkpoint has under another name, since the class ties them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {id(parameter): name for name, parameter in parameters.items() if name in found}
    for name, parameter in parameters.items():
        if name not in found and id(parameter) in names:
            yield name, found[names[id(parameter)]]
