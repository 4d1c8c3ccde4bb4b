"""Compares the bare model, full fine-tuning, LoRA and DoRA (also at half the rank) as style adapters of one SDXL model.

Every method at every rank gets its own learning rate: all candidates are trained once and judged on the `tune`
concepts; the best one is trained once per seed of `report` and judged on concepts that neither training nor tuning
used. The training that won the tuning counts as the first of these, which may favour lucky ones. Every finished
training, its images and its scores are files in `output`, so an interrupted comparison resumes when it is started
again.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image

import dora_mm
from dora_mm.config.images import TrainDiffusionConfig
from dora_mm.config.judge import CompareImagesConfig, ConceptChoice
from dora_mm.config.loader import dump_config, load_config, resolve_path
from dora_mm.data.images.folder import digest_of, read_training_images
from dora_mm.eval.comparison import Variant, table_rows, variants
from dora_mm.eval.images.comparison import Result, contrasts_table, results_csv, results_table
from dora_mm.eval.images.encoder import Encoder
from dora_mm.eval.images.judge import FILES, Judge, evenly_spaced
from dora_mm.eval.images.prompts import fill
from dora_mm.eval.images.scores import Scores, concatenate_seeds, summarize
from dora_mm.models.diffusion import ImageModel
from dora_mm.models.image_families import load_image_model
from dora_mm.sampling.before_after import weights_computed_once
from dora_mm.sampling.grids import sheet
from dora_mm.sampling.pictures import sample
from dora_mm.train.campaign import Chosen, Training, Trainings, candidate_rates, open_campaign
from dora_mm.utils.devices import default_device
from dora_mm.utils.digest import module_digest

BARE_FLAT, BARE = "bare model, flat prompts", "bare model"
FREE_KEYS = ("workers", "columns", "name")  # config keys that change no result


def main(config: CompareImagesConfig, *, resume: Path | None = None) -> None:
    """Runs what is missing of the comparison, and prints the table.

    Writes to the folder `output`: table.md, results.csv and sheet.png, the trainings in runs/, their output in logs/,
    the images in pictures/, their scores in scores/ and the values of all learning rates in rates/.

    Args:
        config: The config.
        resume: Unused: the same command resumes an interrupted comparison.

    Raises:
        ValueError: The base config, the judge, the model or the images cannot be used, or `output` was started with a
            different config or inputs; the folder is created only after these checks. Or a training reported a user's
            mistake.
        RuntimeError: A training failed in any other way.
    """
    campaign = Campaign(config)
    bare = {
        name: campaign.scores(name, template, config.report, config.report.seeds)
        for name, template in ((BARE_FLAT, config.flat_prompt), (BARE, config.prompt))
    }
    chosen = campaign.trainings.choose_rates(
        candidate_rates(config.learning_rates, compared(config)),
        campaign.tuned,
        seed=config.report.seeds[0],
        extra_rates=config.extra_rates,
    )
    reported = campaign.trainings.train_chosen(chosen, config.report.seeds)
    scores = {
        variant: concatenate_seeds([campaign.reported(training) for training in trainings])
        for variant, trainings in reported.items()
    }
    write_report(campaign, bare, scores, chosen)


def compared(config: CompareImagesConfig) -> list[Variant]:
    """What is trained: full fine-tuning only where it has learning rates."""
    return variants(config.ranks, full=config.learning_rates.full is not None)


class Campaign:
    """A comparison and its folder: trains, draws and judges what the folder does not have yet.

    Raises:
        ValueError: The config or the files that it names cannot be used, or the folder belongs to another comparison.
    """

    def __init__(self, config: CompareImagesConfig):
        self.config = config
        base = load_config(config.base)
        if not isinstance(base, TrainDiffusionConfig):
            raise ValueError(f"base: {config.base} is a config of {base.pipeline}, not of train_diffusion")
        self.base = base
        for variant in compared(config):
            load_config(config.base, overrides(config, Training(variant, 1e-3, 0)))  # reports mistakes now
        self.judge = Judge.load(resolve_path(config.judge, "judge"))
        self.concepts = {choice.role: self.judge.choose(choice.role, choice.count) for choice in self.choices}
        self.device = default_device()
        model = self.model()
        self.judge.check_model(model.resolution, module_digest(model.networks["vae"]))
        self.encoder = Encoder(self.device)
        self.folder = open_campaign(config, config.output, self.inputs(model), FREE_KEYS)
        self.trainings = Trainings(self.folder, config.base, config.workers, partial(overrides, config))

    @property
    def choices(self) -> tuple[ConceptChoice, ConceptChoice]:
        return self.config.tune, self.config.report

    def inputs(self, model: ImageModel) -> dict[str, str]:
        """The identity of what the config names: the base config, its images, the model's weights and the judge."""
        judge, images = resolve_path(self.config.judge, "judge"), read_training_images(self.base.data)
        return {
            "base": dump_config(self.base),
            "the pictures and captions": digest_of(images),
            **{f"the model's {name}": module_digest(network) for name, network in model.networks.items()},
            "the judge's files": hashlib.sha256(b"".join((judge / name).read_bytes() for name in FILES)).hexdigest(),
        }

    def model(self) -> ImageModel:
        """Loads the bare model, once per adapter, because weights of method `full` replace the base's."""
        return load_image_model(self.base.model).to(self.device)

    def tuned(self, training: Training) -> float:
        """The value of a learning rate: the mean probability of the right style and concept on the `tune` concepts."""
        tune = self.config.tune
        scores = self.scores(training.name, self.config.prompt, tune, tune.seeds, training)
        return float(scores.soft_both(self.config.style).mean())

    def reported(self, training: Training) -> Scores:
        """The scores of one training on the `report` concepts, drawn with the seed of the training."""
        return self.scores(training.name, self.config.prompt, self.config.report, (training.seed,), training)

    @staticmethod
    def stem(name: str, choice: ConceptChoice) -> str:
        return f"{name}-{choice.role}".replace(", ", "-").replace(" ", "-")

    def scores(
        self,
        name: str,
        template: str,
        choice: ConceptChoice,
        seeds: Sequence[int],
        training: Training | None = None,
    ) -> Scores:
        """Draws and judges the concepts of `choice`, unless the folder has their scores.

        Args:
            name: The name of the training or of the bare model, for file names.
            template: The prompt, with {thing} for the concept.
            choice: Which concepts.
            seeds: The seeds of the images of each concept.
            training: Draw with the adapter of this training; None draws with the bare model.
        """
        stem = self.stem(name, choice)
        path = self.folder / "scores" / f"{stem}.json"
        if path.is_file():
            return Scores.load(path)
        concepts = self.concepts[choice.role]
        images = self.draw(template, choice, seeds, training, stem)
        folder = self.folder / "pictures" / stem
        folder.mkdir(parents=True, exist_ok=True)
        cells = [(concept.code, seed) for concept in concepts for seed in seeds]
        for (code, seed), image in zip(cells, images, strict=True):
            image.save(folder / f"{code}-seed{seed}.png")
        self.judge.scores(self.encoder(images), concepts, seeds).save(path)
        return Scores.load(path)  # rounded, as a resumed comparison reads them

    def draw(
        self, template: str, choice: ConceptChoice, seeds: Sequence[int], training: Training | None, description: str
    ) -> list[Image.Image]:
        model = self.model()
        if training is not None:
            dora_mm.load_adapter(model.adaptable, self.trainings.adapter(training))
        settings = self.config.draw
        with weights_computed_once(model.networks.values()):
            return sample(
                model,
                [fill(template, concept) for concept in self.concepts[choice.role] for _ in seeds],
                [seed for _ in self.concepts[choice.role] for seed in seeds],
                steps=settings.steps,
                guidance=settings.guidance,
                negative_prompt=settings.negative_prompt,
                batch_size=settings.batch_size,
                description=description,
            )


def overrides(config: CompareImagesConfig, training: Training) -> list[str]:
    """The overrides of the base config for one training; alpha = rank, so that every update is scaled by 1."""
    variant = training.variant
    rank = variant.rank or 1  # full fine-tuning ignores it
    return [
        f"seed={training.seed}",
        f"adapter.method={variant.method}",
        f"adapter.rank={rank}",
        f"adapter.alpha={float(rank)}",
        f"optimizer.lr={training.rate!r}",
        "optimizer.magnitude_lr=null",
        f"train.steps={config.steps}",
        "train.checkpoint_every=0",
        "sample.prompts=[]",
        "adapter.strength=1.0",  # the only one that method full has
    ]


# --- the report --------------------------------------------------------------------------------------------------


def write_report(
    campaign: Campaign,
    bare: dict[str, Scores],
    scores: dict[Variant, Scores],
    chosen: dict[Variant, Chosen],
) -> None:
    """Writes table.md, results.csv and sheet.png, and prints the table."""
    config, judge = campaign.config, campaign.judge
    results = [
        Result(name, None, "", summarize(found, config.style, judge.style_space, over_seeds=False))
        for name, found in bare.items()
    ]
    for label, variant in table_rows(config.ranks, chosen):
        rate = chosen[variant].rate
        metrics = summarize(scores[variant], config.style, judge.style_space, over_seeds=True)
        parameters = campaign.trainings.summary(Training(variant, rate, config.report.seeds[0]))["parameters"]
        results.append(Result(label, parameters, str(chosen[variant]), metrics))
    things, trainings = len(campaign.concepts[config.report.role]), len(config.report.seeds)
    text = "\n\n".join(
        [
            f"Style {config.style}, {things} things that no adapter has seen, {trainings} trainings of {config.steps} "
            "steps; 95 % intervals over things and trainings. Both: in the style and the right thing. Full fine-tuning "
            "trains all weights of the same layers.",
            results_table(results),
            contrasts_table(config.ranks, scores, config.style),
            judge.describe(),
        ]
    )
    (campaign.folder / "table.md").write_text(text + "\n", encoding="utf-8")
    (campaign.folder / "results.csv").write_text(results_csv(results), encoding="utf-8")
    save_sheet(campaign, chosen)
    print(text)
    print(f"\ntable    {campaign.folder / 'table.md'}\nsheet    {campaign.folder / 'sheet.png'}")


def save_sheet(campaign: Campaign, chosen: dict[Variant, Chosen]) -> None:
    """Saves a sheet: a row per method, a column per concept (evenly spaced), with the first seed of each."""
    config = campaign.config
    concepts = campaign.concepts[config.report.role]
    columns = evenly_spaced(concepts, min(config.columns, len(concepts)))
    seed = config.report.seeds[0]
    stems = {name: campaign.stem(name, config.report) for name in (BARE_FLAT, BARE)}
    for label, variant in table_rows(config.ranks, chosen):
        stems[label] = campaign.stem(Training(variant, chosen[variant].rate, seed).name, config.report)
    rows = [
        [Image.open(campaign.folder / "pictures" / stem / f"{concept.code}-seed{seed}.png") for concept in columns]
        for stem in stems.values()
    ]
    sheet(rows, list(stems), [concept.name for concept in columns]).save(campaign.folder / "sheet.png")
