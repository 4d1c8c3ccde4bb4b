"""Compares the bare model, full fine-tuning, LoRA and DoRA (also at half the rank) as style adapters of one SDXL model.

Every method at every rank gets its own learning rate: all candidates are trained once and judged on the `tune` things;
the best one is trained once per seed of `report` and judged on things that neither training nor tuning has seen. The
training that won the tuning counts as the first of these and may be a lucky one. Every finished training, its pictures
and its scores are files in `output`, so a campaign that was cut off goes on.
"""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

import dora_mm
from dora_mm.config.loader import differing_keys, dump_config, load_config, resolve_model, resolve_path
from dora_mm.config.schema import CompareSDXLConfig, ConceptChoice, TrainSDXLConfig
from dora_mm.data.images import digest_of, read_captioned_images
from dora_mm.eval.comparison import FULL, Result, Variant, contrasts_table, results_csv, results_table, variants
from dora_mm.eval.encoder import Encoder
from dora_mm.eval.icons import fill
from dora_mm.eval.judge import FILES, Judge, evenly
from dora_mm.eval.scores import Scores, join_seeds, summarize, write_json
from dora_mm.io.digest import module_digest
from dora_mm.models.sdxl import SDXL, load_sdxl
from dora_mm.sampling.before_after import built_once
from dora_mm.sampling.grids import sheet
from dora_mm.sampling.sdxl import sample
from dora_mm.train.run import RunDirectory

log = logging.getLogger(__name__)
BARE_FLAT, BARE = "bare model, flat prompts", "bare model"
DONE = "summary.json"  # the last thing that a training writes
FREE_KEYS = ("workers", "columns", "name")  # these change no number
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Training:
    variant: Variant
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant.key}-lr{self.rate:g}-seed{self.seed}"


def main(config: CompareSDXLConfig, *, resume: Path | None = None) -> None:
    campaign = Campaign(config)
    bare = {
        name: campaign.scores(name, template, config.report, config.report.seeds)
        for name, template in ((BARE_FLAT, config.flat_prompt), (BARE, config.prompt))
    }
    chosen = choose_rates(campaign, variants(config.ranks))
    reported = {
        variant: [Training(variant, rate, seed) for seed in config.report.seeds]
        for variant, (rate, _) in chosen.items()
    }
    campaign.train([training for trainings in reported.values() for training in trainings])
    scores = {
        variant: join_seeds([campaign.reported(training) for training in trainings])
        for variant, trainings in reported.items()
    }
    write_report(campaign, bare, scores, chosen)


def rates_of(config: CompareSDXLConfig, variant: Variant) -> list[float]:
    candidates = config.learning_rates
    return sorted({"full": candidates.full, "lora": candidates.lora, "dora": candidates.dora}[variant.method])


def choose_rates(campaign: "Campaign", wanted: Sequence[Variant]) -> dict[Variant, tuple[float, bool]]:
    """The rate with the best score on the `tune` things, and whether it lies at the end of those tried.

    While the best one lies at an end, up to `extra_rates` further ones are tried there, the same factor apart.
    """
    config = campaign.config
    found: dict[Variant, dict[float, float]] = {variant: {} for variant in wanted}
    pending = {variant: rates_of(config, variant) for variant in wanted}
    for extra_left in range(config.extra_rates, -1, -1):
        trainings = [
            Training(variant, rate, config.report.seeds[0]) for variant, rates in pending.items() for rate in rates
        ]
        campaign.train(trainings)
        for training in trainings:
            found[training.variant][training.rate] = campaign.tuned(training)
        pending = {
            variant: [beyond(found[variant])] for variant in wanted if extra_left and best_at_end(found[variant])
        }
    for variant in wanted:
        campaign.write_rates(variant, found[variant])
    return {variant: (best_of(tried), best_at_end(tried)) for variant, tried in found.items()}


def best_of(tried: dict[float, float]) -> float:
    return max(sorted(tried), key=tried.__getitem__)


def best_at_end(tried: dict[float, float]) -> bool:
    return best_of(tried) in (min(tried), max(tried))


def beyond(tried: dict[float, float]) -> float:
    """The next rate past the end where the best one lies."""
    rates = sorted(tried, reverse=best_of(tried) == min(tried))
    return rates[-1] ** 2 / rates[-2]


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
        self.device = Accelerator().device
        model = self.model()
        self.judge.check_model(model.resolution, module_digest(model.vae))
        self.encoder = Encoder(self.device)
        self.folder = open_folder(config, self.inputs(model))

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
        wanted = self.base.model
        vae = resolve_model(wanted.vae, "model.vae") if wanted.vae else None
        model = load_sdxl(resolve_model(wanted.path), dtype=getattr(torch, wanted.dtype), vae=vae)
        return model.freeze().to(self.device)

    def tuned(self, training: Training) -> float:
        """How good a rate is: the mean chance of "in the style and the right thing" on the `tune` things."""
        tune = self.config.tune
        scores = self.scores(training.name, self.config.prompt, tune, tune.seeds, training)
        return float(scores.soft_both(self.config.style).mean())

    def reported(self, training: Training) -> Scores:
        """The scores of one training on the reported things, under its own seed."""
        return self.scores(training.name, self.config.prompt, self.config.report, (training.seed,), training)

    def run_folder(self, training: Training) -> Path:
        return self.folder / "runs" / training.name

    def train(self, trainings: Sequence[Training]) -> None:
        """Trains those that are not done yet, `workers` at a time, and goes on with those that were cut off.

        Raises:
            ValueError: a training stopped with a sentence. The others are told to save their state, as they are when
                this process is interrupted.
        """
        left = [training for training in trainings if not (self.run_folder(training) / DONE).is_file()]
        if not left:
            return
        waiting, running = left[::-1], []
        with tqdm(total=len(left), desc="trainings", unit="training", disable=None) as bar:  # None: terminals only
            try:
                while waiting or running:
                    while waiting and len(running) < self.config.workers:
                        running.append(self.start(waiting.pop()))
                    time.sleep(POLL_SECONDS)
                    for job in [job for job in running if job.process.poll() is not None]:
                        running.remove(job)
                        self.finish(job)
                        bar.update()
            finally:
                for job in running:
                    job.process.terminate()
                for job in running:
                    job.process.wait()

    def start(self, training: Training) -> "Job":
        folder = self.run_folder(training)
        if (folder / "config.yaml").is_file():
            arguments = ["train", "--resume", str(folder)]
        else:
            shutil.rmtree(folder, ignore_errors=True)
            settings = [*overrides(self.config, training), f"output={folder}"]
            arguments = ["train", self.config.base, *(item for text in settings for item in ("--set", text))]
        threads = max(1, torch.get_num_threads() // self.config.workers)
        return start_job(training, arguments, self.folder / "logs" / f"{training.name}.txt", threads)

    def finish(self, job: "Job") -> None:
        check_job(job)
        shutil.rmtree(self.run_folder(job.training) / "checkpoints", ignore_errors=True)
        log.info("Trained %s.", job.training.name)

    def summary(self, training: Training) -> dict[str, Any]:
        return json.loads((self.run_folder(training) / DONE).read_text())

    @staticmethod
    def stem(name: str, choice: ConceptChoice) -> str:
        return f"{name}-{choice.role}".replace(", ", "-").replace(" ", "-")

    def write_rates(self, variant: Variant, found: dict[float, float]) -> None:
        """rates/<variant>.json: what each candidate scored on the `tune` things."""
        write_json(self.folder / "rates" / f"{variant.key}.json", {f"{rate:g}": found[rate] for rate in sorted(found)})

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
            networks = {part: network for part, network in model.networks.items() if part != "vae"}
            dora_mm.load_adapter(networks, self.run_folder(training) / "adapter")
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
        "sample.strength=1",  # weights trained whole have no other
    ]


@dataclass(frozen=True)
class Job:
    training: Training
    process: subprocess.Popen
    log_file: Path


def start_job(training: Training, arguments: list[str], log_file: Path, threads: int) -> Job:
    """dora-mm in a process of its own, its output in a file."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dora_mm", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
    return Job(training, process, log_file)


def check_job(job: Job) -> None:
    """Raises for a training that ended in any other way than done."""
    status = job.process.returncode
    if status == 2:
        sentence = job.log_file.read_text().strip().splitlines()[-1]
        raise ValueError(f"a training of the comparison stopped: {sentence}")
    if status != 0:
        raise RuntimeError(f"{job.training.name} ended with exit code {status}; its output is in {job.log_file}")


def open_folder(config: CompareSDXLConfig, inputs: dict[str, str]) -> Path:
    """The campaign's folder: a new one, or one that was started with the same config and the same files."""
    folder = Path(config.output).expanduser()
    saved = folder / "config.yaml"
    if not folder.exists():
        return RunDirectory.create(config.name, dump_config(config), config.output, inputs=inputs).path
    if not saved.is_file():
        raise ValueError(f"output: {folder} exists and is no comparison: name another folder")
    differing = [key for key in differing_keys(load_config(saved), config) if key not in FREE_KEYS]
    differing += RunDirectory(folder).changed(inputs)
    if differing:
        raise ValueError(f"output: {folder} was started with other values of {', '.join(differing)}: name another")
    return folder


# --- what comes out --------------------------------------------------------------------------------------------------


def write_report(
    campaign: Campaign,
    bare: dict[str, Scores],
    scores: dict[Variant, Scores],
    chosen: dict[Variant, tuple[float, bool]],
) -> None:
    """table.md, results.csv and sheet.png."""
    config, judge = campaign.config, campaign.judge
    results = [
        Result(name, None, "", summarize(found, config.style, judge.space, over_seeds=False))
        for name, found in bare.items()
    ]
    for label, variant in table_rows(config.ranks):
        rate, at_end = chosen[variant]
        metrics = summarize(scores[variant], config.style, judge.space, over_seeds=True)
        parameters = campaign.summary(Training(variant, rate, config.report.seeds[0]))["parameters"]
        results.append(Result(label, parameters, f"{rate:g}{'*' if at_end else ''}", metrics))
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


def table_rows(ranks: Sequence[int]) -> list[tuple[str, Variant]]:
    rows = [(str(FULL), FULL)]
    for rank in sorted(ranks):
        rows += [(str(Variant(method, rank)), Variant(method, rank)) for method in ("lora", "dora")]
        if rank > 1:
            rows.append((f"DoRA, half of rank {rank}", Variant("dora", rank // 2)))
    return rows


def draw_picture(campaign: Campaign, chosen: dict[Variant, tuple[float, bool]]) -> None:
    """Rows: method; columns: things, spread over the reported ones; the first seed of everything."""
    config = campaign.config
    concepts = campaign.concepts[config.report.role]
    columns = evenly(concepts, min(config.columns, len(concepts)))
    seed = config.report.seeds[0]
    stems = {name: campaign.stem(name, config.report) for name in (BARE_FLAT, BARE)}
    for label, variant in table_rows(config.ranks):
        stems[label] = campaign.stem(Training(variant, chosen[variant][0], seed).name, config.report)
    rows = [
        [Image.open(campaign.folder / "pictures" / stem / f"{concept.code}-seed{seed}.png") for concept in columns]
        for stem in stems.values()
    ]
    sheet(rows, list(stems), [concept.name for concept in columns]).save(campaign.folder / "sheet.png")
