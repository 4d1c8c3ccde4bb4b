"""Images that are generated as the contact sheets of their adapter's training were."""

import pytest
import torch
from safetensors.torch import save_file

from dora_mm.config.generation import BatchGenerationConfig
from dora_mm.sampling.trainings import as_in_contact_sheets, training_of


@pytest.fixture
def adapters(tmp_path):
    """Writes files of trainings that drew in these steps; None: the file says nothing of a training."""

    def write(*steps):
        files = {}
        for number, count in enumerate(steps):
            files[str(number)] = tmp_path / f"{number}.safetensors"
            sample = f"{{steps: {count}, guidance: 3.0, guidance_rescale: 0.5, prompts: [a]}}"
            save_file(
                {"a": torch.zeros(1)}, files[str(number)], None if count is None else {"config": f"sample: {sample}"}
            )
        return files

    return write


def job(**given):
    return BatchGenerationConfig(pipeline="sample", name="a", prompts=("a",), **given)


def test_what_a_config_leaves_out_is_that_of_the_training(adapters):
    config = as_in_contact_sheets(job(guidance=7.0), adapters(20))
    assert (config.steps, config.guidance, config.negative_prompt) == (20, 7.0, None)
    assert as_in_contact_sheets(job(), adapters(20)).guidance_rescale == 0.5
    assert as_in_contact_sheets(job(negative_prompt=None, steps=25), adapters(20)).steps == 25


def test_files_that_say_nothing_change_nothing(adapters, tmp_path):
    assert as_in_contact_sheets(job(), adapters(None)) == job()
    assert as_in_contact_sheets(job(), {}) == job()
    assert as_in_contact_sheets(job(), adapters(None, 20)).steps == 20
    for damaged in ("sample: [", "sample: 7", "7", "sample: {steps: none}", "a: b"):
        save_file({"a": torch.zeros(1)}, tmp_path / "damaged.safetensors", {"config": damaged})
        assert as_in_contact_sheets(job(), {"a": tmp_path / "damaged.safetensors"}) == job()
        assert training_of(tmp_path / "damaged.safetensors") is None


def test_trainings_that_differ_are_named(adapters, caplog):
    config = as_in_contact_sheets(job(), adapters(20, 30))
    assert (config.steps, config.guidance) == (25, 3.0)
    assert caplog.messages[0] == "The trainings of these adapters drew with steps 20 and 30, and this generates with 25"
