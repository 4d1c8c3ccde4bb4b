"""What people type in their first weeks, and the sentence that each gets."""

import re

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dora_mm import cli

WRONG = [  # what is typed, and the sentence, without how that of a config begins
    (
        "train CONFIG --mixed_precision bf16",
        "error: --mixed_precision is --set model.dtype=bfloat16 train.mixed_precision=bf16 here",
    ),
    (
        "train CONFIG --set mixed_precision=bf16",
        "mixed_precision: unknown key, did you mean 'train.mixed_precision'?",
    ),
    (
        "train CONFIG --set model.dtype=bfloat16",
        "train.mixed_precision must be bf16 for model.dtype bfloat16, not no: --set train.mixed_precision=bf16",
    ),
    (
        "train CONFIG --dryrun",
        "error: there is no --dryrun, did you mean '--dry-run'?",
    ),
    (
        "trian CONFIG",
        "error: there is no command 'trian', did you mean 'train'?",
    ),
    (
        "train CONFIG --set network_dim=8",
        "network_dim: unknown key, which is adapter.rank here",
    ),
    (
        "train CONFIG --set learning_rate=1e-4",
        "learning_rate: unknown key, which is optimizer.lr here",
    ),
    (
        "train CONFIG --set optimizer.learning_rate=1",
        "optimizer.learning_rate: unknown key, which is optimizer.lr here",
    ),
    (
        "train CONFIG --set optimizer_type=Prodigy",
        "optimizer_type: unknown key, which is optimizer.name here",
    ),
    (
        "train CONFIG --set ema=true",
        "ema: must be a section of keys, got True: --set 'ema={decay: 0.999}'",
    ),
    (
        "train CONFIG --set data.mask=true",
        "data.mask: must be a section of keys, got True: --set 'data.mask={source: file}'",
    ),
    (
        "train CONFIG --set data.valid=0.1",
        "data.valid: must be a section of keys, got 0.1: --set 'data.valid={share: 0.1}'",
    ),
    (
        "train CONFIG --set adapter.strength=high",
        "adapter.strength: must be a number, got 'high': --set adapter.strength=1",
    ),
    (
        "sample p.txt --set adapter.path=RUN adapter.strength=high",
        "adapter.strength: must be a number, got 'high': --set adapter.strength=1",
    ),
    (
        "sample p.txt --set adapter.path=RUN strengths=0,1",
        "strengths: must be a list, got '0,1': --set 'strengths=[0, 1]'",
    ),
    (
        "sample p.txt --set adapter.path=RUN strengths=0.5",
        "strengths: must be a list, got 0.5: --set 'strengths=[0.5]'",
    ),
    (
        "train CONFIG --set data.resolution=100",
        "data.resolution: must be a multiple of 64 from 512 to 8192, or of 32 below 512, got 100",
    ),
    (
        "train CONFIG --set data.resolution=8",
        "data.resolution: must be a multiple of 64 from 512 to 8192, or of 32 below 512, got 8",
    ),
    (
        "sample p.txt --set width=100",
        "width: must be a multiple of 8 from 16 to 8192, got 100",
    ),
    (
        "sample p.txt --set width=9000",
        "width: must be a multiple of 8 from 16 to 8192, got 9000",
    ),
    (
        "sample RUN",
        "RUN is the run of a training: dora-mm sample --set adapter.path=RUN 'prompts=[...]' generates with "
        "its adapter, and dora-mm train --resume RUN goes on with it",
    ),
    (
        "train RUN",
        "RUN is the run of a training: dora-mm sample --set adapter.path=RUN 'prompts=[...]' generates with "
        "its adapter, and dora-mm train --resume RUN goes on with it",
    ),
    (
        "sample runs/p/001",
        "runs/p/001 is a run of dora-mm sample: dora-mm sample --resume runs/p/001 goes on with it",
    ),
    (
        "gallery runs/nothing",
        "RUN: runs/nothing does not exist",
    ),
    (
        "gallery runs/stile",
        "RUN: runs/stile does not exist, did you mean 'style'?",
    ),
    (
        "inspect README.md",
        "README.md is none of what inspect reads: adapters and models in files of safetensors or in "
        "folders, and PNG files that dora-mm sample drew",
    ),
    (
        "sample p.txt --set adapter.path=runs/style/012",
        "adapter.path: runs/style/012 does not exist in FOLDER; the last one in runs/style is 001",
    ),
    (
        "sample p.txt --set adapter.path=runs/nope/012",
        "adapter.path: runs/nope/012 does not exist in FOLDER",
    ),
    (
        "sample p.txt --set adapter.path=https://example.org/style.safetensors",
        "adapter.path: https://example.org/style.safetensors is a URL: download the file, and name that",
    ),
    (
        "train configs/nope.yaml",
        "configs/nope.yaml does not exist, neither in FOLDER nor in the packaged configs, which dora-mm configs lists",
    ),
    (
        "train CONFIG --set train.stesp=7",
        "train.stesp: unknown key, did you mean 'steps'?",
    ),
    (
        "train CONFIG --set train.steps=10 schedule.warmup_steps=20",
        "schedule.warmup_steps (20) must be below train.steps (10): set fewer, or schedule.warmup_ratio",
    ),
    (
        "train CONFIG --set optimizer.name=prodigy",
        "optimizer.lr 0.001 is a rate of other optimizers: prodigy learns nothing below 0.1: --set optimizer.lr=1",
    ),
    (
        "train CONFIG --set optimizer.name=adamw_8bit model.path=runs data.folder=.",
        "optimizer.name adamw_8bit needs a GPU, and this training is on cpu: --set optimizer.name=adamw",
    ),
    (
        "train CONFIG --set model.path=nobody/nothing data.folder=.",
        "model.path: nobody/nothing is not on this machine, and the hub (huggingface.co) cannot be "
        "reached: go online once, or name a local folder instead",
    ),
    (
        "ask nobody/nothing p.png what?",
        "MODEL: nobody/nothing is not on this machine, and the hub (huggingface.co) cannot be reached: go "
        "online once, or name a local folder instead",
    ),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory, with runs of a training and of a job; the hub cannot be reached."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dora_mm.models.hub.hub_answers", lambda: False)
    for run, recipe in (("style", "train_diffusion"), ("p", "sample")):
        (tmp_path / "runs" / run / "001").mkdir(parents=True)
        (tmp_path / "runs" / run / "001" / "config.yaml").write_text(f"pipeline: {recipe}\n")
    save_file({"unet.a.lora_A.weight": torch.ones(1, 1)}, tmp_path / "runs/style/001/pytorch_lora_weights.safetensors")
    for name in ("p.txt", "README.md"):
        (tmp_path / name).write_text("a bus\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    return tmp_path


def said(words, capsys):
    """The last line of a command that ends with exit code 2, without the file and the override that it begins with."""
    try:
        code = cli.main(words)
    except SystemExit as end:  # of the parser
        code = end.code
    assert code == 2
    line = capsys.readouterr().err.splitlines()[-1].removeprefix("dora-mm: ")
    return re.sub(r"^(.+configs/sdxl/\w+\.yaml: |--set .*?: (?=[\w.]+: ))", "", line)


@pytest.mark.parametrize(("line", "sentence"), WRONG)
def test_a_mistake_gets_one_sentence_that_says_what_to_type(folder, capsys, line, sentence):
    places = {"CONFIG": "configs/sdxl/tiny_3d_icon.yaml", "RUN": "runs/style/001", "FOLDER": str(folder)}
    for name, path in places.items():
        line, sentence = (re.sub(rf"\b{name}\b(?!:)", path, text) for text in (line, sentence))
    assert said(line.split(" "), capsys) == sentence
