"""The first page of docs/formats.md: every command of its questions runs, and prints what the page shows."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from dora_mm import DoRASpec, adapter_parameters, convert, inject, save_adapter
from dora_mm.cli import main
from tests.documented.texts import ROOT, blocks, commands, text_of
from tests.shared import toy

NUMBER = re.compile(r"\d\.\de[+-]\d\d|\d+\.\d(?=%| times)")
BASE = "samples/tiny-sdxl"
ADAPTER = Path("runs/tiny_3d_icon/001/adapter")


def page() -> str:
    return text_of(ROOT / "docs" / "formats.md").partition("## Ten questions")[2].partition("\n## ")[0]


def write_files() -> None:
    """A DoRA of the embedded SDXL from formulas, in a run, and as a trainer in kohya's form writes it."""
    unet = UNet2DConditionModel.from_pretrained(BASE, subfolder="unet", torch_dtype=torch.float32)
    inject(unet, "sdxl-unet", DoRASpec(rank=8, alpha=4))
    for seed, (name, parameter) in enumerate(adapter_parameters(unet).items()):
        values = toy.wave(parameter.shape, seed).float()
        parameter.data += 0.08 * values * (1 if "lora" in name else parameter.data)
    save_adapter({"unet": unet}, ADAPTER)
    convert(ADAPTER, "style.safetensors", to="kohya")


def matches(shown: list[str], found: list[str]) -> bool:
    """Whether the lines are those that were found, where `...` stands for any number of lines."""
    if not shown:
        return not found
    if shown[0] == "...":
        return any(matches(shown[1:], found[skipped:]) for skipped in range(len(found) + 1))
    return bool(found) and same(shown[0], found[0]) and matches(shown[1:], found[1:])


def same(shown: str, found: str) -> bool:
    """Whether two lines have the same words, and the same numbers as far as rounding allows."""
    words, numbers = zip(
        *(([*NUMBER.split(line)], [*map(float, NUMBER.findall(line))]) for line in (shown, found)), strict=True
    )
    return words[0] == words[1] and numbers[0] == pytest.approx(numbers[1], rel=0.06, abs=1e-5)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("samples").symlink_to(ROOT / "samples")
    write_files()


@pytest.mark.slow
def test_every_command_prints_what_the_page_shows(folder, capsys):
    assert page().count("**") == 2 * 10
    capsys.readouterr()
    for block in blocks(page()):
        for transcript in block.split("$ ")[1:]:
            command, *shown = transcript.rstrip().splitlines()
            ((*arguments,),) = commands(f"```\n{command}\n```\n")
            assert main(arguments) == 0, command
            found = [line.rstrip() for line in capsys.readouterr().out.rstrip().splitlines()]
            assert matches(shown, found), f"{command}\n" + "\n".join(found)
