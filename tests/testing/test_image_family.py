"""A family of another package that is wrong is told so by its check, and one that is right is not."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dora_mm.models.images.sd3 import StableDiffusion3
from dora_mm.testing import check_image_family
from tests.shared.images.tiny_sd3 import build
from tests.shared.packages import outside_package

ROOT = Path(__file__).parents[2]
RECORD = """
from dora_mm.config.models import StableDiffusion3Config
from dora_mm.registries.image_families import ImageFamily


class OutsideConfig(StableDiffusion3Config):
    pass


FAMILY = ImageFamily("outside", "outside_model:Outside", "outside:OutsideConfig", "OutsidePipeline")
"""
MODEL = """
import diffusers

from dora_mm.models.images.sd3 import StableDiffusion3


class OutsidePipeline(diffusers.StableDiffusion3Pipeline):
    pass


class Outside(StableDiffusion3):
    name = "outside"

    @classmethod
    def pipeline_class(cls):
        return OutsidePipeline
"""
WRONG = {
    "levels": ("scheduler_makes_levels = False", "noise levels of 3 steps: 1.000, 0.857, 0.600, 0.000, where the"),
    "sign": (
        """
        def predict(self, *inputs):
            return -super().predict(*inputs)
        """,
        "`predict` without guidance: the latents of step 2 are not those of the pipeline",
    ),
    "guidance": (
        """
        def prompt_inputs(self, encoded, guidance):
            return super().prompt_inputs(encoded, guidance - 1)
        """,
        "`predict` with guidance 5: the latents of step 2 are not those of the pipeline",
    ),
    "factor": (
        """
        def normalized(self, latents):
            return super().normalized(latents) * 1.1
        """,
        "`normalized` is not the inverse of what the pipeline does",
    ),
    "padding": (
        """
        def predict(self, noised, time, prompts, framings):
            return super().predict(noised, time, prompts, framings) * len(prompts)
        """,
        "a prompt in a batch with a longer one",
    ),
}
CHECK = """
import json, sys
from dora_mm.models.images.sd3 import StableDiffusion3
from dora_mm.testing import check_image_family
print(json.dumps(check_image_family(sys.argv[1], trains=len(sys.argv) > 2)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = build(tmp_path_factory.mktemp("outside") / "model")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusion3Pipeline", "OutsidePipeline"))
    return folder


def checked(folder, tmp_path, body="", *more):
    """The sentences about a family whose class has this body, too."""
    model = MODEL + textwrap.indent(textwrap.dedent(body), "    ")
    files = {"outside.py": RECORD, "outside_model.py": model}
    package = outside_package(tmp_path / "package", files, {"image_families.outside": "outside:FAMILY"})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(package), str(ROOT)))}
    call = [sys.executable, "-c", CHECK, str(folder), *more]
    done = subprocess.run(call, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_right_family_of_another_package_is_accepted(folder, tmp_path):
    assert checked(folder, tmp_path, "", "trains") == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_family_of_another_package_is_refused(fault, folder, tmp_path):
    body, expected = WRONG[fault]
    found = checked(folder, tmp_path, body)
    assert any(sentence.startswith(expected) for sentence in found), found


@pytest.mark.parametrize("is_dynamic", [False, True])
def test_other_noise_levels_than_the_schedulers_are_named(is_dynamic, tmp_path, monkeypatch):
    monkeypatch.setattr(StableDiffusion3, "scheduler_makes_levels", False)
    model = build(tmp_path / "model", uses_dynamic_shifting=is_dynamic)
    found = check_image_family(model, trains=False)
    assert [re.match(r"noise levels|images|$", sentence).group() for sentence in found[:2]] == [
        "noise levels",
        "images",
    ]


@pytest.mark.slow
def test_sdxl_is_right(tiny_folder):
    assert check_image_family(tiny_folder) == []
