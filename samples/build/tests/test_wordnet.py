"""Questions made from WordNet: the files are read as their format says, and no part of a row gives its answer away."""

import json
import re
from collections import Counter, defaultdict

import pytest

from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.readers.commonsense import named_option, read_commonsense
from dora_mm.data.vl.rows import BadRows
from samples.build.packages import WORDNET
from samples.build.wordnet.build import write_rows
from samples.build.wordnet.nouns import Noun, read_nouns
from samples.build.wordnet.questions import HIDDEN, KINDS, groups_of, make_rows

DATA = (
    "  1 a licence\n"
    "00000001 03 n 01 animal 0 000 | a living thing that moves\n"
    '00000002 05 n 02 bird 0 Aves 0 001 @ 00000001 n 0000 | (zoology) a thing with wings; "it flew"\n'
    "00000003 05 n 01 kestrel 0 001 @ 00000002 n 0000 | a small falcon; hovers\n"
    "00000004 06 n 01 kestrel 1 002 @ 00000005 n 0000 + 00000009 v 0101 | a kestrel of tin\n"
    "00000005 06 n 01 toy 0 001 @i 00000001 n 0000 | what children play with\n"
    "00000006 05 n 01 birdsong 0 001 @ 00000002 n 0000 | a song\n"
)
INDEX = (
    "  1 a licence\n"
    "animal n 1 0 1 1 00000001\n"
    "bird n 1 1 @ 1 1 00000002\n"
    "birdsong n 1 1 @ 1 1 00000006\n"
    "kestrel n 2 1 @ 2 1 00000003 00000004\n"
    "red_kite n 1 1 @ 1 1 00000003\n"
    "toy n 1 1 @i 1 1 00000005\n"
)
COUNTS = (
    "animal%1:03:00:: 1 9\nbird%1:05:00:: 1 5\nbirdsong%1:05:00:: 1 5\nkestrel%1:05:00:: 1 3\nkestrel%1:06:01:: 2 8\n"
)


def test_nouns_are_read_with_all_that_stands_above_them(tmp_path):
    for name, text in (("data.noun", DATA), ("index.noun", INDEX), ("cntlist.rev", COUNTS)):
        (tmp_path / name).write_text(text)
    bird = Noun("bird", "a thing with wings", "animal", frozenset({"bird", "animal"}))
    kestrel = Noun("kestrel", "a small falcon", "bird", frozenset({"kestrel", "bird", "Aves", "animal", "toy"}))
    song = Noun("birdsong", "a song", "animal", frozenset({"birdsong", "bird", "Aves", "animal"}))  # no kind is in it
    assert read_nouns(tmp_path, 3) == [bird, song, kestrel]
    assert read_nouns(tmp_path, 4) == [bird, song]


def nouns(count=60):
    """Nouns of some kinds, of which each stands in several."""
    kinds = [f"kind{number}" for number in range(11)]
    return [
        Noun(f"noun{i}", f"what is {i}", kinds[i % 11], frozenset({f"noun{i}", kinds[i % 11], kinds[i * i % 11]}))
        for i in range(count)
    ]


@pytest.mark.parametrize("size", [2, 4])
def test_no_noun_of_a_group_is_of_anothers_kind(size):
    groups = list(groups_of(nouns(), size))
    assert groups
    for group in groups:
        assert len(group) == size
        assert all((first.kind in second.kinds) == (first is second) for first in group for second in group)
    used = [noun.word for group in groups for noun in group]
    assert len(used) == len(set(used))
    toy = Noun("toy", "", "thing", frozenset({"toy", "thing"}))
    assert not list(groups_of([toy, Noun("doll", "", "toy", frozenset({"doll", "toy"}))], 2))


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_noun_every_answer_is_as_often_right(kind):
    """Rows that are alike but for the order of options have each option for their answer equally often."""
    found = defaultdict(Counter)
    for row in make_rows(kind, nouns(), 8, 0):
        hidden = row.as_json(hidden=True)["instruction"]
        assert HIDDEN in hidden
        assert f'"{row.about}"' not in hidden
        assert f'"{row.about}"' in row.as_json(hidden=False)["instruction"]
        options = {word: re.findall(rf"{word.capitalize()}: (.*?)(?: [AE]\w+\d:|\n)", hidden) for word in row.words}
        asked = hidden.partition("\n")[0] + str(sorted(options.values()))
        found[asked][str(options[row.answer] or row.answer)] += 1
    for answers in found.values():
        assert len(set(answers.values())) == 1
        assert len(answers) == {"boolq": 2, "hellaswag": 2, "arc_easy": 4}[kind]


def test_files_are_read_as_the_official_ones_and_ask_about_other_nouns(tmp_path):
    write_rows(tmp_path, nouns(200), 12, 8)
    texts = {}
    for name in ("train", *KINDS):
        file = tmp_path / f"{name}.json"
        rows = list(read_commonsense(SourceConfig(format="commonsense", file=str(file)), BadRows("stop")))
        assert len(rows) >= (36 if name == "train" else 8)
        assert all(named_option(row.answers[0], row.options) in row.options for row in rows)
        alone = json.loads((tmp_path / "alone" / f"{name}.json").read_text())
        assert [row["output"] for row in alone] == [row.answers[0] for row in rows]
        texts[name] = " ".join(row.text for row in rows)
    nouns_in = {name: set(re.findall(r"noun\d+", text)) for name, text in texts.items()}
    trained, scored = nouns_in.pop("train"), set().union(*nouns_in.values())
    assert trained
    assert scored
    assert not trained & scored
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.json")}
    write_rows(tmp_path, nouns(200), 12, 8)
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*.json")}


def test_too_few_nouns_are_refused():
    with pytest.raises(ValueError, match="nouns make .* rows of arc_easy, fewer than 400"):
        make_rows("arc_easy", nouns(), 400, 0)


@pytest.mark.skipif(not WORDNET.is_dir(), reason="needs Debian's wordnet-base")
def test_the_nouns_of_wordnet():
    found = {noun.word: noun for noun in read_nouns(WORDNET, 3)}
    assert 3500 < len(found) < 4200
    assert found["autumn"].kind == "season"
    assert {"season", "period", "abstraction"} <= found["autumn"].kinds
    assert found["autumn"].gloss == "the season when the leaves fall from the trees"
