"""dora-mm check: the machine, what is missing, and the recipe that fits."""

import re
from pathlib import Path

import diffusers
import pytest
import torch
import yaml

import dora_mm
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
        "needs a GPU of some 8 GB (an estimate); on a CPU configs/sdxl/tiny_3d_icon.yaml"
    )
    assert {"python", "machine", "torch", "packages", "recipe vlm"} <= set(found)


def test_the_recipes_are_a_table(capsys, monkeypatch):
    monkeypatch.setattr(machine, "gpus", list)
    assert main(["check"]) == 0
    recipes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("recipe")]
    assert len(recipes) > 5
    assert len({line.index("needs a GPU") for line in recipes}) == 1


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
    assert "timm>=1.0.31 (not installed): pip install 'dora_mm[eval]'" in printed
    assert "transformers>=5.24 (5.6.0 is installed): pip install 'dora_mm[recipes]'" in printed


def test_a_gpu_that_torch_cannot_use_is_said(monkeypatch):
    monkeypatch.setattr(check.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert "torch 2.13.0+cpu cannot use" in check.without_gpu("2.13.0+cpu")


def test_a_report_has_versions_the_gpu_and_the_config_without_names(capsys, monkeypatch, tmp_path):
    folder = tmp_path / "jane's été"
    folder.mkdir()
    file = folder / "of jane.yaml"
    own = f"pipeline: train_diffusion\nmodel:\n  path: {folder}/model\n  tokn: hf_secret\ntrain:\n  stepps: 3\n"
    file.write_text(own, encoding="utf-8")
    monkeypatch.setattr(machine, "gpus", lambda: [GPUInfo("NVIDIA H100 80GB HBM3", 79.2, "bf16")])
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "/home/jane")
    assert main(["check", "--report", "--config", str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"### dora_mm {dora_mm.__version__}\n")
    assert "- GPU: NVIDIA H100 80GB HBM3, 79.2 GB, bf16\n" in printed
    assert f"- torch {torch.__version__}, built for" in printed
    assert f"diffusers {diffusers.__version__}" in printed
    assert "- set: CUBLAS_WORKSPACE_CONFIG" in printed
    (block,) = re.findall(r"```yaml\n(.*?)\n```", printed, re.DOTALL)
    assert yaml.safe_load(block) == {
        "pipeline": "train_diffusion",
        "model": {"path": "<path>", "<key> 1": "<text>"},
        "train": {"<key> 1": 3},
    }
    for secret in ("jane", "été", "secret", "tokn", str(tmp_path), str(Path.cwd())):
        assert secret not in printed, secret


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "a.yaml"], "--config belongs to a report: dora-mm check --report --config CONFIG"),
        (["--report", "--config", "missing.yaml"], "--config: missing.yaml"),
    ],
)
def test_a_report_that_cannot_be_made_is_one_sentence(arguments, message, capsys):
    assert main(["check", *arguments]) == 2
    assert message in capsys.readouterr().err
