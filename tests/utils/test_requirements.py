"""What commands need: the table equals the extras, and is checked before anything is imported."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dora_mm.cli.parser import build_parser
from dora_mm.utils import requirements
from dora_mm.utils.requirements import BASE, OF_THE_BASE, REQUIREMENTS, check_command, check_extra

ROOT = Path(__file__).parents[2]
UNUSED = {"test", "samples", "docs", "dev"}  # extras that no command needs


def test_the_table_equals_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = {BASE: project["dependencies"], **project["optional-dependencies"]}
    for name in UNUSED:
        del extras[name]
    for name, needed in extras.items():
        if name not in (BASE, "recipes"):
            assert needed[0] == "dora_mm[recipes]", name  # so that every extra installs all that commands need
            del needed[0]
    assert {name: set(needed) for name, needed in extras.items()} == {k: set(v) for k, v in REQUIREMENTS.items()}


def test_the_commands_of_the_base_are_commands():
    assert set(OF_THE_BASE) < set(build_parser().commands)


@pytest.mark.parametrize("command", build_parser().commands)
def test_all_is_installed_here(command):
    check_command(command)


def test_all_that_is_missing_is_said_once(monkeypatch):
    versions = {"diffusers": None, "transformers": "5.6.0", "peft": "0.18.1"}
    installed = requirements.installed
    monkeypatch.setattr(requirements, "installed", lambda name: versions.get(name, installed(name)))
    check_command("convert")
    with pytest.raises(ValueError, match=r"^dora-mm train needs diffusers") as error:
        check_command("train")
    assert str(error.value) == (
        "dora-mm train needs diffusers>=0.42.1 (not installed), transformers>=5.24 (5.6.0 is installed), peft>=0.20 "
        "(0.18.1 is installed): pip install --upgrade 'dora_mm[recipes]'"
    )
    versions["peft"] = "0.17.0"
    with pytest.raises(ValueError, match=r"^X needs peft>=0.18.1 \(0.17.0 is installed\): pip .* 'dora_mm'$"):
        check_extra(BASE, "X")


BESIDE_AN_OLDER_RELEASE = """
import sys
from dora_mm.cli import main
for command in (["train", "configs/sdxl/demo.yaml"], ["convert", "none", "out", "--to", "peft"]):
    code = main(command)
    print(code, sorted({"torch", "transformers", "diffusers", "pydantic"} & set(sys.modules)), file=sys.stderr)
"""


def test_commands_check_before_they_import(tmp_path):
    """As beside another trainer: an older transformers, which a recipe would fail to import; files are converted."""
    record = tmp_path / "transformers-5.6.0.dist-info" / "METADATA"
    record.parent.mkdir()
    record.write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.6.0\n", "utf-8")
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "", "HOME": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", BESIDE_AN_OLDER_RELEASE], env=environment, capture_output=True, text=True, check=True
    )
    said = "dora-mm: dora-mm train needs transformers>=5.24 (5.6.0 is installed): pip install --upgrade"
    first, second, third, *_ = ran.stderr.splitlines()
    assert first.startswith(said)
    assert second == "2 []"
    assert third.startswith("dora-mm: IN: none")


BLOCKED = """
import sys
BLOCKED = {blocked!r}


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)


sys.meta_path.insert(0, Finder())
"""
LAYERS = """
import sys, torch
import dora_mm
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
dora_mm.inject(model, targets=["0", "1"], spec=dora_mm.DoRASpec(rank=2))
dora_mm.save_adapter(model, sys.argv[1] + "/adapter", format="native")
twin = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
dora_mm.load_adapter(twin, sys.argv[1] + "/adapter")
"""
FILES = """
from dora_mm.cli import main
out = sys.argv[1] + "/adapter_kohya.safetensors"
for command in (["convert", "tests/formats/fixtures/diffusers", out, "--to", "kohya"], ["check"], ["configs"]):
    assert main(command) == 0, command
"""


def test_layers_and_files_need_nothing_but_the_base(tmp_path):
    recipes = {"diffusers", "transformers", "accelerate", "open_clip", "PIL"}
    for blocked, code in ((recipes | {"peft"}, LAYERS), (recipes, FILES)):
        text = BLOCKED.format(blocked=blocked) + code
        subprocess.run([sys.executable, "-c", text, str(tmp_path)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    assert (tmp_path / "adapter_kohya.safetensors").is_file()


def test_every_extra_that_a_message_or_a_page_names_is_one():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    files = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    files += [path for folder in ("dora_mm", "pipelines") for path in (ROOT / folder).rglob("*.py")]
    named = {
        extra.strip(): path.name
        for path in files
        for found in re.findall(r"dora_mm\[([^\]{}]+)\]", path.read_text(encoding="utf-8"))
        for extra in found.split(",")
    }
    assert "sheets" in named
    assert {extra: file for extra, file in named.items() if extra not in extras} == {}
