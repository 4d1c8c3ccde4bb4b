"""Weights that wait in main memory: on a device with streams each is there when it is used, and gone afterwards."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.test_card import JOB, answering, is_same, pytestmark, python, training

__all__ = ["pytestmark"]

STREAMED = ["--set", "memory.stream=all", "memory.stream_text=all"]
FLOWS = ["tiny_flux2_klein", "tiny_krea2", "tiny_qwen_image", "tiny_qwen_image_21", "tiny_sd3", "tiny_z_image"]


@pytest.fixture
def same_if_streamed(tmp_path) -> Callable[..., dict[str, Any]]:
    """Runs commands with weights that stay and that wait, asserts that files are equal, and returns what both say."""

    def run(*commands: list[Any]) -> dict[str, Any]:
        found = {}
        for kind, given in (("stays", []), ("waits", STREAMED)):
            (tmp_path / kind).mkdir()
            words = []
            for number, (name, config, *more) in enumerate(commands):
                file = tmp_path / f"{kind}{number}.yaml"
                file.write_text(json.dumps(config))
                words.append([name, str(file), *more, *given])
            (tmp_path / f"{kind}.json").write_text(json.dumps(words))
            files = [str(tmp_path / f"{kind}.json"), str(tmp_path / f"{kind}_results.json")]
            done = python("-m", "tests.gpu.run", "card", *files, cwd=tmp_path / kind)
            assert done.returncode == 0, done.stderr[-4000:]
            found[kind] = json.loads(Path(files[1]).read_text())
            assert [each["error"] for each in found[kind] if each["code"]] == []
        stays, waits = (
            {str(f.relative_to(tmp_path / kind)): f for f in (tmp_path / kind).rglob("*") if f.is_file()}
            for kind in ("stays", "waits")
        )
        compared = [name for name in stays if name.endswith((".safetensors", ".png")) or "answers/" in name]
        assert len(compared) > 2
        assert [name for name in compared if not is_same(stays[name], waits[name])] == []
        return found

    return run


@pytest.mark.slow
@pytest.mark.parametrize("family", FLOWS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flow_models(same_if_streamed, tmp_path, image_folder, family, checkpointing):
    model = import_module(f"tests.shared.images.{family}").build(tmp_path / "model")
    config = training(model, image_folder, ["transformer.attn", "transformer.ff"])
    config["adapter"]["cache"] = "norms"
    config["train"] |= {"gradient_checkpointing": checkpointing, "gradient_accumulation_steps": 2}
    stays, waits = same_if_streamed(["train", config], ["sample", JOB]).values()
    assert waits[0]["peak"] < stays[0]["peak"]
