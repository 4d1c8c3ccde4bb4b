"""dora-mm example: a model and images without a download, and the commands that it prints."""

import socket
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from dora_mm.cli import main
from dora_mm.config import load_config
from dora_mm.data.images.folder import read_training_images
from dora_mm.models.images.families import family_of
from dora_mm.models.images.sdxl.random_weights import build_example
from tests.shared.printed import next_commands


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_network(monkeypatch):
    def connect(*_):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", connect)


def test_the_printed_commands_are_for_what_it_has_made(here, no_network, capsys):
    """tests/test_wheel.py runs them all, with the wheel."""
    assert main(["example", "a folder"]) == 0
    printed = capsys.readouterr()
    assert "generated images mean nothing" in printed.out
    assert "shards" not in printed.err
    new, train, sample = next_commands(printed.out)
    assert main(new) == 0
    config = load_config(train[1])
    assert len(read_training_images(config.data)) == 8
    assert config.data.placeholder == "TOK"
    assert sample[:2] == ["sample", "example_style_prompts.txt"]
    assert Path(sample[1]).is_file()


def test_the_model_is_one_of_diffusers_and_the_same_each_time(here):
    assert main(["example", "a"]) == 0
    assert family_of("a/model").name == "sdxl"
    pipe = StableDiffusionXLPipeline.from_pretrained("a/model")
    again = build_example().components
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        first, second = getattr(pipe, part).state_dict(), again[part].state_dict()
        assert all(torch.equal(first[name], second[name]) for name in first), part


@pytest.mark.parametrize(
    ("name", "message"),
    [("full", "FOLDER full"), ("file", "FOLDER file"), ("file/below", "file cannot be written")],
)
def test_a_folder_with_content_is_refused_and_stays(here, name, message, capsys):
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    Path("file").write_text("mine")
    assert main(["example", name]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert sorted(path.name for path in here.rglob("*")) == ["file", "full", "mine.txt"]


def test_an_empty_folder_is_filled(here):
    Path("empty").mkdir()
    assert main(["example", "empty"]) == 0
    assert {path.name for path in Path("empty").iterdir()} == {"model", "images"}
