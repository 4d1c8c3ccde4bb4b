"""The wheel, installed in a separate environment and used from a folder without a checkout."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import dora_mm
from tests.installed import first_hour

ROOT = Path(__file__).resolve().parents[1]


def run(*command, cwd, **variables):
    command = [str(part) for part in command]
    environ = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The source archive, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    code, _, errors = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    assert code == 0, errors
    return folder


@pytest.fixture(scope="module")
def wheel(archives):
    (path,) = archives.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A new environment with the wheel; its dependencies come from the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    code, _, errors = run(*pip, cwd=folder)
    assert code == 0, errors
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def test_the_wheel_carries_the_package_the_recipes_and_the_configs_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    data = [path for folder in ("fonts", "gallery") for path in (ROOT / "dora_mm" / "sampling" / folder).iterdir()]
    files = [
        *(ROOT / "dora_mm").rglob("*.py"),
        ROOT / "dora_mm" / "py.typed",
        ROOT / "dora_mm" / "config" / "schema.json",
    ]
    files += [path for path in data if path.is_file() and path.suffix != ".py"]
    files += [*(ROOT / "dora_mm" / "models" / "images" / "sdxl" / "configs").rglob("*.json")]
    files += [ROOT / "dora_mm" / "formats" / "naming" / "known.csv"]
    files += [*(ROOT / "dora_mm" / "registries" / "suites").glob("*.yaml")]
    files += [ROOT / "dora_mm" / "eval" / "vl" / name for name in ("examples.html", "examples.css")]
    moved = [path for path in (ROOT / "configs").rglob("*") if path.is_file()] + [*(ROOT / "pipelines").glob("*.py")]
    expected = {path.relative_to(ROOT) for path in files} | {"dora_mm" / path.relative_to(ROOT) for path in moved}
    assert names == {path.as_posix() for path in expected}


def test_the_source_archive_carries_the_package_and_its_pages_and_neither_models_nor_tests(archives):
    with tarfile.open(archives / f"dora_mm-{dora_mm.__version__}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = [ROOT / name for name in ("dora_mm", "pipelines", "configs", "docs")]
    paths = [path for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts]
    files = {path.relative_to(ROOT).as_posix() for path in paths if path.is_file()}
    beside = (
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "LICENSE",
        "README.md",
        "SECURITY.md",
        "pyproject.toml",
    )
    assert names == {*files, *beside, ".gitignore", "PKG-INFO"}  # hatchling adds .gitignore, by which it chooses


def test_both_archives_are_small_and_have_the_version_of_the_package(archives):
    sizes = {path.name: path.stat().st_size for path in archives.iterdir()}
    version = dora_mm.__version__
    assert sizes.keys() == {f"dora_mm-{version}-py3-none-any.whl", f"dora_mm-{version}.tar.gz"}
    assert max(sizes.values()) < 3e6  # 1.6 MB and 1.8 MB; the models of samples/ have 43 MB


@pytest.mark.slow
def test_the_wheel_trains_what_it_has_made_itself(environment, tmp_path):
    """As `make test-wheel` does with dependencies of its own from PyPI."""
    images = first_hour(environment / "bin" / "dora-mm", tmp_path)
    assert len(list(images.glob("*.png"))) == 8


@pytest.fixture
def shadow(tmp_path):
    """A user's own package `pipelines`, which fails when it is imported, in the folder where commands run."""
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "__init__.py").write_text("raise RuntimeError('the user's own pipelines')")
    return tmp_path


@pytest.mark.slow
def test_a_folder_named_pipelines_does_not_shadow_the_recipes(environment, shadow):
    """From the wheel and from the checkout, where `python -m` puts the current folder first on sys.path."""
    model = torch.nn.ModuleDict({"to_q": torch.nn.Linear(4, 4)})
    dora_mm.inject(model, ["to_q"], dora_mm.DoRASpec(rank=2))
    dora_mm.save_adapter({"unet": model}, shadow / "adapter")
    for python, path in ((environment / "bin" / "python", ""), (sys.executable, str(ROOT))):
        code, output, errors = run(python, "-m", "dora_mm", "inspect", "adapter", cwd=shadow, PYTHONPATH=path)
        assert (code, errors) == (0, "")
        assert "to_q" in output


def test_the_command_runs_from_an_empty_folder(environment, tmp_path):
    code, output, errors = run(environment / "bin" / "dora-mm", "--help", cwd=tmp_path)
    assert (code, errors) == (0, "")
    assert "usage: dora-mm" in output


def test_a_packaged_config_loads_from_an_empty_folder(environment, tmp_path):
    code = "import dora_mm\nfrom dora_mm.config import load_config\n"
    code += "print(dora_mm.__file__, load_config('configs/sdxl/demo.yaml', ['seed=3']).seed)"
    done = run(environment / "bin" / "python", "-c", code, cwd=tmp_path)
    assert done == (0, f"{next(environment.glob('lib/*/site-packages'))}/dora_mm/__init__.py 3\n", "")


@pytest.mark.slow
def test_a_config_of_one_s_own_is_written_in_an_empty_folder(environment, tmp_path):
    """With the path of a model, and the packaged configs listed."""
    for folder in ("mine", "model"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "mine" / "a.png")
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    command = environment / "bin" / "dora-mm"
    code, output, errors = run(command, "new", "sdxl", "style", "--images", "mine", "--model", "model", cwd=tmp_path)
    assert (code, errors) == (0, "")
    assert "dora-mm train style.yaml" in output
    assert "path: model" in (tmp_path / "style.yaml").read_text()
    code, output, errors = run(command, "configs", cwd=tmp_path)
    assert (code, errors) == (0, "")
    assert "configs/sdxl/3d_icon.yaml" in output


def test_a_packaged_config_says_that_samples_are_in_a_checkout(environment, tmp_path):
    code, output, errors = run(environment / "bin" / "dora-mm", "train", "configs/sdxl/demo.yaml", cwd=tmp_path)
    assert (code, output) == (2, "")
    assert ": samples/" in errors
    assert "samples/ is only part of a checkout of dora_mm" in errors
    assert list(tmp_path.iterdir()) == []
