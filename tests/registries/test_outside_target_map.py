"""A target map of another package, with a word of its own for a part, is shown, injected and trained by command."""

import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from dora_mm.registries.image_families import IMAGE_FAMILIES
from tests.registries.test_outside_package import run
from tests.shared.images import tiny_flux2_klein
from tests.shared.packages import outside_package

RECORDS = """
from dora_mm.config.models import Flux2KleinConfig
from dora_mm.registries.image_families import ImageFamily
from dora_mm.registries.target_maps import TargetMapRecord

MAP = TargetMapRecord("gates_map:MAP", ("gates_map:Gated",), ("gates", "single"), ("transformer",))
WRONG = TargetMapRecord("gates_map:MAP", (), ("gates",), ("transformer",))
SPOKEN = TargetMapRecord("gates_map:SPOKEN", ("spoken",), ("text.values",))


class GatedKleinConfig(Flux2KleinConfig):
    pass


FAMILY = ImageFamily("gated klein", "gates_map:GatedKlein", "gates:GatedKleinConfig", "GatedKleinPipeline")
"""
MODEL = r"""
import diffusers

from dora_mm import TargetMap
from dora_mm.models.images.flux2_klein import Flux2Klein

MAP = TargetMap(
    "gates",
    {
        "gates": ("double_stream_modulation_img.linear",),
        "single": (r"re:single_transformer_blocks\.\d+\.attn\.to_out",),
    },
    default=("single",),
)
SPOKEN = TargetMap("spoken", {"text.values": ("v_proj",)})


class Gated(diffusers.Flux2Transformer2DModel):
    pass


class GatedKleinPipeline(diffusers.Flux2KleinPipeline):
    pass


class GatedKlein(Flux2Klein):
    name = "gated_klein"
    maps = {"transformer": "gates"}

    @classmethod
    def pipeline_class(cls):
        return GatedKleinPipeline
"""
POINTS = {
    "target_maps.gates": "gates:MAP",
    "target_maps.wrong": "gates:WRONG",
    "target_maps.spoken": "gates:SPOKEN",
    "image_families.gated_klein": "gates:FAMILY",
}
INJECT = """
import sys, torch, dora_mm
from dora_mm.targets import find, map_of
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
print(dora_mm.inject(LlamaForCausalLM(config), "spoken", dora_mm.DoRASpec(rank=2)).num_modules)
print(map_of({"model_type": "spoken"}).name, map_of({"_class_name": "Gated"}).name)
try:
    find("wrong")
except ValueError as error:
    print(error)
"""


@pytest.fixture
def package(tmp_path):
    return outside_package(tmp_path / "package", {"gates.py": RECORDS, "gates_map.py": MODEL}, POINTS)


def config_of(model, data, parts):
    return {
        "pipeline": "train_diffusion",
        "output": "run",
        "model": {"path": str(model), "gated_klein": {"max_tokens": 64}},
        "adapter": {"rank": 2, "parts": parts},
        "data": {"folder": str(data), "resolution": 64},
        "optimizer": {"lr": 0.3},
        "train": {"steps": 2, "batch_size": 1},
    }


@pytest.mark.slow
def test_its_parts_are_trained_resumed_drawn_and_read(package, image_folder, tmp_path):
    folder = tiny_flux2_klein.build(tmp_path / "model")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace(IMAGE_FAMILIES["flux2_klein"].pipeline, "GatedKleinPipeline"))
    config = config_of(folder, image_folder, {"transformer.gates": {"rank": 3}, "transformer.single": None})
    (tmp_path / "train.yaml").write_text(json.dumps(config))
    (tmp_path / "job.csv").write_text("prompt,seed\na ball,3\n")
    sample = "sample job.csv --set adapter.path=run output=job steps=1 width=64 height=64"
    done = run(package, "train train.yaml --dry-run", "train train.yaml", "train --resume run", sample, "inspect run")
    assert done.returncode == 0, done.stderr
    assert "transformer.gates" in done.stdout + done.stderr
    weights = load_file(tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors")
    ranks = {name.removesuffix(".lora_A.weight"): len(each) for name, each in weights.items() if ".lora_A." in name}
    assert ranks == {
        "transformer.double_stream_modulation_img.linear": 3,
        "transformer.single_transformer_blocks.0.attn.to_out": 2,
        "transformer.single_transformer_blocks.1.attn.to_out": 2,
    }
    assert (tmp_path / "job" / "samples").is_dir()


def test_it_is_shown_by_its_name_and_a_word_that_is_near_is_refused(package, tiny_vlm, tmp_path):
    (tmp_path / "train.yaml").write_text(json.dumps(config_of("a/b", "data", ["transformer.gate"])))
    done = run(package, f"inspect {tiny_vlm('llama')} --targets spoken", "train train.yaml")
    assert "text.values  yes" in done.stdout
    assert "there is no part 'transformer.gate', did you mean 'transformer.gates'?" in done.stderr


def test_a_network_whose_class_is_of_the_package_is_shown(package, tmp_path):
    folder = tiny_flux2_klein.build(tmp_path / "model") / "transformer"
    config = folder / "config.json"
    config.write_text(config.read_text().replace("Flux2Transformer2DModel", "Gated"))
    done = run(package, f"inspect {folder} --targets gates")
    assert done.returncode == 0, done.stderr
    assert "transformer: Gated, target map gates at rank 8" in done.stdout
    assert "by default (single)" in done.stdout


def test_it_is_injected_by_its_name_and_found_for_its_models(package):
    done = subprocess.run(
        [sys.executable, "-c", INJECT], env={"PYTHONPATH": f"{package}:."}, capture_output=True, text=True, check=True
    )
    number, found, refused = done.stdout.splitlines()
    assert (number, found) == ("2", "spoken gates")
    assert refused == "target map wrong: gates_map:MAP has the parts gates, single, and its record gates"
