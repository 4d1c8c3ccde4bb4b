"""Files that are none: pipes and devices are one sentence at every door that opens a path."""

import os
import signal
from pathlib import Path

import pytest

from dora_mm.cli import main
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.readers.chat import read_chat
from dora_mm.data.vl.rows import BadRows
from dora_mm.utils.json_text import read_bounded


@pytest.fixture(params=["a pipe", "a device", "a loop"])
def no_file(request, tmp_path, monkeypatch):
    """Makes a path something that would never end, in the current directory."""
    monkeypatch.chdir(tmp_path)
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(120)  # a slow machine needs some of it to import

    def make(name):
        if request.param == "a pipe":
            os.mkfifo(name)
        else:
            Path(name).symlink_to("/dev/zero" if request.param == "a device" else name)
        return Path(name)

    yield make
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def test_reading(no_file):
    with pytest.raises(ValueError, match="a.json"):
        read_bounded(no_file("a.json"))


def test_chat_files(no_file):
    with pytest.raises(ValueError, match="rows.jsonl"):
        list(read_chat(SourceConfig(format="chat", file=str(no_file("rows.jsonl"))), BadRows("skip")))


COMMANDS = {
    "job.csv": ["sample", "job.csv"],
    "a.png": ["sample", "--replay", "a.png"],
    "a.safetensors": ["inspect", "a.safetensors"],
    "rows.json": ["new", "vlm", "mine", "--data", "rows.json"],
    "a.yaml": ["train", "a.yaml"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_named(no_file, name, capsys):
    no_file(name)
    assert main(COMMANDS[name]) == 2
    message = capsys.readouterr().err
    assert name in message
    assert len(message) < 400


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "a.txt", "b.png"])
def test_what_is_in_a_folder_of_images(no_file, name, image_folder, capsys):
    (image_folder / name).unlink(missing_ok=True)
    no_file(image_folder / name)
    code = main(["new", "sdxl", "mine", "--images", str(image_folder)])
    assert code == 2 or (code == 0 and name == "a.txt")  # that is no text of an image
    assert len(capsys.readouterr().err) < 2000
