import sys
import types

import pytest

CONFIG = """\
pipeline: train_diffusion
model: {path: some/model}
adapter: {rank: 4}
data: {folder: PICTURES, resolution: 128}
optimizer: {lr: 1e-4}
train: {steps: 10, batch_size: 2}
"""


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """The hub answers, since models of stubs are names of nothing."""
    monkeypatch.setattr("dora_mm.models.hub.hub_answers", lambda: True)


@pytest.fixture
def config(tmp_path):
    images = tmp_path / "pictures"
    images.mkdir()
    path = tmp_path / "mine.yaml"
    path.write_text(CONFIG.replace("PICTURES", str(images)))
    return path


@pytest.fixture
def pipeline(monkeypatch):
    """Replaces a recipe by a stub, whose `.calls` lists the arguments of its calls."""

    def replace(action=lambda: None, name="train_diffusion"):
        module = types.ModuleType(f"dora_mm.pipelines.{name}")
        module.calls = []

        def main(config, *, resume=None):
            module.calls.append((config, resume))
            action()

        module.main = main
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return module

    return replace
