"""An adapter is its tensors and the settings that are computed with, whatever its file looks like."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from dora_mm import DoRASpec, inject, save_adapter
from dora_mm.core import adapter_parameters
from dora_mm.formats import adapter_digest
from dora_mm.formats.tools import FORMATS

FIXTURES = Path(__file__).parent / "fixtures"
FILES = sorted(file for file in FIXTURES.rglob("*.safetensors") if file.stem != "expected")


def save(folder: Path, format: str, *, alpha: float = 3, seed: int = 0, **about: str) -> Path:
    model = nn.Sequential(nn.Linear(4, 3))
    inject(model, ["0"], DoRASpec(rank=2, alpha=alpha))
    for parameter in adapter_parameters(model).values():
        parameter.data.normal_(generator=torch.Generator().manual_seed(seed)).abs_()
    component = "model" if format == "peft" else "unet"
    return save_adapter({component: model}, folder, format=format, metadata=about)


@pytest.mark.parametrize("format", FORMATS)
def test_what_counts_and_what_does_not(tmp_path, format):
    digest = adapter_digest(save(tmp_path / "a", format))
    assert adapter_digest(save(tmp_path / "b", format, base_model="another", config="steps: 3", note="x")) == digest
    assert adapter_digest(save(tmp_path / "c", format, seed=1)) != digest
    assert adapter_digest(save(tmp_path / "d", format, alpha=6)) != digest


@pytest.mark.parametrize(
    "file",
    sorted({*FIXTURES.rglob("*.safetensors")} - {FIXTURES / "expected.safetensors"}),
    ids=lambda file: file.parent.name + file.stem,
)
def test_files_of_other_tools_in_another_order_with_a_note(tmp_path, file):
    digest = adapter_digest(file)
    for beside in file.parent.glob("adapter_config.json"):
        settings = json.loads(beside.read_text())
        (tmp_path / beside.name).write_text(json.dumps(dict(reversed(settings.items())), indent=7))
    with safe_open(file, "pt") as opened:
        header = {"note": "from elsewhere", **dict(reversed((opened.metadata() or {}).items()))}
    save_file(load_file(file), tmp_path / file.name, header)
    assert (tmp_path / file.name).read_bytes() != file.read_bytes()
    assert adapter_digest(tmp_path / file.name) == digest
