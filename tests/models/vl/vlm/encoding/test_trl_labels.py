"""Rows are read and learned as TRL's vision collator does; docs/vlm_data.md lists what differs by intention.

Under the templates of published models, and in each class that has a chat template.
"""

import json
import re

import pytest

from dora_mm.config.models import VLMModelConfig
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.tables import open_table
from dora_mm.models.vl.vlm.family import VLM
from tests.documented.trl_labels import PAGE, PUBLISHED, ROWS, repeated, row_of, runs, with_template
from tests.shared.data.vl_files import write_json
from tests.shared.data.vlm_rows import write_images
from tests.shared.vl.tiny_vlm import CHAT

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
UNBEGUN = (
    "llava",
    "gemma3n",
    "gemma4",
    "gemma4_unified",
    "t5gemma2",
)  # whose rows TRL lacks the token for that begins a sequence
# Of which TRL reads an answered turn, and learns no end of it; rows are compared but for white space
OTHERWISE = ("llava", "llava_onevision")
# Templates that write a line break behind an image, where a row with one of its own gets two from TRL
BREAKING = ("llava", "llava_next", "llava_onevision", "fast_vlm", "internvl", "qianfan_ocr")
BROKEN = ("break", "breaks")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The folder of the images, and the examples that are read from a file of the rows that TRL had."""
    folder = write_images(tmp_path_factory.mktemp("pictures"))
    file = write_json(folder / "chat.json", [{"id": name, **row_of(name)} for name in ROWS])
    source = SourceConfig(format="chat", file=str(file), images=str(folder))
    table = open_table(source, folder / "tables", on_bad_data="stop")
    return str(folder), {table[index].id: table[index] for index in range(len(table))}


def opened(folder) -> VLM:
    """A model that reads on the day on which TRL has."""
    return VLM(VLMModelConfig(path=str(folder), date=THEIRS["date"]))


def whole(tokenizer, ids) -> str:
    """The text of token ids, but for white space and the ends of answers."""
    text = tokenizer.decode(ids).replace(tokenizer.eos_token or "</s>", "").removeprefix(tokenizer.bos_token or "<s>")
    return re.sub(r"\s+", "", text)


def check_ids(found, theirs, tokenizer, *, exact):
    if exact:
        assert repeated(found) == repeated(theirs)
    else:
        assert whole(tokenizer, found) == whole(tokenizer, theirs)


def check_labels(found, theirs, tokenizer, front):
    """Compares runs of labels, but for what TRL learns in front and for white space that it learns behind.

    Returns:
        How many tokens each of theirs has in front.
    """
    assert len(found) == len(theirs)
    in_front = []
    for (_, ids), (_, their_ids) in zip(found, theirs, strict=True):
        skipped = next(n for n in range(len(their_ids)) if their_ids[n : n + len(ids)] == ids)
        assert tokenizer.decode(their_ids[:skipped]) == front
        assert tokenizer.decode(their_ids[skipped + len(ids) :]) in BEHIND
        in_front.append(skipped)
    return in_front


def flat(ids) -> list[int]:
    """The ids that `repeated` was given."""
    return [token for each in ids for token in ([each] if isinstance(each, int) else [each[0]] * each[1])]


@pytest.mark.parametrize("name", THEIRS["templates"])
def test_rows_are_read_and_learned_as_trl_does_under_published_templates(name, tiny_vlm, rows):
    vlm, (images, examples) = opened(tiny_vlm(PUBLISHED[name])), rows
    tokenizer = with_template(vlm.rows.processor, name, THEIRS["templates"][name]).tokenizer
    for row, example in examples.items():
        found, theirs = vlm.rows.row("chat", example, images, ""), THEIRS["answers"][name][row]
        ids, learned = found.inputs["input_ids"][0].tolist(), runs(found.labels.tolist())
        exact = name not in BREAKING or row not in BROKEN
        check_ids(ids, flat(theirs["ids"]), tokenizer, exact=exact)
        in_front = check_labels(learned, theirs["labels"], tokenizer, FRONT.get(name, ""))
        if exact:
            starts = [start + more for (start, _), more in zip(theirs["labels"], in_front, strict=True)]
            assert [start for start, _ in learned] == starts


@pytest.mark.parametrize(
    "name", [name if name in CHAT else pytest.param(name, marks=pytest.mark.slow) for name in THEIRS["completions"]]
)
def test_rows_are_read_and_their_completions_learned_as_trl_does(name, tiny_vlm, rows):
    vlm, (images, examples) = opened(tiny_vlm(name)), rows
    tokenizer = vlm.rows.processor.tokenizer
    for row, theirs in THEIRS["completions"][name].items():
        if isinstance(theirs, str):
            with pytest.raises(ValueError, match="refuses a conversation"):
                vlm.rows.row("chat", examples[row], images, "")
            continue
        found = vlm.rows.row("chat", examples[row], images, "")
        ids, (start, learned) = found.inputs["input_ids"][0].tolist(), runs(found.labels.tolist())[-1]
        (their_start, their_learned), their_ids = theirs["labels"][0], flat(theirs["ids"])
        if name == "llava":  # whose template ends answers by a space, so that TRL's models never learn to stop
            assert learned.pop() == tokenizer.eos_token_id
            their_learned = their_learned[: len(learned)]
        (more,) = check_labels(
            [(start, learned)], [(their_start, their_learned)], tokenizer, COMPLETION_FRONT.get(name, "")
        )
        if name in UNBEGUN:
            assert ids.pop(0) == tokenizer.bos_token_id
            start -= 1
        exact = name not in OTHERWISE and (name not in BREAKING or row not in BROKEN)
        del their_ids[their_start : their_start + more]
        check_ids(ids, their_ids, tokenizer, exact=exact)
        assert start == their_start or not exact
