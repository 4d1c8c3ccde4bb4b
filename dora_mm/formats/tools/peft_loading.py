"""Which modules of a file PEFT itself takes: it loads the names into a model without weights."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dora_mm.core.spec import DoRASpec
from dora_mm.formats.tools import peft_config
from dora_mm.formats.tools.peft import PREFIX
from dora_mm.utils.messages import first_line


def left_out(model: nn.Module, config: Mapping[str, Any] | Path, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """The modules whose adapters PEFT leaves out when it loads a file, as it does without an error.

    PEFT renames the modules of a file as transformers does those of a checkpoint, and knows only what it then finds.

    Args:
        model: The model that the file is for, on the meta device; it is not changed.
        config: The arguments of a LoraConfig, or the folder of an adapter_config.json.
        shapes: The shapes of the tensors in the file, by key.

    Returns:
        The paths of the modules in the file.

    Raises:
        ValueError: PEFT refuses the file as a whole.
    """
    import peft
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    tensors = {key: torch.empty(*shape, device="meta") for key, shape in shapes.items()}
    try:
        with _silent():
            from_folder = isinstance(config, Path)
            settings = peft.PeftConfig.from_pretrained(str(config)) if from_folder else peft.LoraConfig(**config)
            mark = f".{PEFT_TYPE_TO_PREFIX_MAPPING[settings.peft_type]}"  # pyright: ignore[reportArgumentType]
            tensors = {key: tensor for key, tensor in tensors.items() if mark in key}
            adapted = peft.get_peft_model(copy.deepcopy(model), settings)  # pyright: ignore[reportArgumentType]
            result = peft.set_peft_model_state_dict(adapted, tensors)
    except Exception as error:  # whatever PEFT raises is raised for whoever loads the file
        raise ValueError(f"PEFT refuses it: {first_line(error)}") from error
    missing = [key for key in result.missing_keys if mark in key]
    if not missing and not result.unexpected_keys:
        return []
    adapted_modules = {_module(name, mark) for name, _ in adapted.named_parameters() if mark in name}
    return sorted(
        {_module(key, mark) for key in tensors} - adapted_modules.difference(_module(key, mark) for key in missing)
    )


def left_out_of(model: nn.Module, specs: Mapping[str, DoRASpec]) -> list[str]:
    """The same for a file that is not there yet, from the settings of the modules that it will have, by path.

    Their weights are (O, I, ...), not transposed.
    """
    config = peft_config.lora_config(specs, transposed=False)
    shapes: dict[str, Sequence[int]] = {}
    for path, spec in specs.items():
        weight = model.get_submodule(path).weight
        assert isinstance(weight, torch.Tensor)
        rank, (rows, *inner) = config["rank_pattern"].get(path, config["r"]), weight.shape
        ones = (1,) * (len(inner) - 1)
        shapes[f"{PREFIX}.{path}.lora_A.weight"] = rank, *inner
        shapes[f"{PREFIX}.{path}.lora_B.weight"] = rows, rank, *ones
        if spec.method != "lora":
            shapes[f"{PREFIX}.{path}.lora_magnitude_vector"] = (1, rows, *ones) if ones else (rows,)
    return left_out(model, config, shapes)


def _module(key: str, mark: str) -> str:
    return key.partition(mark)[0].removeprefix(f"{PREFIX}.")


@contextmanager
def _silent() -> Iterator[None]:
    """Without PEFT's and transformers' warnings about names, which become a sentence of ours."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
