"""Compares the bare model, full fine-tuning, LoRA and DoRA (also at half the rank) as style adapters of one SDXL model.

Every method at every rank gets its own learning rate: all candidates are trained once and judged on the `tune` things;
the best one is trained once per seed of `report` and judged on things that neither training nor tuning has seen. The
training that won the tuning counts as the first of these and may be a lucky one. Every finished training, its pictures
and its scores are files in `output`, so a campaign that was cut off goes on.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image

import dora_mm
from dora_mm.config.loader import dump_config, load_config, resolve_path
from dora_mm.config.sdxl import CompareSDXLConfig, ConceptChoice, TrainSDXLConfig
from dora_mm.data.images.folder import digest_of, read_captioned_images
from dora_mm.eval.comparison import Variant, table_rows, variants
from dora_mm.eval.images.comparison import Result, contrasts_table, results_csv, results_table
from dora_mm.eval.images.encoder import Encoder
from dora_mm.eval.images.judge import FILES, Judge, evenly_spaced
from dora_mm.eval.images.prompts import fill
from dora_mm.eval.images.scores import Scores, join_seeds, summarize
from dora_mm.models.sdxl.loading import SDXL, load_configured
from dora_mm.sampling.before_after import built_once
from dora_mm.sampling.grids import sheet
from dora_mm.sampling.sdxl import sample
from dora_mm.train.campaign import Chosen, Training, Trainings, open_campaign, rates_of
from dora_mm.utils.devices import default_device
from dora_mm.utils.digest import module_digest

BARE_FLAT, BARE = "bare model, flat prompts", "bare model"
FREE_KEYS = ("workers", "columns", "name")  # these change no number


def main(config: CompareSDXLConfig, *, resume: Path | None = None) -> None:
    campaign = Campaign(config)
    bare = {
        name: campaign.scores(name, template, config.report, config.report.seeds)
        for name, template in ((BARE_FLAT, config.flat_prompt), (BARE, config.prompt))
    }
    chosen = campaign.trainings.choose_rates(
        rates_of(config.learning_rates, variants(config.ranks)),
        campaign.tuned,
        seed=config.report.seeds[0],
        extra_rates=config.extra_rates,
    )
    reported = {
        variant: [Training(variant, found.rate, seed) for seed in config.report.seeds]
        for variant, found in chosen.items()
    }
    campaign.trainings.train(training for trainings in reported.values() for training in trainings)
    scores = {
        variant: join_seeds([campaign.reported(training) for training in trainings])
        for variant, trainings in reported.items()
    }
    write_report(campaign, bare, scores, chosen)


class Campaign:
    """The folder of a comparison: what has been trained, drawn and judged in it, and how to add to it."""

    def __init__(self, config: CompareSDXLConfig):
        self.config = config
        base = load_config(config.base)
        if not isinstance(base, TrainSDXLConfig):
            raise ValueError(f"base: {config.base} is a config of {base.pipeline}, not of train_sdxl")
        self.base = base
        for variant in variants(config.ranks):
            load_config(config.base, overrides(config, Training(variant, 1e-3, 0)))  # what is wrong shows now
        self.judge = Judge.load(resolve_path(config.judge, "judge"))
        self.concepts = {choice.role: self.judge.choose(choice.role, choice.count) for choice in self.choices}
        self.device = default_device()
        model = self.model()
        self.judge.check_model(model.resolution, module_digest(model.vae))
        self.encoder = Encoder(self.device)
        self.folder = open_campaign(config, config.output, self.inputs(model), FREE_KEYS)
        self.trainings = Trainings(self.folder, config.base, config.workers, partial(overrides, config))

    @property
    def choices(self) -> tuple[ConceptChoice, ConceptChoice]:
        return self.config.tune, self.config.report

    def inputs(self, model: SDXL) -> dict[str, str]:
        """The identity of what the config names: the base config, its pictures, the model's weights and the judge."""
        judge, data = resolve_path(self.config.judge, "judge"), self.base.data
        images = read_captioned_images(data.folder, instance_prompt=data.instance_prompt, placeholder=data.placeholder)
        return {
            "base": dump_config(self.base),
            "the pictures and captions": digest_of(images),
            **{f"the model's {name}": module_digest(network) for name, network in model.networks.items()},
            "the judge's files": hashlib.sha256(b"".join((judge / name).read_bytes() for name in FILES)).hexdigest(),
        }

    def model(self) -> SDXL:
        """Loaded anew for every adapter, so that none sees what another one left (full weights replace the base's)."""
        return load_configured(self.base.model).to(self.device)

    def tuned(self, training: Training) -> float:
        """How good a rate is: the mean chance of "in the style and the right thing" on the `tune` things."""
        tune = self.config.tune
        scores = self.scores(training.name, self.config.prompt, tune, tune.seeds, training)
        return float(scores.soft_both(self.config.style).mean())

    def reported(self, training: Training) -> Scores:
        """The scores of one training on the reported things, under its own seed."""
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
        """Draws the things of `choice` and judges them, unless that is done."""
        stem = self.stem(name, choice)
        path = self.folder / "scores" / f"{stem}.json"
        if path.is_file():
            return Scores.load(path)
        concepts = self.concepts[choice.role]
        pictures = self.draw(template, choice, seeds, training, stem)
        folder = self.folder / "pictures" / stem
        folder.mkdir(parents=True, exist_ok=True)
        cells = [(concept.code, seed) for concept in concepts for seed in seeds]
        for (code, seed), picture in zip(cells, pictures, strict=True):
            picture.save(folder / f"{code}-seed{seed}.png")
        self.judge.scores(self.encoder(pictures), concepts, seeds).save(path)
        return Scores.load(path)  # rounded, as a campaign that is gone on with will see them

    def draw(
        self, template: str, choice: ConceptChoice, seeds: Sequence[int], training: Training | None, description: str
    ) -> list[Image.Image]:
        model = self.model()
        if training is not None:
            dora_mm.load_adapter(model.adaptable, self.trainings.adapter(training))
        wanted = self.config.draw
        with built_once(model.networks.values()):
            return sample(
                model.pipeline(),
                [fill(template, concept) for concept in self.concepts[choice.role] for _ in seeds],
                [seed for _ in self.concepts[choice.role] for seed in seeds],
                steps=wanted.steps,
                guidance=wanted.guidance,
                negative_prompt=wanted.negative_prompt,
                batch_size=wanted.batch_size,
                description=description,
            )


def overrides(config: CompareSDXLConfig, training: Training) -> list[str]:
    """What a training has in place of the base config's values; alpha = rank, so that every update is scaled by 1."""
    variant = training.variant
    rank = variant.rank or 1  # full fine-tuning reads none
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
        "adapter.strength=1.0",  # weights trained whole have no other
    ]


# --- what comes out --------------------------------------------------------------------------------------------------


def write_report(
    campaign: Campaign,
    bare: dict[str, Scores],
    scores: dict[Variant, Scores],
    chosen: dict[Variant, Chosen],
) -> None:
    """table.md, results.csv and sheet.png."""
    config, judge = campaign.config, campaign.judge
    results = [
        Result(name, None, "", summarize(found, config.style, judge.space, over_seeds=False))
        for name, found in bare.items()
    ]
    for label, variant in table_rows(config.ranks):
        rate = chosen[variant].rate
        metrics = summarize(scores[variant], config.style, judge.space, over_seeds=True)
        parameters = campaign.trainings.summary(Training(variant, rate, config.report.seeds[0]))["parameters"]
        results.append(Result(label, parameters, str(chosen[variant]), metrics))
    things, trainings = len(campaign.concepts[config.report.role]), len(config.report.seeds)
    text = "\n\n".join(
        [
            f"Style {config.style}, {things} things that no adapter has seen, {trainings} trainings of {config.steps} "
            "steps; 95 % intervals over things and trainings. Both: in the style and the right thing. Full fine-tuning "
            "trains the weights of the same layers whole.",
            results_table(results),
            contrasts_table(config.ranks, scores, config.style),
            judge.describe(),
        ]
    )
    (campaign.folder / "table.md").write_text(text + "\n", encoding="utf-8")
    (campaign.folder / "results.csv").write_text(results_csv(results), encoding="utf-8")
    draw_picture(campaign, chosen)
    print(text)
    print(f"\ntable    {campaign.folder / 'table.md'}\nsheet    {campaign.folder / 'sheet.png'}")


def draw_picture(campaign: Campaign, chosen: dict[Variant, Chosen]) -> None:
    """Predictions: method; columns: things, spread over the reported ones; the first seed of everything."""
    config = campaign.config
    concepts = campaign.concepts[config.report.role]
    columns = evenly_spaced(concepts, min(config.columns, len(concepts)))
    seed = config.report.seeds[0]
    stems = {name: campaign.stem(name, config.report) for name in (BARE_FLAT, BARE)}
    for label, variant in table_rows(config.ranks):
        stems[label] = campaign.stem(Training(variant, chosen[variant].rate, seed).name, config.report)
    rows = [
        [Image.open(campaign.folder / "pictures" / stem / f"{concept.code}-seed{seed}.png") for concept in columns]
        for stem in stems.values()
    ]
    sheet(rows, list(stems), [concept.name for concept in columns]).save(campaign.folder / "sheet.png")
