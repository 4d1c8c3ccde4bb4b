"""The judge: one fitted object that says of drawn pictures which style they have and which thing they show.

It is fitted once per model and size, on real icons that went through the model, and kept as judge.safetensors with
judge.json (what it is, and how well it does on concepts that it has not seen).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

from dora_mm.eval.images.concepts import Concept, ConceptSpace
from dora_mm.eval.images.encoder import Features
from dora_mm.eval.images.scores import Scores, write_json
from dora_mm.eval.images.style import CLASSES, StyleClassifier, StyleSpace
from dora_mm.eval.statistics import Gaussian
from dora_mm.utils.atomic import save_tensors

FILES = TENSORS, DESCRIPTION = "judge.safetensors", "judge.json"
REQUIRED = {"brick": 0.95, "3d against fluent flat": 0.90}  # below these it is no judge


@dataclass(frozen=True)
class Judge:
    """What `fit_judge` makes.

    concepts: the things in the gallery, which are those that the base model was pretrained on.
    report: own accuracy, ceilings and reference distances (see `fit_judge`).
    origin: which VAE (digest) and picture size it is for.
    """

    classifier: StyleClassifier
    space: StyleSpace
    things: ConceptSpace
    concepts: tuple[Concept, ...]
    report: dict[str, Any]
    origin: dict[str, Any]

    def scores(self, features: Features, concepts: Sequence[Concept], seeds: Sequence[int]) -> Scores:
        """Scores of one picture per concept and seed, concepts outside, seeds inside."""
        shape = (len(concepts), len(seeds))
        assert len(features) == shape[0] * shape[1], (len(features), shape)
        codes = [concept.code for concept in concepts]
        log_probabilities = self.classifier.log_probabilities(features.texture)
        projected = self.space.project(self.classifier.standardize(features.texture))
        ranks = self.things.ranks(features.content, [code for code in codes for _ in seeds])
        return Scores(
            tuple(codes),
            tuple(seeds),
            log_probabilities.reshape(*shape, -1),
            projected.reshape(*shape, -1),
            ranks.reshape(shape),
        )

    def choose(self, role: str, count: int | None = None) -> list[Concept]:
        """`count` concepts of a role ("all" for every one of the gallery), evenly spread over the list; None: all.

        Raises:
            ValueError: there are fewer.
        """
        found = [concept for concept in self.concepts if role in ("all", concept.role)]
        if count is None or count == len(found):
            return found
        if count > len(found):
            raise ValueError(f"concepts: the judge has {len(found)} with role {role}, not {count}: lower count")
        return evenly_spaced(found, count)

    def check_model(self, resolution: int, vae_digest: str) -> None:
        """Raises ValueError for a model whose pictures it was not fitted for."""
        if (self.origin["resolution"], self.origin["vae"]) != (resolution, vae_digest):
            raise ValueError(
                f"judge: it was fitted for pictures of {self.origin['resolution']} px through another VAE, or one of "
                f"another dtype, than this model's ({resolution} px); "
                "fit one for it with python -m samples.build eval samples/build/configs/judge_tiny.yaml"
            )

    def shortcomings(self) -> list[str]:
        """What its own accuracy lacks to be a judge at all."""
        return [
            f"{name} only {self.report['accuracy'][name]['mean']:.1%} (needs {needed:.0%})"
            for name, needed in REQUIRED.items()
            if self.report["accuracy"][name]["mean"] < needed
        ]

    def describe(self) -> str:
        """Its own accuracy, for printing beside the scores."""
        accuracy, denoised = (
            {name: f"{value['mean']:.1%}" for name, value in self.report.get(kind, {}).items()}
            for kind in ("accuracy", "accuracy_denoised")
        )
        ceiling = {name: f"{value:.1%}" for name, value in self.report["concept_ceiling"].items()}
        lines = [
            "judge, on real icons of concepts that it has not seen, through the VAE: "
            + ", ".join(f"{name} {value}" for name, value in accuracy.items()),
            *(["noised and predicted back: " + ", ".join(f"{n} {v}" for n, v in denoised.items())] if denoised else []),
            "concept score of real icons whose style is taken out of the gallery (ceiling): "
            + ", ".join(f"{name} {value}" for name, value in ceiling.items()),
        ]
        short = self.shortcomings()
        return "\n".join([*lines, *([f"NO JUDGE: {'; '.join(short)}"] if short else [])])

    def save(self, folder: Path) -> None:
        """Half precision where nothing is lost: the concept space is most of the file."""
        arrays = {
            "style.mean": self.classifier.mean,
            "style.scale": self.classifier.scale,
            "style.weight": self.classifier.weight,
            "style.bias": self.classifier.bias,
            "space.components": self.space.components,
            **{f"space.real.{name}.mean": real.mean for name, real in self.space.real.items()},
            **{f"space.real.{name}.covariance": real.covariance for name, real in self.space.real.items()},
            "things.center": self.things.center,
        }
        half = {"things.axes": self.things.axes, "things.gallery": self.things.gallery}
        tensors = {name: torch.from_numpy(np.asarray(array, np.float32)) for name, array in arrays.items()}
        tensors |= {name: torch.from_numpy(np.asarray(array, np.float16)) for name, array in half.items()}
        description = {
            "classes": {name: list(styles) for name, styles in CLASSES.items()},
            "origin": self.origin,
            "report": self.report,
            "concepts": [asdict(concept) for concept in self.concepts],
            "gallery": [list(row) for row in zip(self.things.gallery_codes, self.things.gallery_styles, strict=True)],
        }
        save_tensors(folder / TENSORS, tensors, {})
        write_json(folder / DESCRIPTION, description)

    @classmethod
    def load(cls, folder: Path) -> "Judge":
        """Raises ValueError for a folder that holds no judge, or one of another version."""
        try:
            arrays = {name: array.astype(np.float64) for name, array in load_file(folder / TENSORS).items()}
            description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            classes = {name: tuple(styles) for name, styles in description["classes"].items()}
            real = {
                name: Gaussian(arrays[f"space.real.{name}.mean"], arrays[f"space.real.{name}.covariance"])
                for name in classes
            }
            codes, styles = zip(*description["gallery"], strict=True)
            judge = cls(
                StyleClassifier(**{key: arrays[f"style.{key}"] for key in ("mean", "scale", "weight", "bias")}),
                StyleSpace(arrays["space.components"], real),
                ConceptSpace(arrays["things.center"], arrays["things.axes"], arrays["things.gallery"], codes, styles),
                tuple(Concept(**row) for row in description["concepts"]),
                description["report"],
                description["origin"],
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"judge: {folder} holds none that can be read ({reason}); fit one with "
                "python -m samples.build eval samples/build/configs/judge_tiny.yaml"
            ) from None
        if classes != CLASSES:
            raise ValueError(f"judge: {folder} knows other styles than this version: fit it anew")
        return judge


def evenly_spaced(concepts: Sequence[Concept], count: int) -> list[Concept]:
    """`count` of them, spread over the list: it goes by kind of thing."""
    return [concepts[index * len(concepts) // count] for index in range(count)]
