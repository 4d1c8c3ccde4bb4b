"""A process without a home folder keeps no digests, and refuses a path with `~`."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dora_mm.cli import main
from dora_mm.config.latest import numbered
from dora_mm.models import hub
from dora_mm.utils import digest
from dora_mm.utils.digest import file_digest, files_digest
from dora_mm.utils.folders import new_folder
from dora_mm.utils.home import cache_folder, expanded


@pytest.fixture
def homeless(monkeypatch):
    """As in a container that runs as a user whom it does not know."""

    def no_user(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "USERPROFILE", "HOMEPATH", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", no_user)


def test_a_large_file_has_a_digest_all_the_same(tmp_path, monkeypatch, homeless):
    monkeypatch.setattr(digest, "REMEMBERED", 100)
    monkeypatch.chdir(tmp_path)
    file, read = tmp_path / "model.safetensors", []
    save_file({"a": torch.zeros(100)}, file)
    monkeypatch.setattr(digest, "file_digest", lambda path: read.append(path) or file_digest(path))
    assert files_digest([file]) == files_digest([file])
    assert (len(read), cache_folder(), [path.name for path in tmp_path.iterdir()]) == (2, None, [file.name])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert files_digest([file]) == files_digest([file])
    assert len(read) == 3


@pytest.mark.parametrize(
    "command",
    [
        ["train", "~/mine.yaml"],
        ["train", "configs/sdxl/demo.yaml", "--set", "output=~/mine"],
        ["sample", "--set", "prompts=[a]", "output=~/out"],
        ["convert", "~/adapter", "out", "--to", "kohya"],
        ["new", "sdxl", "~/mine"],
        ["gallery", "~/runs/latest"],
    ],
)
def test_a_path_in_the_home_folder_is_refused_in_one_sentence(command, homeless, capsys):
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "this user has no home folder: set HOME, or write the path out" in line


def test_models_of_the_hub_have_no_place(homeless, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "~/.cache/huggingface/hub")
    assert hub.local_copy("owner/name") is None
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    with pytest.raises(hub.UnreachableError, match=r"model\.path: owner/name is not on this machine"):
        hub.check_hub("owner/name", key="model.path")
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    with pytest.raises(ValueError, match=r"model\.path: owner/name is a model of the hub.* set HF_HOME"):
        hub.check_hub("owner/name", key="model.path")


def test_what_is_said_of_it(homeless):
    no_home = "this user has no home folder: set HOME, or write the path out"
    with pytest.raises(ValueError, match=f"^~/out: {no_home}"):
        new_folder("a", "~/out")
    with pytest.raises(ValueError, match=f"~/runs/a/latest: {no_home}"):
        numbered("~/runs/a/latest")
    with pytest.raises(ValueError, match="~nobody-at-all/x: there is no user nobody-at-all, or write the path out"):
        expanded("~nobody-at-all/x")
    assert expanded("./~") == Path("~")
