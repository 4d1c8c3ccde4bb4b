"""Rows with images that are too long lose whole exchanges, and what is left is read and learned as a row of its own."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dora_mm.config.models import VLMModelConfig
from dora_mm.config.vl import DecodeConfig
from dora_mm.data.vl.example import IMAGE, VIDEO, Example, Turn
from dora_mm.data.vl.rows import RowTooLong
from dora_mm.models.vlm.encoding import IGNORED, TEXT_INPUTS, TokenRow
from dora_mm.models.vlm.family import VLM
from tests.models.vlm import tiny
from tests.models.vlm.rows import cut_rows
from tests.models.vlm.rows.cut_rows import Oracle, conversation, encoded, first_exchanges, opened, set_limit
from tests.models.vlm.rows.video_rows import write_visuals

# Of each mechanism one: positions of images (Qwen, GLM, Hunyuan), tiles, images cut or tiled by their number, one token
# an image, inputs per token of other names, images that the processor alone knows the places of.
MECHANISMS = ("qwen2_5_vl", "glm4v", "internvl", "llava_onevision", "mllama", "ernie4_5_vl_moe", "llava")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_visuals(tmp_path_factory.mktemp("visuals"))


def equal(ours, theirs) -> bool:
    return torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs


def check_is_start(row: TokenRow, whole: TokenRow, limit: int) -> None:
    """Checks that a row has the first tokens of another one, and all of its images."""
    assert row.inputs.keys() == whole.inputs.keys()
    for name, value in row.inputs.items():
        expected = whole.inputs[name][:, :limit] if name in TEXT_INPUTS else whole.inputs[name]
        assert equal(value, expected), name
    assert row.labels.tolist() == whole.labels[:limit].tolist()
    assert row.num_images == whole.num_images
    assert row.num_image_tokens == whole.num_image_tokens


@torch.no_grad()
def check_cut(vlm: VLM, example: Example, pictures: str, limits=()) -> None:
    """Checks what is left of a conversation at each length, by rows of its first exchanges, and what a class computes."""
    oracle = Oracle.of(vlm, example, pictures)
    total = len(oracle.prefixes)
    for limit in limits or oracle.limits():
        row, (whole, count) = encoded(vlm, example, pictures, limit), oracle.left(limit)
        left_out = all(label == IGNORED for label in oracle.labels(limit))
        assert row.loses_answer == left_out, limit
        assert row.length + row.num_cut == oracle.prefixes[-1].length
        assert row.num_image_tokens + row.num_image_cut == oracle.prefixes[-1].num_image_tokens
        assert row.num_exchanges_cut == total - count
        if not left_out:
            check_is_start(row, whole, limit)
        batch = vlm.batch("chat", [example], pictures, [("", 1.0)])
        assert (len(batch.groups), len(batch.left_out)) == ((0, 1) if left_out else (1, 0))
        loss = vlm.loss(batch, torch.Generator())
        assert loss.mean.isfinite()
        assert int(loss.count) == sum(label != IGNORED for label in oracle.labels(limit))


@pytest.mark.parametrize("name", MECHANISMS)
def test_whole_exchanges_go_until_the_rest_fits(name, tiny_vlm, folder):
    vlm = opened(tiny_vlm(name))
    for row in ("none", "one", "three, apart", "four together"):
        check_cut(vlm, conversation(cut_rows.ROWS[row]), str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", cut_rows.NAMES)
def test_every_class_learns_what_has_room_of_rows_with_up_to_four_images(name, tmp_path, folder):
    vlm = opened(tiny.build(name, tmp_path))
    if vlm.plain is not None:
        pytest.skip("it has no chat template")
    for counts in cut_rows.ROWS.values():
        check_cut(vlm, conversation(counts), str(folder))
    if "video" in vlm.rows.encoder.kinds:
        filmed = conversation((1, 1), marker=VIDEO)
        check_cut(vlm, filmed, str(folder), Oracle.of(vlm, filmed, str(folder)).limits()[-3:])
