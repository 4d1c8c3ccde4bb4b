"""The classifier: a fitted classifier of the style and the concept of generated images.

It is fitted once per model and image size, on real icons that went through the model, and saved as judge.safetensors
and judge.json (its classes and concepts, and its accuracy on concepts that it was not fitted on).
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
from dora_mm.utils.tensor_writer import save_tensors

FILES = TENSORS, DESCRIPTION = "judge.safetensors", "judge.json"
REQUIRED = {"brick": 0.95, "3d against fluent flat": 0.90}  # accuracies that its scores need to mean anything


@dataclass(frozen=True)
class Classifier:
    """A classifier of styles and concepts, as `fit_classifier` (samples/build) fits it.

    Attributes:
        classifier: Of styles.
        style_space: For distances to the real images of a style.
        concept_space: For ranks of concepts.
        concepts: Those in the gallery, which are those that the base model was pretrained on.
        report: Its own accuracy, ceilings and reference distances (see `fit_classifier`).
        origin: The VAE (digest) and the image size that it is for.
    """

    classifier: StyleClassifier
    style_space: StyleSpace
    concept_space: ConceptSpace
    concepts: tuple[Concept, ...]
    report: dict[str, Any]
    origin: dict[str, Any]

    def scores(self, features: Features, concepts: Sequence[Concept], seeds: Sequence[int]) -> Scores:
        """Scores one image per concept and seed.

        Args:
            features: Of K * S images: all seeds of the first concept, then all of the second, and so on.
            concepts: The K concepts that the images should show.
            seeds: The S seeds.
        """
        shape = (len(concepts), len(seeds))
        assert len(features) == shape[0] * shape[1], (len(features), shape)
        codes = [concept.code for concept in concepts]
        log_probabilities = self.classifier.log_probabilities(features.texture)
        projected = self.style_space.project(self.classifier.standardize(features.texture))
        ranks = self.concept_space.ranks(features.content, [code for code in codes for _ in seeds])
        return Scores(
            tuple(codes),
            tuple(seeds),
            log_probabilities.reshape(*shape, -1),
            projected.reshape(*shape, -1),
            ranks.reshape(shape),
        )

    def choose(self, role: str, count: int | None = None) -> list[Concept]:
        """Returns concepts of a role, evenly spaced over the list.

        Args:
            role: The role, or "all" for the complete gallery.
            count: How many; None returns all.

        Raises:
            ValueError: There are fewer than `count`.
        """
        found = [concept for concept in self.concepts if role in ("all", concept.role)]
        if count is None or count == len(found):
            return found
        if count > len(found):
            raise ValueError(f"concepts: the classifier has {len(found)} with role {role}, not {count}: lower count")
        return spaced_concepts(found, count)

    def check_model(self, resolution: int, vae_digest: str) -> None:
        """Checks that the classifier was fitted for a model.

        Args:
            resolution: The side of the model's images in pixels.
            vae_digest: The digest of its VAE.

        Raises:
            ValueError: The classifier was fitted for another size or another VAE.
        """
        if (self.origin["resolution"], self.origin["vae"]) != (resolution, vae_digest):
            raise ValueError(
                f"classifier: fitted for images of {self.origin['resolution']} px and another VAE, or the VAE in "
                f"another dtype, than those of this model ({resolution} px); "
                "fit one with python -m samples.build eval samples/build/configs/judge_tiny.yaml"
            )

    def shortcomings(self) -> list[str]:
        """Returns the accuracies that are below REQUIRED, in words."""
        return [
            f"{name} only {self.report['accuracy'][name]['mean']:.1%} (needs {needed:.0%})"
            for name, needed in REQUIRED.items()
            if self.report["accuracy"][name]["mean"] < needed
        ]

    def describe(self) -> str:
        """Returns its own accuracy in words, to be printed with the scores."""
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
        return "\n".join([*lines, *([f"NOT ACCURATE ENOUGH TO JUDGE: {'; '.join(short)}"] if short else [])])

    def save(self, folder: Path) -> None:
        """Writes judge.safetensors and judge.json.

        The concept space, most of the file, is saved in half precision, which loses nothing that matters.
        """
        arrays = {
            "style.mean": self.classifier.mean,
            "style.scale": self.classifier.scale,
            "style.weight": self.classifier.weight,
            "style.bias": self.classifier.bias,
            "space.components": self.style_space.components,
            **{f"space.real.{name}.mean": real.mean for name, real in self.style_space.real.items()},
            **{f"space.real.{name}.covariance": real.covariance for name, real in self.style_space.real.items()},
            "things.center": self.concept_space.center,
        }
        half = {"things.axes": self.concept_space.axes, "things.gallery": self.concept_space.gallery}
        tensors = {name: torch.from_numpy(np.asarray(array, np.float32)) for name, array in arrays.items()}
        tensors |= {name: torch.from_numpy(np.asarray(array, np.float16)) for name, array in half.items()}
        description = {
            "classes": {name: list(styles) for name, styles in CLASSES.items()},
            "origin": self.origin,
            "report": self.report,
            "concepts": [asdict(concept) for concept in self.concepts],
            "gallery": [
                list(row)
                for row in zip(self.concept_space.gallery_codes, self.concept_space.gallery_styles, strict=True)
            ],
        }
        save_tensors(folder / TENSORS, tensors, {})
        write_json(folder / DESCRIPTION, description)

    @classmethod
    def load(cls, folder: Path) -> "Classifier":
        """Reads a judge.

        Raises:
            ValueError: The folder contains no valid classifier, or one with other styles than this version.
        """
        try:
            arrays = {name: array.astype(np.float64) for name, array in load_file(folder / TENSORS).items()}
            description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            classes = {name: tuple(styles) for name, styles in description["classes"].items()}
            real = {
                name: Gaussian(arrays[f"space.real.{name}.mean"], arrays[f"space.real.{name}.covariance"])
                for name in classes
            }
            codes, styles = zip(*description["gallery"], strict=True)
            classifier = cls(
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
                f"classifier: {folder} contains no valid classifier ({reason}); fit one with "
                "python -m samples.build eval samples/build/configs/judge_tiny.yaml"
            ) from None
        if classes != CLASSES:
            raise ValueError(
                f"classifier: {folder} was fitted with other styles than those of this version; fit it again"
            )
        return classifier


def spaced_concepts(concepts: Sequence[Concept], count: int) -> list[Concept]:
    """Returns `count` concepts, evenly spaced over the list, since neighbours in it are of the same kind."""
    return [concepts[index * len(concepts) // count] for index in range(count)]
