"""What a training of a vision-language model would do, before it starts: parameters, data, lengths, memory and rows."""

from __future__ import annotations

from accelerate import Accelerator

from dora_mm.config.vl import TrainVLConfig
from dora_mm.data.vl.needed import data_needed
from dora_mm.tasks.families import structure_of
from dora_mm.train.preview import slow_hardware
from dora_mm.train.vl_adapters import adapt


def describe(config: TrainVLConfig) -> str:
    """The parameters that would be trained, counted without loading weights, and the data, present and missing."""
    structure = structure_of(config.model, config.vision, tower=bool(config.adapter.vision_parts))
    trained = adapt(structure, config.adapter, seed=config.seed, backend=config.backend)
    tables = [f"{name}\n{injected}" for name, injected in trained.reports.items()]
    needed = data_needed(config.data, config.vision, config.model.path)
    remarks = slow_hardware(Accelerator(mixed_precision=config.train.mixed_precision), trained.networks.values())
    return "\n\n".join([trained.share, *tables, needed, *remarks])
