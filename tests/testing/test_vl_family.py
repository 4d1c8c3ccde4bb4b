"""Families of vision-language models are right, and a wrong one is told so."""

import pytest

from dora_mm.models.vl.vlm.family import VLM
from dora_mm.testing import check_vl_family


@pytest.mark.parametrize("name", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_models_of_transformers_are_right(name, tiny_vlm):
    assert check_vl_family(tiny_vlm(name)) == []


@pytest.mark.slow
def test_language_models_are_right(tiny_vlm):
    assert check_vl_family(tiny_vlm("llama")) == []


def test_losses_that_depend_on_the_batch_are_named(tiny_vlm, monkeypatch):
    right = VLM.row_losses

    def wrong(self, batch):
        sums, counts = right(self, batch)
        return sums * len(sums), counts

    monkeypatch.setattr(VLM, "row_losses", wrong)
    expected = ["rows of a batch, the shorter one padded, have not the losses that they have alone"]
    assert check_vl_family(tiny_vlm("llava"), trains=False) == expected
