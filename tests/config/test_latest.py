"""`runs/NAME/latest`: the last run that has what is asked for."""

import argparse
from pathlib import Path

import pytest

from dora_mm.cli.commands import number_paths
from dora_mm.config.latest import ADAPTER, CHECKPOINT, IMAGES, numbered, numbered_adapters
from dora_mm.config.loader import ConfigError, dump_config, load_config
from dora_mm.config.paths import check_paths
from dora_mm.sampling.batch.prompt_row import parse_adapters

STYLE = "runs/style"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Runs with numbers: 9 has all, 10 was stopped, 11 has not begun; a later file and folder are no runs."""
    monkeypatch.chdir(tmp_path)
    files = {
        "009": ["config.yaml", "adapter/adapter_model.safetensors", "checkpoints/step-000200/x", "sheet.png"],
        "010": ["config.yaml", "checkpoints/step-000100/x", "sheet-step-000100.png"],
        "011": ["config.yaml"],
        "012-copy": ["config.yaml", "adapter/adapter_model.safetensors"],
    }
    for run, names in files.items():
        for name in names:
            file = Path(STYLE, run, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"")
    Path(STYLE, "013").write_text("")


@pytest.mark.parametrize(
    ("path", "wanted", "run"),
    [
        ("runs/style/latest", ADAPTER, "runs/style/009"),
        ("runs/style/latest", CHECKPOINT, "runs/style/010"),
        ("runs/style/latest", IMAGES, "runs/style/010"),
        ("runs/style/latest/", CHECKPOINT, "runs/style/010"),
        ("runs/style/latest/sheet.png", ADAPTER, "runs/style/009/sheet.png"),
        ("runs/style/latest/sheet*.png", ADAPTER, "runs/style/010/sheet*.png"),
        ("runs/style/latest/checkpoints/step-000200", ADAPTER, "runs/style/009/checkpoints/step-000200"),
        ("runs/latest", ADAPTER, "runs/latest"),  # there are no numbers
        ("latest", ADAPTER, "latest"),
        ("my/latest/images", ADAPTER, "my/latest/images"),
        ("runs/style/009", ADAPTER, "runs/style/009"),
    ],
)
def test_the_last_run_that_has_what_is_asked_for(runs, path, wanted, run):
    assert numbered(path, wanted) == run


@pytest.mark.usefixtures("runs")
def test_what_no_run_has_and_what_is_called_so():
    assert numbered("runs/style/latest") == "runs/style/011"
    with pytest.raises(ValueError, match=r"^runs/style/latest/x.png: no run in runs/style has x.png$"):
        numbered("runs/style/latest/x.png")
    assert numbered("runs/style/latest/x.png", ADAPTER, new=True) == "runs/style/009/x.png"
    Path(STYLE, "009", "adapter").rename("taken")
    with pytest.raises(ValueError, match=r"^runs/style/latest: no run in runs/style has an adapter$"):
        numbered("runs/style/latest", ADAPTER)
    Path(STYLE, "latest").mkdir()
    assert numbered("runs/style/latest", ADAPTER) == "runs/style/latest"


@pytest.mark.usefixtures("runs")
def test_a_config_has_the_number_before_anything_is_recorded(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text(
        "pipeline: grid\nprompt: a bus\ncolumns: {name: adapter, values: ['runs/style/latest:0.7+other:1', none]}\n"
    )
    config = load_config(file)
    assert "latest" not in dump_config(config)
    assert config.columns.values == ("runs/style/009:0.7+other:1", "none")
    sample = ["adapter.path=runs/style/latest", "prompts=[a latest bus]", "output=runs/style/latest"]
    config = load_config("configs/sdxl/jobs.yaml", sample)
    assert (config.adapter.path, config.output) == ("runs/style/009", "runs/style/011")
    assert config.prompts == ("a latest bus",)
    with pytest.raises(ConfigError, match=r"adapter.path.*: runs/style/latest/x: no run in runs/style has x"):
        load_config("configs/sdxl/jobs.yaml", ["adapter.path=runs/style/latest/x", *sample[1:]])
    config = load_config("configs/sdxl/jobs.yaml", ["output=runs/new/latest", sample[1]])
    with pytest.raises(ValueError, match=r"output runs/new/latest: latest means the last numbered run, .* none"):
        check_paths(config, new_run=True)


@pytest.mark.usefixtures("runs")
def test_adapters_with_strengths_have_their_numbers():
    assert parse_adapters("runs/style/latest:0.7+other.safetensors:0.3") == (
        *(("runs/style/009", 0.7), ("other.safetensors", 0.3)),
    )
    assert numbered_adapters("runs/style/latest") == "runs/style/009"
    assert numbered_adapters("a latest one") == "a latest one"


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize(
    ("command", "given", "expected"),
    [
        ("gallery", {"runs": [Path("runs/style/latest")]}, [Path("runs/style/010")]),
        ("analyse", {"runs": ["runs/style/latest"]}, ["runs/style/009"]),
        ("train", {"resume": Path("runs/style/latest")}, Path("runs/style/010")),
        ("sample", {"resume": Path("runs/style/latest")}, Path("runs/style/011")),
        ("average", {"run": Path("runs/style/latest")}, Path("runs/style/010")),
        ("convert", {"source": "runs/style/latest"}, "runs/style/009"),
        ("convert", {"out": "runs/style/latest/comfy.safetensors"}, "runs/style/009/comfy.safetensors"),
        ("ask", {"question": "runs/style/latest"}, "runs/style/latest"),
    ],
)
def test_every_command_understands_it(command, given, expected):
    arguments = argparse.Namespace(command=command, **given)
    number_paths(arguments)
    (found,) = [getattr(arguments, name) for name in given]
    assert found == expected
