"""Check of a family of vision-language models for what every family promises."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import dora_mm
from dora_mm import formats
from dora_mm.adapting.networks import adapt
from dora_mm.config.models import validated
from dora_mm.config.vl import DecodeConfig, TrainVLConfig
from dora_mm.data.vl.answers import texts_of
from dora_mm.data.vl.example import Example
from dora_mm.models.vl.families import family_of_folder, load_vl_model
from dora_mm.models.vl.vl_model import VLModel
from dora_mm.registries.vl_families import DEFAULT
from dora_mm.testing.common import CLOSE, distance, failures, randomize, resume_failures, write_images

TASK, SIDES = "vqa", {"wide.png": (40, 60), "tall.png": (70, 50)}
ANSWERS = {  # by the question: rows of two lengths, so that one is padded
    "What colour is it?": "red",
    "Is there a small dog in the image, on the left of the large tree?": "no",
}


def check_vl_family(
    folder: str | Path,
    settings: Mapping[str, Any] | None = None,
    *,
    vision: Mapping[str, Any] | None = None,
    trains: bool = True,
) -> list[str]:
    """Checks a family of vision-language models on a model of it, which should be tiny.

    Args:
        folder: The model. Its `model_type` says the family, unless the settings do.
        settings: Keys of the `model` section other than `path`.
        vision: The `vision` section, for families without a tower of their own.
        trains: Whether trainings run, too: one at once, one that is resumed.

    Returns:
        A sentence for each failure; empty: the family is right.
    """
    with TemporaryDirectory() as scratch:
        check = VLFamilyCheck(Path(folder), settings or {}, vision, Path(scratch))
        found = [check.batch, check.answers, check.fresh_adapter, check.adapter_file, check.merged]
        return failures([*found, *([check.resume] if trains else [])])


class VLFamilyCheck:
    """The checks of a model: each returns a sentence per failure.

    Args:
        folder: The model.
        settings: Keys of the `model` section.
        vision: The `vision` section.
        scratch: An empty folder.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], vision: Mapping[str, Any] | None, scratch: Path):
        self.scratch = scratch
        self.images, file = write_images(scratch / "images", SIDES), scratch / "rows.json"
        source = {"format": "chat", "file": str(file), "images": str(self.images)}
        self.config = {
            "pipeline": "train_vl",
            "model": {"path": str(folder), "family": family_of_folder(str(folder)) or DEFAULT, **settings},
            **({"vision": dict(vision)} if vision else {}),
            "adapter": {"rank": 2},
            "data": {"task": "chat", "tables": str(scratch / "tables"), "train": source},
            "optimizer": {"lr": 0.01},
        }
        train = {"name": "check", "train": {"steps": 1, "batch_size": 1}, "output": "unused"}
        self.parsed: TrainVLConfig = validated(TrainVLConfig, {**self.config, **train})
        names = [(name,) if self._open().reads_images else () for name in SIDES]
        rows = zip(names, ANSWERS.items(), strict=True)
        self.examples = [Example(prompt, images, prompt, (answer,), (1.0,)) for images, (prompt, answer) in rows]
        file.write_text(json.dumps([_conversation(example) for example in self.examples * 2]), encoding="utf-8")

    def _open(self, *, adapted: bool = False) -> VLModel:
        """The model, loaded anew, with fresh adapters or without."""
        model = load_vl_model(self.parsed.model, self.parsed.vision, seed=0)
        if adapted:
            adapt(model.networks, model.target_maps, self.parsed.adapter, seed=0, backend="torch")
        return model

    def _losses(self, model: VLModel, examples: Sequence[Example] | None = None) -> Tensor:
        """The losses of rows (B,)."""
        examples = examples or self.examples
        targets = [(example.answers[0], 1.0) for example in examples]
        with torch.no_grad():
            return model.row_losses(model.batch(TASK, examples, str(self.images), targets))[0]

    def _trained(self) -> VLModel:
        """The model with adapters as of a training."""
        model = self._open(adapted=True)
        randomize(model.networks.values())
        return model

    def batch(self) -> list[str]:
        model = self._open()
        one_by_one = torch.cat([self._losses(model, [example]) for example in self.examples])
        if distance(self._losses(model), one_by_one) > CLOSE:
            return ["rows of a batch, the shorter one padded, have not the losses that they have alone"]
        return []

    def answers(self) -> list[str]:
        answer = self._open().answerer(TASK, DecodeConfig(max_new_tokens=3), ())
        one_by_one = [texts_of(answer([example], str(self.images)))[0] for example in self.examples]
        if texts_of(answer(self.examples, str(self.images))) != one_by_one:
            return ["rows of a batch have not the answers that they have alone"]
        return []

    def fresh_adapter(self) -> list[str]:
        found, bare, model = [], self._losses(self._open()), self._open(adapted=True)
        if not torch.equal(self._losses(model), bare):
            found.append("a fresh adapter changes the loss")
        randomize(model.networks.values())
        if distance(self._losses(model), bare) < CLOSE:
            found.append("an adapter of the target map's default parts changes nothing")
        for network in model.networks.values():
            dora_mm.set_strength(network, 0.0)
        if not torch.equal(self._losses(model), bare):
            found.append("an adapter at strength 0 changes the loss")
        return found

    def adapter_file(self) -> list[str]:
        """Of a single network, which is what PEFT reads, and where its format can hold the adapter."""
        from peft import PeftModel

        model, other = self._trained(), self._open()
        if len(model.networks) > 1 or formats.about_format(model.networks, "peft"):
            return []
        dora_mm.save_adapter(model.networks, self.scratch / "peft", format="peft")
        PeftModel.from_pretrained(other.networks["model"], self.scratch / "peft")
        if distance(self._losses(other), self._losses(model)) > CLOSE:
            return ["PEFT does not compute with the adapter's file what the adapter does"]
        return []

    def merged(self) -> list[str]:
        model = self._trained()
        before = self._losses(model)
        for network in model.networks.values():
            dora_mm.merge(network)
        return [] if distance(self._losses(model), before) <= CLOSE else ["merged weights compute something else"]

    def resume(self) -> list[str]:
        return resume_failures(self.scratch, self.config)


def _conversation(example: Example) -> dict[str, Any]:
    """An example as LLaVA's files have it."""
    prompt = "".join("<image>\n" for _ in example.images) + example.text
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": example.answers[0]}]
    return {**({"image": example.images[0]} if example.images else {}), "conversations": turns}
