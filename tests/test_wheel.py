"""The wheel by itself, in an environment and a folder of its own: no checkout is near."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command, cwd):
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    code, _, errors = run(*build, cwd=folder)
    assert code == 0, errors
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A new environment with the wheel in it; its dependencies are lent by the one that runs the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    code, _, errors = run(*pip, cwd=folder)
    assert code == 0, errors
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def test_the_wheel_carries_the_packages_and_the_configs_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names} == {"dora_mm", "pipelines", "dora_mm-0.1.0.dist-info"}
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert f"dora_mm/configs/{path.relative_to(ROOT / 'configs').as_posix()}" in names


def test_the_command_runs_from_an_empty_folder(environment, tmp_path):
    code, output, errors = run(environment / "bin" / "dora-mm", "--help", cwd=tmp_path)
    assert (code, errors) == (0, "")
    assert "usage: dora-mm" in output


def test_a_packaged_config_loads_from_an_empty_folder(environment, tmp_path):
    code = "import dora_mm\nfrom dora_mm.config import load_config\n"
    code += "print(dora_mm.__file__, load_config('configs/sdxl/demo.yaml', ['seed=3']).seed)"
    done = run(environment / "bin" / "python", "-c", code, cwd=tmp_path)
    assert done == (0, f"{next(environment.glob('lib/*/site-packages'))}/dora_mm/__init__.py 3\n", "")


def test_a_packaged_config_says_that_samples_are_in_a_checkout(environment, tmp_path):
    code, output, errors = run(environment / "bin" / "dora-mm", "train", "configs/sdxl/demo.yaml", cwd=tmp_path)
    assert (code, output) == (2, "")
    assert "samples/ exists in a checkout of dora_mm only" in errors
    assert list(tmp_path.iterdir()) == []
