"""`make rehearsal`: files like published ones, what is measured of a process, the page; and all on tiny models."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from dora_mm.formats.files.header import TensorEntry
from tests.rehearsal.measuring import Measured, Peak, memory_until_end
from tests.rehearsal.report import folder_name, forecast, page_of, record, save
from tests.rehearsal.stages import BEFORE, STEPS, Stage
from tests.rehearsal.weights import write_weights

PAGE = """\
memory                                                                      MB
unet, 2,567,463,684 frozen in bfloat16                             cpu  5,134.9
12,277,760 trained                                                 cpu     49.1
activations (gradient checkpointing, an estimate)  cpu    847.9
together                                                           cpu  6,000.0
with train.gradient_checkpointing=false the activations take 11,383.9 MB

beside the steps                   weights, MB  activations  together
captions, 4 at once                    1,635.4         39.8   1,675.2
VAE, an image of 1024 px encoded        167.3      2,697.0   2,864.3
VAE, an image of 1024 px decoded        167.3      3,697.0   3,864.3
"""


@pytest.mark.slow
def test_the_single_file_is_as_long_as_the_published_one(tmp_path, monkeypatch):
    """2,515 tensors; 6,938,078,334 bytes with another header."""
    from tests.rehearsal import models

    found = {}
    monkeypatch.setattr(models, "write_file", lambda path, specs: found.update(specs))
    models.single(tmp_path / "model")
    assert len(found) == 2515
    assert sum(entry.num_bytes for entry in found.values()) == pytest.approx(6_938_078_334, abs=1e6)


def test_weights_are_written_in_shards_that_safetensors_reads(tmp_path):
    specs = {f"layer.{n}.weight": TensorEntry(torch.bfloat16, (64, 256), 0) for n in range(3)}
    write_weights(tmp_path, "model", specs | {"norm.bias": TensorEntry(torch.bfloat16, (64,), 0)}, most=70_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) == 2
    with safe_open(tmp_path / index["layer.2.weight"], "pt") as file:
        assert file.get_tensor("layer.2.weight").float().std() == pytest.approx(256**-0.5, rel=0.05)
        assert not file.get_tensor("norm.bias").any()


def test_the_memory_of_a_process_is_what_it_has_written():
    code = "import time; block = bytearray(b'1') * 100_000_000; time.sleep(0.4)"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        sizes = [anonymous for anonymous, _ in memory_until_end(process)]
    assert 100 < max(sizes) < 130


def test_a_forecast_is_read_from_the_page_of_a_dry_run():
    assert forecast(PAGE) == {STEPS: 6000.0, BEFORE: 5184.0}
    assert forecast(PAGE.replace("5,134.9", "1,000.0"))[BEFORE] == 2864.3
    before = "unet in bfloat16 in main memory, before it is stored in float8   5,134.9   0.0   5,134.9"
    assert forecast(f"{PAGE.replace('5,134.9', '2,956.6')}{before}\n")[BEFORE] == 5134.9
    assert forecast("nothing") == {}


def test_the_page_says_how_far_the_dry_run_is_off(tmp_path):
    stages = [Stage("dry run", (), is_forecast=True), Stage("train, killed after a step", (), trains=True, killed=True)]
    peaks = {
        BEFORE: Peak(anonymous=5000.0, mapped=4500.0),
        STEPS: Peak(anonymous=6000.0, mapped=100.0),
    }
    first = {**peaks, BEFORE: Peak(anonymous=5000.0, mapped=9000.0)}  # which computes digests
    stages.append(Stage("resume", (), trains=True))
    done = [Measured("", 0, 1.0, 1.0, 0.0, {BEFORE: Peak()}, PAGE), Measured("", -9, 60.0, 90.0, 1.0, first)]
    done.append(Measured("", 0, 60.0, 90.0, 1.0, peaks))
    about = {"title": "A model", "disk": 7.0, "settings": "", "left_out": ["merge: no room."]}
    page = save(tmp_path, "model", record(stages, done, about)).read_text()
    assert "| steps | 6,000 | 6,100 | -2% |" in page
    assert "| before the steps | 5,184 | 5,000 | +4% |" in page
    assert "Left out: merge" in page
    assert page == page_of(json.loads((tmp_path / "rehearsal.json").read_text()))


def test_folders_are_named_by_the_machine():
    assert folder_name("a thread on 2 cores of an AMD EPYC") == "epyc_2_cores"
    assert folder_name("2 threads on 2 cores of an Intel(R) Xeon(R) Processor") == "xeon_2_cores"
    assert folder_name("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vlm", "sdxl", "z_image"])
def test_the_commands_run_on_tiny_models(tmp_path, name):
    from tests.rehearsal.__main__ import main

    assert main([name, "--dry", "--output", str(tmp_path)]) == 0
    stages = json.loads((tmp_path / "rehearsal.json").read_text())["models"][name]["stages"]
    codes = {stage["label"]: stage["code"] for stage in stages}
    assert codes.pop("train, killed after a step") == -9
    assert not any(codes.values())
    assert all(stage["processor_seconds"] > 0 for stage in stages)
