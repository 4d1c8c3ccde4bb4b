"""A model of transformers with a small real input, by whose logits it is compared with what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dora_mm.config.models import VLMModelConfig
from dora_mm.data.vl.example import Example
from dora_mm.models.folders import identity_of, read_config
from dora_mm.models.hub import local_copy
from dora_mm.models.opening import commit_of
from dora_mm.models.vl.families import family_of_folder
from dora_mm.models.vl.vlm.encoding import TokenRow, collate
from dora_mm.models.vl.vlm.family import VLM
from dora_mm.models.vl.vlm.forms import form_of
from dora_mm.models.vl.vlm.head import target_logits
from dora_mm.models.vl.vlm.image_limits import in_fewest_tiles
from dora_mm.models.vl.vlm.loading import load_tokenizer, load_vlm
from dora_mm.registries.vl_families import VL_FAMILIES

CPU = torch.device("cpu")
QUESTION = "What does the image show?"
DATE = "2026-12-01"  # of the row, which is the same on any day
ANSWER = "The image shows a small red house beside two large green trees, under a blue sky without any clouds."


@dataclass(frozen=True)
class Probe:
    """A model and its input.

    Attributes:
        model: The model, on the CPU.
        row: The input: a generated image with a question and an answer; of a language model, the answer alone.
        identity: What identifies the base weights, by keys of an adapter's header.
        folder: The folder of its files; of a hub model, that in the cache.
    """

    model: Any
    row: TokenRow
    identity: Mapping[str, str]
    folder: Path

    @torch.no_grad()
    def logits(self) -> Tensor:
        """The logits of the tokens of the answer, (K, V) in float32."""
        inputs, labels = collate([self.row], pad=0)
        dtype = self.model.dtype
        inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        form = form_of(type(self.model).__name__, self.model.config)
        return target_logits(form, self.model, inputs, labels)[0].float()


def checked_config(path: str, revision: str | None) -> Any:
    """The config of a model into which adapters can be merged.

    Raises:
        ValueError: It is not a model of transformers, or a quantised one.
    """
    if name := family_of_folder(path):
        title = VL_FAMILIES[name].title
        raise ValueError(f"MODEL {path} is a {title}, which transformers and vLLM cannot load, merged or not")
    config = read_config(path, revision)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"MODEL {path} is quantised, and merging would lose the update: merge into the model that is not quantised"
        )
    return config


def load_probe(path: str, revision: str | None, dtype: str) -> Probe:
    """Loads a vision-language model or a language model, with all that its folder has to hold.

    Args:
        path: A local folder or a hub name.
        revision: A commit, branch or tag of a hub model; None: the main branch.
        dtype: The dtype of its weights.

    Raises:
        ValueError: The model, its processor or its tokenizer cannot be loaded.
    """
    config = read_config(path, revision)
    commit = commit_of(path, revision)
    settings = VLMModelConfig.model_validate({"path": path, "revision": commit, "dtype": dtype, "date": DATE})
    if hasattr(config, "vision_config"):
        vlm = VLM(settings)
        in_fewest_tiles(vlm.rows.encoder.processor, config)
        model, row = vlm.model, _image_row(vlm)
    else:
        row = _text_row(load_tokenizer(path, commit))
        model = load_vlm(settings, CPU)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = (
            tensor.data.clone()
        )  # aligned: those read from a file are not, which changes last bits of products
    folder = local_copy(path, commit)
    assert folder is not None
    return Probe(model, row, identity_of(path, commit).weights, folder)


def _image_row(vlm: VLM) -> TokenRow:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "gradients.png"
        rows, columns = np.indices((96, 128), dtype=np.uint8)
        Image.fromarray(np.stack([2 * rows, 2 * columns, rows ^ columns], axis=-1)).save(file)
        return vlm.rows.row(vlm.question_task, Example("probe", (str(file),), QUESTION), None, ANSWER)


def _text_row(tokenizer: Any) -> TokenRow:
    ids = tokenizer(ANSWER, return_tensors="pt")["input_ids"]
    return TokenRow(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        ids[0],
        0,
        torch.zeros_like(ids[0], dtype=torch.bool),
    )


def largest_difference(expected: Tensor, found: Tensor) -> float:
    """The largest difference of two tensors, relative to the largest absolute value of the first; NaN if any is."""
    return float((found - expected).abs().max() / expected.abs().max())
