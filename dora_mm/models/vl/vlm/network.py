"""The network of a vision-language model, and what its class computes with it: losses of rows, and answers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from dora_mm.config.models import VLMModelConfig
from dora_mm.core.wrappers.sharded import is_sharded
from dora_mm.models.vl.vlm.forms import Form
from dora_mm.models.vl.vlm.head import TargetLosses
from dora_mm.models.vl.vlm.loading import load_vlm
from dora_mm.utils.messages import raised_by_us

log = logging.getLogger(__name__)


@contextmanager
def naming(task: str, ids: Sequence[str]) -> Iterator[None]:
    """Names the rows that a model computes where it raises, which ends a run: it is not known which one is at fault.

    Raises:
        RuntimeError: A library raises a ValueError, which would be taken for that of a row that cannot be read.
    """
    rows = f"row{'s' if len(ids) > 1 else ''} {', '.join(ids)} of {task}"
    try:
        yield
    except ValueError as error:
        if raised_by_us(error):
            raise
        raise RuntimeError(f"the model fails at {rows}: {error}") from error
    except Exception:
        log.error("the model fails at %s", rows)
        raise


class VLMNetwork:
    """A model of transformers, which is loaded on first use, since data can be checked without it.

    Args:
        config: The `model` section.
        form: How its class computes answers.
        loads_to: Where its weights are read to.
    """

    def __init__(self, config: VLMModelConfig, form: Form, loads_to: torch.device):
        self.config, self.form, self.loads_to = config, form, loads_to

    @cached_property
    def model(self) -> Any:
        """The model of transformers."""
        return load_vlm(self.config, self.loads_to)

    @cached_property
    def _losses(self) -> TargetLosses:
        return TargetLosses(self.form, self.model)

    @property
    def device(self) -> torch.device:
        """The device of the model's parameters."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the frozen weights; those that are trained themselves are float32."""
        return getattr(torch, self.config.dtype)

    def row_losses(self, inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each row, summed over its target tokens, and their number: (B,) each."""
        with self._precision():
            return self._losses(self.moved(inputs), labels.to(self.device))

    def zero_loss(self) -> Tensor:
        """The loss of no rows, (): it reaches one trained parameter, the last, so that a backward pass can be run.

        The last one is of the language model, which all rows reach. A gradient of zero for others, such as those of a
        tower, would let the optimizer move them in a step none of whose rows, in any process, has an image.

        Raises:
            ValueError: The model is sharded: the other processes would wait for what this one does not compute.
        """
        if any(map(is_sharded, self.model.parameters())):
            raise ValueError(
                "train.shard: all rows of a process's batch are too long and left out, and the processes have to keep "
                "step: leave such rows out of the data, raise model.max_length or take larger batches"
            )
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return sum((p.flatten()[:0].float().sum() for p in trained[-1:]), torch.zeros((), device=self.device))

    def generate(self, inputs: Mapping[str, Tensor], settings: GenerationConfig, **more: Any) -> Tensor:
        """The token ids (B, T) of the generated answers, without what was read; see `Form.generate`."""
        with self._precision():
            return self.form.generate(self.model, self.moved(inputs), settings, **more)

    def moved(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs on the model's device; pixels in its dtype."""
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
            if isinstance(value, Tensor)
            else value
            for name, value in inputs.items()
        }

    def _precision(self) -> AbstractContextManager[Any]:
        """Autocast where the frozen weights are in half precision: those that are trained themselves are float32."""
        if self.device.type == "meta":  # which it does not know
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype.itemsize < 4)
