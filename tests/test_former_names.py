"""What was saved under former names goes on: runs, adapters and PNGs of the commit before the renames.

`shared/first_names` has a training, images, and scores of two kinds, made at 798667b1 with the embedded SDXL model.
Pages, thumbnails and contact sheets were left out.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from dora_mm.cli import main
from dora_mm.config.loader import load_config
from dora_mm.config.pipelines import SCHEMAS
from dora_mm.registries.registry import Registry
from dora_mm.registries.renamed import KEYS, migrated
from dora_mm.utils.run_directory import RunDirectory
from tests.shared.packages import outside_package

ROOT = Path(__file__).parents[1]
RUNS = Path("artefacts")  # the commands that made them named their folders so


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A folder with the artefacts and the samples, in which commands run."""
    shutil.copytree(ROOT / "tests" / "shared" / "first_names", tmp_path / RUNS)
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    monkeypatch.chdir(tmp_path)


def test_a_training_is_resumed(saved):
    assert main(["train", "--resume", "artefacts/training", "--set", "train.steps=3"]) == 0
    rows = (RUNS / "training" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3]


def test_images_go_on_and_are_replayed(saved, capsys):
    file = RUNS / "images" / "samples" / "0001-seed0.png"
    before = file.read_bytes()
    assert main(["sample", "--resume", "artefacts/images"]) == 0
    assert file.read_bytes() == before
    assert "contact_sheet: false" in (RUNS / "images" / "config.yaml").read_text()
    assert main(["sample", "--replay", str(file), "--set", "output=again"]) == 0
    assert Image.open(next(Path("again").rglob("*.png"))).size == (64, 64)
    assert main(["inspect", str(file)]) == 0
    assert "a rose" in capsys.readouterr().out


@pytest.mark.parametrize("run", ["scores", "style"])
def test_scores_are_computed_again_from_the_images_that_are_there(saved, run):
    files = {file: file.read_bytes() for file in (RUNS / run / "samples").rglob("*.png")}
    before = json.loads((RUNS / run / "metrics.json").read_text())
    assert main(["eval", str(shutil.copy(RUNS / run / "config.yaml", "old.yaml"))]) == 2  # a person's own config
    assert main(["eval", str(RUNS / run / "config.yaml")]) == 0
    assert {file: file.read_bytes() for file in files} == files
    assert json.loads((RUNS / run / "metrics.json").read_text()).keys() == before.keys()
    assert (RUNS / run / "sheet.png").is_file()


def test_a_config_of_a_persons_own_names_the_present_key(tmp_path, capsys):
    config = ROOT / "configs" / "sdxl" / "eval_demo.yaml"
    assert main(["eval", str(config), "--set", "judge=samples/judge", "draw.steps=1"]) == 2
    message = capsys.readouterr().err
    assert "judge: unknown key, which is called classifier now" in message
    assert "draw: unknown key, which is called sampling now" in message
    with pytest.raises(SystemExit):
        main(["tune", str(ROOT / "configs" / "sdxl" / "demo.yaml"), "--judge", "held_out"])
    assert "--judge is called --selection-metric now" in capsys.readouterr().err


@pytest.mark.parametrize("pipeline", KEYS)
def test_each_key_is_migrated(pipeline):
    old: dict = {"pipeline": pipeline}
    if pipeline == "compare":
        old |= {"pictures": {"judge": 1, "draw": {"steps": 2}, "style": "3d"}, "questions": {"report": 3}}
        expected = {"images": {"classifier": 1, "sampling": {"steps": 2}, "style": "3d"}, "vl": {"report": 3}}
    else:
        expected = {}
        for number, (before, now) in enumerate(KEYS[pipeline].items()):
            for values, key in ((old, before), (expected, now)):
                *sections, last = key.split(".")
                for section in sections:
                    values = values.setdefault(section, {})
                values[last] = number
    before = json.dumps(old)
    assert migrated(old) == {"pipeline": pipeline, **expected}
    assert json.dumps(old) == before
    assert migrated(migrated(old)) == migrated(old)


def test_digests_of_campaigns_are_those_of_before():
    compared = load_config(ROOT / "configs" / "sdxl" / "compare_tiny.yaml").scored
    prompt = "a TOK icon of {thing}, in the style of TOK"
    assert compared == {"judge": "samples/judge", "style": "3d", "prompt": prompt, "draw": {"guidance": 3.0}}
    tuned = SCHEMAS["tune"].model_validate(
        {"pipeline": "tune", "name": "a", "base": "b", "output": "o", "rates": [1, 2]}
    )
    assert tuned.scored == {"judge": "score", "clip_model": None}


def test_an_entry_point_of_a_former_kind_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.syspath_prepend(outside_package(tmp_path, {"of_others.py": "A = 1\n"}, {"targets.mine": "of_others:A"}))
    assert list(Registry("export_formats", "export format", {})) == []
    assert "targets.mine is not read: it is called export_formats.mine now" in caplog.text
    sys.modules.pop("of_others", None)


def test_the_configs_are_of_the_commit_before():
    values = yaml.safe_load((ROOT / "tests" / "shared" / "first_names" / "scores" / "config.yaml").read_text())
    assert {"judge", "draw"} <= values.keys()
    assert RunDirectory(ROOT / "tests" / "shared" / "first_names" / "scores").inputs["config.yaml"] == values
