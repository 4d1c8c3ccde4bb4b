"""The trainings of a search for a learning rate: what they are, how long, and what each candidate changes of them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from dora_mm.adapting.files import digest_of_adapter
from dora_mm.adapting.initial import initial_identity
from dora_mm.config.images import TrainDiffusionConfig
from dora_mm.config.loader import dump_config, load_config
from dora_mm.config.schema import Section
from dora_mm.config.vl import TrainVLConfig
from dora_mm.data.images.folder import digest_of, read_images, read_training_images
from dora_mm.data.images.held_out import hold_out
from dora_mm.formats import adapter_digest
from dora_mm.models.images.families import identity_of
from dora_mm.studies.campaigns.halving import Candidate, lengths
from dora_mm.studies.campaigns.trainings import Training
from dora_mm.studies.config import TuneConfig
from dora_mm.studies.variants import Variant
from dora_mm.train.day import dated, day_for
from dora_mm.train.epochs import in_steps
from dora_mm.train.validation import LOSS
from dora_mm.utils.day import Day
from dora_mm.utils.yaml12 import KeyPath

KeyChanges = dict[KeyPath, Any]
RANKED = ("dora", "lora", "series", "parallel", "prefix")  # methods that have a rank
# Keys that are numbers of steps, with the least; those of a shorter training are in proportion
STEPS = {
    ("schedule", "warmup_steps"): 0,
    ("train", "stop_tokens_after"): 1,
    ("train", "stop_text_encoders_after"): 1,
}
UNUSED = ("train.gradients_at=[]", "evaluate.every=0", "evaluate.patience=null")


class TunedTrainings(Protocol):
    """Interface of a search's trainings, without their scoring."""

    steps: int  # the length of the base config's training, in optimizer steps
    day: Day  # for chat templates that use it, the same in all trainings

    @property
    def base(self) -> Any:
        """The config that all trainings share."""
        ...

    @property
    def inputs(self) -> Mapping[str, Any]:
        """Digests of the data and models that the config refers to, by a description of each."""
        ...

    def overrides(self, training: Training) -> list[str]:
        """The `key=value` overrides of the base config for one training."""
        ...

    def held_out_loss(self, summary: Mapping[str, Any]) -> float:
        """The held-out loss that a training has written into its summary.json."""
        ...


class TunedImages:
    """Trainings of adapters of images.

    Args:
        config: The config of the search.
        base: The base config, with the overrides.

    Raises:
        ValueError: The images cannot be used, or none are held out for scoring.
    """

    def __init__(self, config: TuneConfig, base: TrainDiffusionConfig):
        self.config, self.base, self.day = config, base, Day()
        self.steps = in_steps(base, 1).train.num_steps
        self.images = read_training_images(base.data)
        self.held_out = hold_out(self.images, base.data)[1]
        if config.selection_metric == "held_out" and not self.held_out:
            raise ValueError(
                f"--selection-metric held_out: {config.base} holds no images out: --set data.valid.share=0.1"
            )

    @property
    def inputs(self) -> Mapping[str, Any]:
        """As of a training: the images, the model's files, and an initial adapter."""
        found = {"base": dump_config(self.base), "the pictures and captions": digest_of(self.images)}
        preserved = read_images(self.base.data, "preserve")
        others = {"the held-out pictures": self.held_out, "the pictures to preserve": preserved}
        found |= {what: digest_of(images) for what, images in others.items() if images}
        return found | identity_of(self.base.model).inputs | initial_identity(self.base.adapter, adapter_digest)

    def overrides(self, training: Training) -> list[str]:
        """The overrides for one training, which generates no contact sheets."""
        return [*overrides_of(self.config, self, training), "sample.prompts=[]", "sample.every=0"]

    def held_out_loss(self, summary: Mapping[str, Any]) -> float:
        """The loss of the held-out images."""
        return summary[f"held_out_{LOSS}"]


class TunedVL:
    """Trainings on questions, answers and conversations.

    Args:
        config: The config of the search.
        base: The base config, with the overrides.

    Raises:
        ValueError: The model or the data cannot be used, or nothing is held out.
    """

    def __init__(self, config: TuneConfig, base: TrainVLConfig):
        from dora_mm.data.vl.splits import open_training, open_validation  # these need the extra vl
        from dora_mm.models.vl.families import load_vl_model, pinned
        from dora_mm.tasks.vl import VLBatches
        from dora_mm.utils.devices import default_device

        if missing := [task.task for task in base.data.all_tasks if task.valid is None]:
            raise ValueError(f"{config.base} has no valid split of {missing[0]}, by which rates are judged: data.valid")
        self.config, self.base = config, base
        tower, device = bool(base.adapter.vision_parts), default_device()
        day, settings = day_for(base.model, config.output), {"trained_tower": tower, "device": device}
        section = dated(base, day).model
        self.model = load_vl_model(pinned(section), base.vision, seed=base.seed, **settings)
        self.day = self.model.day
        self.day.source = day.source
        self.model.check(task.task for task in base.data.all_tasks)
        training = open_training(base.data, base.train.batch_size, self.model)
        splits = open_validation(base.data, base.evaluate, self.model, answered=True)
        accumulated = base.train.gradient_accumulation_steps
        batches = VLBatches(self.model, training, seed=base.seed, accumulated=accumulated)
        self.steps = base.train.steps or (base.train.epochs or 1) * batches.steps_per_epoch
        self.rows = {f"the data of {name}": found.table.identity for name, found in training.items()}
        self.rows |= {f"the validation data of {name}": found.identity for name, found in splits.items()}

    @property
    def inputs(self) -> Mapping[str, Any]:
        """As of a training: the rows of both splits, the model, and an initial adapter."""
        initial = initial_identity(self.base.adapter, digest_of_adapter)
        return {"base": dump_config(self.base), **self.rows, **self.model.identity.inputs, **initial}

    def overrides(self, training: Training) -> list[str]:
        """The overrides for one training."""
        return [*overrides_of(self.config, self, training), "train.epochs=null", "evaluate.base=false"]

    def held_out_loss(self, summary: Mapping[str, Any]) -> float:
        """The mean of the losses of the tasks' valid splits."""
        losses = [summary[f"{task.task}_{LOSS}"] for task in self.base.data.all_tasks]
        return sum(losses) / len(losses)


# --- candidates ------------------------------------------------------------------------------------------------------


def training_of(base: Any, candidate: Candidate, steps: int) -> Training:
    """The training of a candidate in so many steps."""
    return Training(Variant(base.adapter.method, candidate.rank, f"{steps} steps"), candidate.rate, base.seed)


def changes_for(base: Any, candidate: Candidate) -> KeyChanges:
    """A candidate's changes to the base config, by key: the rank with its alpha, and all rates in proportion."""
    changes: KeyChanges = {("optimizer", "lr"): candidate.rate}
    rates: KeyChanges = {("optimizer", "magnitude_lr"): base.optimizer.magnitude_lr}
    rates |= {("adapter", "parts", name, "lr"): part.lr for name, part in base.adapter.parts.items()}
    rates |= {("tokens", word, "lr"): token.lr for word, token in getattr(base, "tokens", {}).items()}
    ratio = candidate.rate / base.optimizer.lr
    changes |= {path: float(f"{rate * ratio:.6g}") for path, rate in rates.items() if rate is not None}
    if candidate.rank not in (None, base.adapter.rank):
        alpha = base.adapter.alpha_at(candidate.rank)
        changes |= {("adapter", "rank"): candidate.rank, ("adapter", "alpha"): alpha}
    return changes


def overrides_of(config: TuneConfig, trainings: TunedTrainings, training: Training) -> list[str]:
    """The overrides for a training of any kind: those of the search, its candidate's, and its length's."""
    base, steps = trainings.base, int(training.variant.setting.split()[0])
    changes = changes_for(base, Candidate(training.variant.rank, training.rate))
    for (section, key), least in STEPS.items():
        if value := getattr(getattr(base, section), key, None):
            changes[section, key] = max(least, value * steps // trainings.steps)
    changes["train", "steps"] = steps
    given = [text for text in config.overrides if text.partition("=")[0] != "train.epochs"]  # steps take their place
    return [*given, f"seed={base.seed}", *as_overrides(base, changes), *UNUSED]


def as_overrides(base: Section, changes: KeyChanges) -> list[str]:
    """Changes as `--set` takes them: names of parts have dots, so what is in a mapping of names changes as a whole."""
    sections = base.model_dump(mode="json", exclude_none=True, include={"adapter": {"parts"}, "tokens": True})
    found = {}
    for (*parents, key), value in changes.items():
        if len(parents) == 1:
            found[f"{parents[0]}.{key}"] = value
        else:
            full = sections["adapter"]["parts"] if parents[0] == "adapter" else sections["tokens"]
            full[parents[-1]][key] = value
            found[".".join(map(str, parents[:-1]))] = full
    return [f"{key}={json.dumps(value)}" for key, value in found.items()]


def check_trainings(config: TuneConfig, trainings: TunedTrainings, candidates: Sequence[Candidate]) -> None:
    """Checks the configs of all trainings.

    Raises:
        ValueError: One is invalid, or parts of the adapter have ranks of their own, which would hide those tried.
    """
    adapter = trainings.base.adapter
    ranked = [name for name, part in adapter.parts.items() if part.rank is not None]
    if ranked and any(each.rank not in (None, adapter.rank) for each in candidates):
        raise ValueError(f"--ranks: {config.base} gives {ranked[0]} a rank of its own in adapter.parts: leave that out")
    for each in candidates:
        for length in lengths(trainings.steps):
            load_config(config.base, trainings.overrides(training_of(trainings.base, each, length)))
