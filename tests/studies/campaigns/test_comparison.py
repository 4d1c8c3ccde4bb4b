"""A comparison chooses its rates by the mean over the seeds that it is told, which are then trained at all rates."""

import json

import numpy as np
import pytest

from dora_mm.config import load_config
from dora_mm.studies.campaigns.campaign import Campaign
from dora_mm.studies.campaigns.comparison import MethodComparison
from dora_mm.studies.campaigns.trainings import Training, Trainings
from dora_mm.studies.config import CompareConfig
from dora_mm.studies.variants import Variant
from dora_mm.utils.day import Day

RATES = [1e-3, 1e-2, 1e-1]
VALUES = {1e-3: (30, 50, 40), 1e-2: (45, 10, 10), 1e-1: (20, 20, 20)}  # by rate and seed: 0.01 has one lucky seed
LORA, DORA = Variant("lora", 4), Variant("dora", 4)


class Table:
    """Scores trainings by VALUES."""

    inputs, score_title, day = {}, "score", Day()

    def overrides(self, training):
        return [f"seed={training.seed}", f"optimizer.lr={training.rate}", f"adapter.method={training.variant.method}"]

    def value(self, trainings, training):
        return VALUES[training.rate][training.seed]

    def scored(self, trainings, training):
        return json.dumps([self.value(trainings, training) / 100] * 2)

    def scores(self, texts):
        return np.array([json.loads(text) for text in texts]).T

    def cells(self, scores):
        return scores


@pytest.fixture
def trained(monkeypatch):
    """The trainings that a comparison starts, which take no time."""
    found = []

    def train(self, trainings, finished):
        for training in trainings:
            found.append(training)
            finished(training)

    monkeypatch.setattr(Trainings, "train", train)
    monkeypatch.setattr(Trainings, "circumstances", lambda self, training: [])
    monkeypatch.setattr(Campaign, "digest", lambda self, training: "")
    return found


@pytest.fixture
def comparison(tmp_path):
    def build(folder, **changes):
        values = {"output": str(tmp_path / folder), "rows": str(tmp_path / "rows.csv"), "ranks": [4], "extra_rates": 0}
        values |= {"learning_rates": {"lora": RATES, "dora": RATES}, "seeds": [0, 1, 2], **changes}
        overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        config = load_config("configs/vl_bart/tuned.yaml", overrides)
        assert isinstance(config, CompareConfig)
        return MethodComparison(config, Table())

    return build


def test_rates_are_chosen_by_the_mean_of_these_seeds(comparison, trained):
    everything = {Training(variant, rate, seed) for variant in (LORA, DORA) for rate in RATES for seed in (0, 1, 2)}
    one = comparison("one", rate_seeds=1)
    assert one.search()[DORA] == {1e-3: 30, 1e-2: 45, 1e-1: 20}
    assert set(trained) == {training for training in everything if training.seed == 0}
    one.train_chosen(one.tried())
    assert set(trained) == everything  # the best rate and its neighbours with all seeds

    trained.clear()
    assert comparison("three", rate_seeds=3).tried() == one.tried()  # the other seeds' rows have no values
    two = comparison("two", rate_seeds=2)
    assert two.search()[DORA] == {1e-3: 40, 1e-2: 27.5, 1e-1: 20}
    assert set(trained) == {training for training in everything if training.seed == 1}
    three = comparison("three", rate_seeds=3)
    assert three.tried() == two.tried()  # of rows alone: by the seeds that all rates have
    assert three.about_seeds(three.tried()) == ["Seeds whose mean has chosen a rate: LoRA, rank 4: 2; DoRA, rank 4: 2."]

    trained.clear()
    assert three.search()[LORA] == {1e-3: 40, 1e-2: pytest.approx(65 / 3), 1e-1: 20}
    assert set(trained) == {training for training in everything if training.seed == 2}
    trained.clear()
    three.train_chosen(three.tried())
    assert trained == []
    assert comparison("other", rate_seeds=3).tried() == three.tried()
    assert three.about_seeds(three.tried()) == ["Seeds whose mean has chosen a rate: LoRA, rank 4: 3; DoRA, rank 4: 3."]


def test_there_must_be_so_many_seeds(comparison):
    with pytest.raises(ValueError, match="rate_seeds: there are only 2 seeds"):
        comparison("few", seeds=[4, 5], rate_seeds=3)
