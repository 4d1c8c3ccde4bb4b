"""Tiny models with random weights that whole pipelines run on, and images."""

import gc
import os
import signal
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never leave the machine
if "PYTEST_XDIST_WORKER" not in os.environ:  # which models of the hub are on it is all the same; workers inherit this
    HUB = tempfile.TemporaryDirectory(prefix="hub")
    os.environ["HF_HOME"] = HUB.name
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # without a GPU, kernels run in the interpreter; read when imported

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

from tests.shared.data.images_made import write_images

if TYPE_CHECKING:  # it loads diffusers, and the process that gives out tests to others does without
    from dora_mm.models.images.sdxl.family import SDXL

settings.register_profile("untimed", deadline=None)  # a first example pays for what is loaded once
settings.load_profile("untimed")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background: tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

gc.disable()  # until all tests and what they import are there: they stay, and no search of garbage pays for them


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


SIZES = {
    "resolution": 64,
    "num_merges": 300,
    "vae_channels": (8, 8, 16, 16),
    "latent_channels": 4,  # as in SDXL
    "unet_channels": (16, 32, 64),
    "unet_layers": 1,
    "text_widths": (16, 32),
}


@pytest.fixture
def tiny() -> "SDXL":
    from dora_mm.models.images.sdxl.random_weights import build_tiny_sdxl

    model = build_tiny_sdxl(**SIZES)
    model.freeze()
    return model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dora_mm.models.images.sdxl.random_weights import build_tiny_sdxl

    folder = tmp_path_factory.mktemp("models") / "tiny-sdxl"
    build_tiny_sdxl(**SIZES).pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model of tests/shared/vl/tiny_vlm.py by name, built when first asked for; not to be changed."""
    from tests.shared.vl import tiny_vlm as tiny  # loads 16 classes of transformers

    @cache
    def folder(name: str) -> Path:
        return tiny.build(name, tmp_path_factory.mktemp(name))

    return folder


@pytest.fixture(scope="session")
def vision(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The `vision` section of a small tower, whose layers have the DIM channels of tests/shared/vl/small_towers.py."""
    from tests.shared.vl.small_towers import small_tower  # loads timm

    return small_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Five images of two shapes with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    write_images(folder)
    return folder


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_lines_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """They depend on the time that a machine takes, and the other messages do not."""
    monkeypatch.setattr("dora_mm.utils.progress.FIRST_LINE", 3600.0)


@pytest.fixture(autouse=True)
def new_accelerator() -> Iterator[None]:
    """A process holds one accelerator state: what a fixture of a module or a test set is not there for the next."""
    reset_accelerator()
    yield
    reset_accelerator()


def reset_accelerator() -> None:
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)
