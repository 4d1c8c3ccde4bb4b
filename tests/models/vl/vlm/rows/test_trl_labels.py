"""What is learned is what TRL's vision collator learns, under the published templates and in each class."""

import json

import pytest

from dora_mm.config.models import VLMModelConfig
from dora_mm.models.vl.vlm.family import VLM
from tests.documented.trl_labels import CONVERSATIONS, PAGE, PUBLISHED, example, runs, with_template
from tests.models.vl.vlm.tiny import CHAT
from tests.models.vl.vlm.vlm_rows import write_pictures

THEIRS = json.loads(PAGE.read_text(encoding="utf-8"))
BEHIND = ("", "\n")  # what TRL learns behind the token that ends a turn: the white space before the next turn
# What TRL learns in front of what the model writes: of a template, the end of what asks for an answer
FRONT = {
    "qwen3_5_think": "<think>\n",
    "qwen3_5_nothink": "<think>\n\n</think>\n\n",
    "muse_glimmer": "<|start|>assistant",
}
# and of a completion, a token that begins a sequence, put there once more; or what stands only in answered turns
COMPLETION_FRONT = {
    "mllama": "<|begin_of_text|>",
    "molmo2": "<|im_start|>",
    "emu3": "<|im_start|>",
    "llava_onevision": " \n",
}


def ours(vlm, name, pictures):
    row = vlm.rows.row("chat", example(name), str(pictures), "")
    return runs(row.labels.tolist())


def check(found, theirs, tokenizer, front, *, same_rows=True):
    """Compares runs of labels: their ids, and where each starts, but for a beginning-of-sequence token.

    Args:
        found: Ours.
        theirs: TRL's.
        tokenizer: Decodes ids.
        front: What TRL learns in front.
        same_rows: Whether both read the same; else only the ids are compared.
    """
    assert len(found) == len(theirs)
    for (start, ids), (their_start, their_ids) in zip(found, theirs, strict=True):
        skipped = next(n for n in range(len(their_ids)) if their_ids[n : n + len(ids)] == ids)
        assert tokenizer.decode(their_ids[:skipped]) == front
        assert tokenizer.decode(their_ids[skipped + len(ids) :]) in BEHIND
        assert start - their_start - skipped in (0, 1) or not same_rows


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize("name", THEIRS["templates"])
def test_answers_are_learned_as_trl_learns_them_under_published_templates(name, tiny_vlm, pictures):
    vlm = VLM(VLMModelConfig(path=str(tiny_vlm(PUBLISHED[name]))))
    processor = with_template(vlm.rows.processor, name, THEIRS["templates"][name])
    for row in CONVERSATIONS:
        found = ours(vlm, row, pictures)
        check(found, THEIRS["answers"][name][row]["labels"], processor.tokenizer, FRONT.get(name, ""))


@pytest.mark.parametrize(
    "name", [name if name in CHAT else pytest.param(name, marks=pytest.mark.slow) for name in THEIRS["completions"]]
)
def test_completions_are_learned_as_trl_learns_them(name, tiny_vlm, pictures):
    vlm = VLM(VLMModelConfig(path=str(tiny_vlm(name))))
    tokenizer = vlm.rows.processor.tokenizer
    for row, theirs in THEIRS["completions"][name].items():
        if isinstance(theirs, str):
            with pytest.raises(ValueError, match="refuses a conversation"):
                ours(vlm, row, pictures)
            continue
        start, ids = ours(vlm, row, pictures)[-1]
        if name == "llava":  # whose template ends answers by a space, so that TRL's models never learn to stop
            assert ids.pop() == tokenizer.eos_token_id
            theirs["labels"][0][1].pop()
        same_rows = name != "llava" and name not in COMPLETION_FRONT
        check([(start, ids)], theirs["labels"], tokenizer, COMPLETION_FRONT.get(name, ""), same_rows=same_rows)
