"""Fits the judge on real icons that went through the model, and measures it on concepts that it has not seen."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dora_mm.eval.images.concepts import Concept
from dora_mm.eval.images.encoder import Features, concatenate
from dora_mm.eval.images.judge import Judge
from dora_mm.eval.images.style import CLASSES, STYLES, StyleClassifier, StyleSpace, class_of
from dora_mm.eval.statistics import bootstrap
from samples.build.judge.concepts import fit_concepts
from samples.build.judge.styles import fit_styles

# Fréchet distances depend on the number of pictures: the references below are of samples of this size.
REFERENCE_SIZE = 120


def fit_judge(
    concepts: Sequence[Concept],
    features: Mapping[str, Features],
    origin: Mapping[str, Any] | None = None,
    denoised: Mapping[str, Features] | None = None,
) -> Judge:
    """Fits a judge on the features of every concept's icon in every style, rows as `concepts`.

    `denoised` holds those of the concepts of split "judge" once more, noised and predicted back by the UNet: what is
    drawn later bears the UNet's traces, and they must not pass for a style.

    Classifier, style space and concept axes come from the concepts of split "judge"; the gallery holds the pretraining
    concepts. Its report:
        accuracy: share of real icons, per style, that classifiers without their concept get right (cross-validation
            over the judge's concepts), and of 3D and fluent flat icons together, which are the same drawings;
        accuracy_denoised: the same of `denoised`;
        accuracy_pretrain: the same by the final classifier on the pretraining concepts, among them the reported ones;
        concept_ceiling: top-1 of real icons of the pretraining concepts against all OTHER styles' icons. It is what a
            perfect picture in a manner of its own would get; a model that repeats a gallery icon can exceed it;
        frechet: distances of real icons of other concepts to each class's real set, as a scale.
    """
    split = {name: np.array([concept.split == name for concept in concepts]) for name in ("judge", "pretrain")}
    codes = {name: [c.code for c in concepts if c.split == name] for name in split}
    seen, shown = ({style: features[style][split[name]] for style in STYLES} for name in split)
    fitted = [seen, *([denoised] if denoised else [])]
    parts = {style: concatenate([part[style] for part in fitted]) for style in STYLES}
    owners = dict.fromkeys(STYLES, codes["judge"] * len(fitted))
    count = len(codes["judge"])
    deciding = slice(count if denoised else 0, None)  # what is judged later is drawn by the UNet
    textures = {style: part.texture for style, part in parts.items()}
    classifier, space, predicted = fit_styles(textures, owners, deciding)
    things = fit_concepts(
        {style: part.content for style, part in parts.items()},
        owners,
        {style: part.content for style, part in shown.items()},
        dict.fromkeys(STYLES, codes["pretrain"]),
    )
    final = {s: classifier.log_probabilities(part.texture).argmax(axis=1) for s, part in shown.items()}
    report = {
        "num_concepts": {name: len(found) for name, found in codes.items()},
        "accuracy": _accuracy({style: part[:count] for style, part in predicted.items()}),
        **({"accuracy_denoised": _accuracy({s: p[count:] for s, p in predicted.items()})} if denoised else {}),
        "accuracy_pretrain": _accuracy(final),
        "concept_ceiling": {
            style: float((things.ranks(part.content, codes["pretrain"], without_style=style) == 1).mean())
            for style, part in shown.items()
        },
        "frechet": _references(classifier, space, shown),
    }
    gallery = tuple(concept for concept in concepts if concept.split == "pretrain")
    return Judge(classifier, space, things, gallery, report, dict(origin or {}))


def _accuracy(predicted: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    right = {style: predicted[style] == list(CLASSES).index(class_of(style)) for style in STYLES}
    intervals = {style: bootstrap(hits[:, None].astype(float)) for style, hits in right.items()}
    pair = np.stack([right["3d"], right["flat"]], axis=1).astype(float)
    intervals["3d against fluent flat"] = bootstrap(pair)
    return {name: interval.as_dict() for name, interval in intervals.items()}


def _references(classifier: StyleClassifier, space: StyleSpace, shown: Mapping[str, Features]) -> dict[str, Any]:
    """{class: {style: distance}} of up to REFERENCE_SIZE real icons each."""
    rows = np.random.default_rng(0).permutation(len(shown["flat"]))[:REFERENCE_SIZE]
    projected = {s: space.project(classifier.standardize(part.texture[rows])) for s, part in shown.items()}
    return {name: {style: space.distance(x, name) for style, x in projected.items()} for name in CLASSES} | {
        "num_pictures": len(rows)
    }
