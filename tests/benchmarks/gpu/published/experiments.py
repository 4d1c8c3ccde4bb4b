"""The experiments of PEFT's method comparison that `make gpu` repeats, by PEFT's names."""

from dataclasses import dataclass

SEEDS = (0, 1, 2)  # the first is PEFT's own


@dataclass(frozen=True)
class Experiment:
    """One adapter.

    Attributes:
        name: Of its result.
        settings_of: The published experiment whose settings it has.
        is_fused: Whether `fuse_peft` runs its layers.
    """

    name: str
    settings_of: str
    is_fused: bool = False


@dataclass(frozen=True)
class Comparison:
    """One of PEFT's comparisons.

    Attributes:
        task: Its name there, and of the folder of results.
        files: What it reads, besides its models.
        data: The data sets that a result names, by PEFT's names for them.
        experiments: In the order in which they are trained.
        score: Of the test; more is better.
        lost: How much of the base model was lost; less is better.
    """

    task: str
    files: tuple[str, ...]
    data: tuple[str, ...]
    experiments: tuple[Experiment, ...]
    score: str
    lost: str


def experiments(lora: str, dora: str, fused: str) -> tuple[Experiment, ...]:
    return Experiment(dora, dora), Experiment(fused, dora, True), Experiment(lora, lora)


METAMATH = Comparison(
    task="MetaMathQA",
    files=("metamathqa.jsonl", "gsm8k_valid.jsonl", "gsm8k_test.jsonl", "wiki.jsonl"),
    data=("metamath", "gsm8k"),
    experiments=experiments(
        "lora--llama-3.2-3B-rank32", "lora--llama-3.2-3B-rank32-dora", "lora--llama-3.2-3B-rank32-dora-fused"
    ),
    score="accuracy",
    lost="forgetting",
)
IMAGES = Comparison(
    task="image-gen",
    files=("cats",),
    data=("cats",),
    experiments=experiments("lora--flux2-klein-rank64", "dora--flux2-klein-rank64", "dora--flux2-klein-rank64-fused"),
    score="dino_similarity",
    lost="drift",
)


def name_of(experiment: str, seed: int) -> str:
    """The name of a result: PEFT's own for its seed."""
    return f"{experiment}-seed{seed}" if seed else experiment
