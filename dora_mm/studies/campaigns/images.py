"""Campaigns of style adapters: things that no adapter has seen are generated, and a classifier scores the images."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dora_mm import backend as backends
from dora_mm.config.generation import RoleConfig
from dora_mm.config.images import TrainDiffusionConfig
from dora_mm.config.loader import dump_config
from dora_mm.config.paths import resolve_path
from dora_mm.data.images.folder import digest_of, read_images, read_training_images
from dora_mm.data.images.held_out import hold_out
from dora_mm.eval.images.classifier import FILES, Classifier, spaced_concepts
from dora_mm.eval.images.encoder import Encoder
from dora_mm.eval.images.prompts import fill
from dora_mm.eval.images.scores import Scores, concatenate_seeds, mean_metrics
from dora_mm.eval.statistics import ConfidenceInterval
from dora_mm.models.images.families import identity_of, load_image_model
from dora_mm.models.images.image_model import ImageModel
from dora_mm.models.images.new_tokens import load_adapter
from dora_mm.sampling.before_after import sample_merged
from dora_mm.sampling.contact_sheets import save_atomically
from dora_mm.sampling.grids import image_grid
from dora_mm.studies.campaigns.evaluation import Report, check_trainings, common_overrides, load_base, num_trainings
from dora_mm.studies.campaigns.kept import SCORES, keep_circumstances
from dora_mm.studies.campaigns.trainings import Training, Trainings
from dora_mm.studies.config import CompareConfig, CompareImagesConfig
from dora_mm.studies.tables import Result, image_contrasts_table, image_results_csv, image_results_table
from dora_mm.studies.variants import Variant
from dora_mm.utils.day import Day
from dora_mm.utils.devices import default_device
from dora_mm.utils.digest import module_digest

BARE_FLAT, BARE = "bare model, flat prompts", "bare model"


class ImageEvaluation:
    """The `Evaluation` of style adapters. A learning rate is chosen on the `tune` things of the classifier.

    Images are kept in the folder's pictures/, their scores in scores/.

    Args:
        config: The config of the campaign.
        settings: Its section `images`.

    Raises:
        ValueError: The base config, the classifier, the model or the images cannot be used.
    """

    score_title = "probability of the style / rank of the thing"

    def __init__(self, config: CompareConfig, settings: CompareImagesConfig):
        self.config, self.settings, self.day = config, settings, Day()
        self.base = load_base(config, TrainDiffusionConfig, "train_diffusion")
        check_trainings(config, self.overrides)
        classifier = resolve_path(settings.classifier, "images.classifier")
        self.classifier = Classifier.load(classifier)
        self.concepts = {
            choice.role: self.classifier.choose(choice.role, choice.count)
            for choice in (settings.tune, settings.report)
        }
        self.device = default_device()
        model = self.load_model()
        model.check_rescale(self.settings.sampling.guidance_rescale, "images.sampling.guidance_rescale")
        self.classifier.check_model(model.resolution, module_digest(model.networks["vae"]))
        self.encoder = Encoder(self.device)
        self.inputs: Mapping[str, Any] = {
            "base": dump_config(self.base),
            "the pictures and captions": digest_of(read_training_images(self.base.data)),
            **{
                what: digest_of(images)
                for what, images in (
                    ("the held-out pictures", hold_out(read_training_images(self.base.data), self.base.data)[1]),
                    ("the pictures to preserve", read_images(self.base.data, "preserve")),
                )
                if images
            },
            **identity_of(self.base.model).inputs,
            "the judge's files": hashlib.sha256(
                b"".join((classifier / name).read_bytes() for name in FILES)
            ).hexdigest(),
        }

    def load_model(self) -> ImageModel:
        """Loads the bare model, once per adapter, because weights of method `full` replace the base's."""
        return load_image_model(self.base.model).to(self.device)

    def overrides(self, training: Training) -> list[str]:
        """The overrides of one training; alpha = rank, so that every update is scaled by 1."""
        return [
            *common_overrides(self.config, training, alpha=float(training.variant.rank or 1)),
            "adapter.scaling=rank",
            "sample.prompts=[]",
            "adapter.strength=1.0",  # the only one that method full has
        ]

    def baselines(self, folder: Path) -> list[Result]:
        """The rows of the bare model, prompted for the style that it knows and for the target style."""
        settings, results = self.settings, []
        for name, template in ((BARE_FLAT, settings.flat_prompt), (BARE, settings.prompt)):
            found = self.classified(folder, name, template, settings.report, self.config.seeds)
            results.append(Result(name, mean_metrics(found, settings.style, over_seeds=False)))
        return results

    def value(self, trainings: Trainings, training: Training) -> float:
        """The mean probability of the right style and concept on the `tune` things."""
        tune, adapter = self.settings.tune, trainings.adapter(training)
        found = self.classified(trainings.folder, training.name, self.settings.prompt, tune, tune.seeds, adapter)
        return float(found.soft_both(self.settings.style).mean())

    def scored(self, trainings: Trainings, training: Training) -> str:
        """The scores of the `report` things, which every training generates with its own seed.

        Coordinates are left out: they are four fifths of a row, for a Fréchet distance, which has no interval.
        """
        prompt, report = self.settings.prompt, self.settings.report
        adapter = trainings.adapter(training)
        found = self.classified(trainings.folder, training.name, prompt, report, (training.seed,), adapter)
        return replace(found, projected=None).as_json()

    def scores(self, texts: Sequence[str]) -> Scores:
        """The scores of trainings that differ in nothing but the seed."""
        return concatenate_seeds([Scores.from_json(text) for text in texts])

    def confidence_intervals(self, scores: Scores) -> dict[str, ConfidenceInterval]:
        """The intervals over things and trainings, by metric."""
        return mean_metrics(scores, self.settings.style, over_seeds=len(scores.seeds) > 1)

    def cells(self, scores: Scores) -> np.ndarray:
        """The probability of the style, divided by the rank of the thing, (K, S)."""
        return scores.soft_both(self.settings.style)

    def classified(
        self,
        folder: Path,
        name: str,
        template: str,
        choice: RoleConfig,
        seeds: Sequence[int],
        adapter: Path | None = None,
    ) -> Scores:
        """Generates and classifies images of things, unless the folder has their scores.

        Args:
            folder: The campaign's folder.
            name: The name of the training or of the bare model, for file names.
            template: The prompt, with {thing} for the thing.
            choice: Which things.
            seeds: The seeds of the images of each thing.
            adapter: The adapter folder to generate with; None generates with the bare model.
        """
        stem = file_stem(name, choice)
        path = folder / SCORES / f"{stem}.json"
        if not path.is_file():
            concepts = self.concepts[choice.role]
            model = self.load_model()
            if adapter is not None:
                load_adapter(model, adapter, forward=backends.select("auto"))
            cells = [(concept, seed) for concept in concepts for seed in seeds]
            prompts = [fill(template, concept) for concept, _ in cells]
            images = sample_merged(model, prompts, [seed for _, seed in cells], self.settings.sampling, stem)
            for (concept, seed), image in zip(cells, images, strict=True):
                save_atomically(folder / "pictures" / stem / f"{concept.code}-seed{seed}.png", image)
            keep_circumstances(path)
            self.classifier.scores(self.encoder(images), concepts, seeds).save(path)
        return Scores.load(path)  # rounded, as a resumed campaign reads them

    def report(
        self,
        folder: Path,
        results: Sequence[Result],
        scores: Mapping[Variant, Scores],
        trained: Mapping[str, Sequence[Training]],
    ) -> Report:
        """The table, the paired differences, the accuracy of the classifier, and a contact sheet."""
        style, things = self.settings.style, len(self.concepts[self.settings.report.role])
        number = num_trainings(trained)
        of_each = f"{number} trainings" if number > 1 else "one training"
        paragraphs = [
            f"Style {style}, {things} things that no adapter has seen, {of_each} of "
            f"{self.config.steps} steps; 95 % intervals over things and trainings. Both: in the style and the right "
            "thing. Full fine-tuning trains all weights of the same layers.",
            image_results_table(results),
            image_contrasts_table(self.config.ranks, scores, style),
            self.classifier.describe(),
        ]
        return Report(paragraphs, image_results_csv(results), self.contact_sheet(folder, trained))

    def contact_sheet(self, folder: Path, trained: Mapping[str, Sequence[Training]]) -> Image.Image:
        """A row per row of the table, a column per thing (evenly spaced), with the first seed of each.

        Of trainings whose rows come from elsewhere there are no images.
        """
        concepts = self.concepts[self.settings.report.role]
        columns = spaced_concepts(concepts, min(self.settings.columns, len(concepts)))
        names = {BARE_FLAT: BARE_FLAT, BARE: BARE} | {row: found[0].name for row, found in trained.items()}
        folders = {row: folder / "pictures" / file_stem(name, self.settings.report) for row, name in names.items()}
        generated = {row: images for row, images in folders.items() if images.is_dir()}
        seed = self.config.seeds[0]
        rows = [
            [Image.open(each / f"{concept.code}-seed{seed}.png") for concept in columns] for each in generated.values()
        ]
        return image_grid(rows, list(generated), [concept.name for concept in columns])


def file_stem(name: str, choice: RoleConfig) -> str:
    """The name of the folder of images, and of the file of their scores."""
    return f"{name}-{choice.role}".replace(", ", "-").replace(" ", "-")
