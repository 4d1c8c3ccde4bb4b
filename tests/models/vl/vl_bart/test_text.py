"""Text as token ids, and damaged tokenizers."""

import json

import pytest
import torch

from dora_mm.models.vl.vl_bart.loading import from_bart
from dora_mm.models.vl.vl_bart.model import VLInputs
from dora_mm.models.vl.vl_bart.text import decode, encode_inputs, encode_targets, load_tokenizer
from dora_mm.registries.vl_tasks import TASKS
from tests.shared.vl.small_vl_bart import DIM, small_bart, small_inputs, small_tokenizer

LONG = "two dogs and a red cat " * 50


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.bart])
def test_no_text_is_longer_than_the_model_has_positions(task):
    model = from_bart(small_bart(max_position_embeddings=16), len(small_tokenizer()), DIM, "image").eval()
    ids, mask = encode_inputs(small_tokenizer(), task, [LONG], [LONG], max_positions=16)
    assert ids.shape == (1, 16)
    assert ids[0, -1] == small_tokenizer().eos_token_id
    targets = encode_targets(small_tokenizer(), task, [LONG], max_positions=16)
    assert targets.shape[1] == min(16, TASKS[task].bart.max_target)
    visual_mask = torch.ones(1, 36, dtype=torch.long)
    inputs = VLInputs(ids, torch.cat([mask, visual_mask], dim=1), torch.randn(1, 1, 49, DIM))
    assert torch.isfinite(model(*inputs, labels=targets).loss)


def test_the_question_is_kept_if_there_are_few_positions():
    question = "[Q] two dogs?"
    room = encode_inputs(small_tokenizer(), "tvqa", [question], max_positions=600)[0].shape[1]
    ids, _ = encode_inputs(small_tokenizer(), "tvqa", [question], [LONG], max_positions=room + 8)
    assert decode(small_tokenizer(), ids)[0].endswith(f"{question} tvqa:")
    ids, _ = encode_inputs(small_tokenizer(), "tvqa", [question], [LONG], max_positions=3)
    assert ids.shape == (1, 3)


def test_no_answer_is_longer_than_the_model_has_positions():
    bart = small_bart(max_position_embeddings=16)
    model = from_bart(bart, len(small_tokenizer()), DIM, "image").eval()
    model.final_logits_bias[0, 2] = -1e4  # </s>
    assert model.answer_ids(small_inputs(["two dogs?"]), max_length=20).shape == (1, 16)


def with_an_impossible_merge(text: str) -> str:
    """A merge whose result the vocabulary lacks."""
    values = json.loads(text)
    values["model"]["merges"] = [["a", "no token"]]
    return json.dumps(values)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:500],
        lambda _: "",
        lambda _: "{}",
        lambda _: "[]",
        lambda _: "null",
        lambda text: text.replace('"ByteLevel"', '"NoLevel"'),
        with_an_impossible_merge,
    ],
)
def test_a_damaged_tokenizer_is_an_error_for_its_path(tmp_path, damage):
    small_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(damage(file.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ValueError, match=f"^model.path: {tmp_path} .*BART tokenizer"):
        load_tokenizer(str(tmp_path))
