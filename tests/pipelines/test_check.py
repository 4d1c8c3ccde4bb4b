"""dora-mm check: the machine, what is missing, and the recipe that fits."""

import pytest

from dora_mm.cli import main
from dora_mm.preview import machine
from dora_mm.preview.machine import GPUInfo
from dora_mm.recipes import PIPELINES
from dora_mm.utils import requirements

check = PIPELINES.load("check")


def lines(capsys) -> dict[str, str]:
    """The last line of each kind."""
    printed = capsys.readouterr().out.splitlines()
    return {" ".join(line.split()[: 2 if line.startswith("recipe") else 1]): line for line in printed}


def test_a_machine_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(machine, "gpus", list)
    assert main(["check"]) == 0
    found = lines(capsys)
    assert found["gpu"].startswith("gpu       none")
    assert found["recipe sdxl"].endswith(
        "needs a GPU of some 8 GB (an estimate); on a processor configs/sdxl/tiny_3d_icon.yaml"
    )
    assert {"python", "machine", "torch", "packages", "recipe vlm"} <= set(found)


@pytest.mark.parametrize(
    ("memory", "recipe"), [(11.6, "12gb"), (15.7, "16gb"), (23.6, "24gb"), (7.6, "8gb"), (5.6, "needs a GPU")]
)
def test_the_recipe_that_fits_a_gpu(capsys, monkeypatch, memory, recipe):
    monkeypatch.setattr(machine, "gpus", lambda: [GPUInfo("a GPU", memory, "fp16")])
    assert main(["check"]) == 0
    found = lines(capsys)
    assert found["gpu"] == f"gpu       a GPU, {memory} GB, fp16"
    assert recipe in found["recipe sdxl"]


def test_missing_packages_are_named_with_the_command_that_installs_them(capsys, monkeypatch):
    versions = {"timm": None, "transformers": "5.6.0"}
    installed = requirements.installed
    monkeypatch.setattr(requirements, "installed", lambda name: versions.get(name, installed(name)))
    assert main(["check"]) == 0
    printed = capsys.readouterr().out
    assert "timm>=1.0.22 (not installed): pip install 'dora_mm[eval]'" in printed
    assert "transformers>=5.24 (5.6.0 is installed): pip install 'dora_mm[recipes]'" in printed


def test_a_gpu_that_torch_cannot_use_is_said(monkeypatch):
    monkeypatch.setattr(check.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert "torch 2.13.0+cpu cannot use" in check.without_gpu("2.13.0+cpu")
