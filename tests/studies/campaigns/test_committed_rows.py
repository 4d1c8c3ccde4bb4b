"""The committed rows of the studies are those of today's configs, data and models: a report trains nothing anew."""

import shutil
from pathlib import Path

import pytest

from dora_mm.cli import main
from dora_mm.config import load_config
from dora_mm.recipes import PIPELINES
from dora_mm.studies.campaigns.comparison import MethodComparison

PAPER = Path("tests/benchmarks/results/paper")


@pytest.mark.slow
def test_the_rows_of_images(tmp_path):
    rows = shutil.copy(PAPER / "tuned" / "trainings.csv", tmp_path / "trainings.csv")
    config = load_config("configs/sdxl/tuned.yaml", [f"rows={rows}", f"output={tmp_path / 'out'}"])
    campaign = MethodComparison(config, PIPELINES.load("compare").build_evaluation(config)).campaign
    found = campaign.rows.found.values()
    assert found
    assert [row.training.name for row in found if row.digest != campaign.digest(row.training)] == []


@pytest.mark.slow
def test_the_rows_on_questions(tmp_path):
    features = Path("build/features/tiny")
    if not features.exists():
        assert main(["features", "configs/vl_bart/features_tiny.yaml"]) == 0
    rows = shutil.copy(PAPER / "tuned_vl" / "trainings.csv", tmp_path / "trainings.csv")
    settings = ["seeds=[0, 1, 2]", "extra_rates=1", "workers=1", f"rows={rows}", f"output={tmp_path / 'out'}"]
    assert main(["compare", "configs/vl_bart/tuned.yaml", "--report", "--set", *settings]) == 0
    for name in ("results.csv", "curves.csv"):
        found, committed = (
            (folder / name).read_text().splitlines() for folder in (tmp_path / "out", PAPER / "tuned_vl")
        )
        assert found == committed
