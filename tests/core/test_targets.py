"""Which modules a map selects, and its messages when it does not fit."""

import pytest
from torch import nn

from dora_mm.core.targets import TargetMap, match_modules, parts_in


class Block(nn.Module):
    def __init__(self, extra: bool = False):
        super().__init__()
        self.to_q = nn.Linear(4, 4)
        self.to_out = nn.ModuleList([nn.Linear(4, 4), nn.Dropout()])
        self.norm = nn.LayerNorm(4)
        if extra:
            self.to_k = nn.Linear(4, 4)


def model(*blocks):
    return nn.ModuleDict({"blocks": nn.ModuleList(blocks), "head": nn.Linear(4, 4), "my_to_q": nn.Linear(4, 4)})


def patterns(*items, **more):
    return TargetMap("given", {"given": items}, **more)


def test_a_plain_pattern_is_a_dotted_suffix():
    taken = match_modules(model(Block(), Block()), patterns("to_q", "to_out.0"))
    assert list(taken) == ["blocks.0.to_q", "blocks.0.to_out.0", "blocks.1.to_q", "blocks.1.to_out.0"]


def test_a_regular_expression_matches_the_whole_path():
    assert list(match_modules(model(Block()), patterns("re:head|.*to_out.0"))) == ["blocks.0.to_out.0", "head"]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("to_qq", "'to_qq' of target map given matches no module; nearest: to_q"),
        (r"re:.*\.to_ou\.0", "nearest: to_out.0"),
        ("to_out", "ModuleList, which cannot be adapted"),
        ("norm", "LayerNorm, which cannot be adapted"),
        ("re:((", "'re:((' of target map given is not a valid regular expression"),
    ],
)
def test_patterns_that_do_not_fit(pattern, words):
    with pytest.raises(ValueError, match="given") as error:
        match_modules(model(Block()), patterns("to_q", pattern))
    assert words in str(error.value)


def test_counts_per_block():
    counted = patterns("to_q", "to_out.0", "re:.*to_k", expect={"Block": 3})
    assert len(match_modules(model(Block(True)), counted)) == 3
    with pytest.raises(ValueError, match=r"expects 3 modules of part given in each Block, and blocks.1 has 2"):
        match_modules(model(Block(True), Block()), counted)
    either = patterns("to_q", "to_out.0", "re:.*to_k", expect={"Block": (2, 3)})
    assert len(match_modules(model(Block(True), Block()), either)) == 5
    with pytest.raises(ValueError, match="expects blocks Block, and the model has none; nearest: .*ModuleDict"):
        match_modules(nn.ModuleDict({"to_q": nn.Linear(4, 4)}), patterns("to_q", expect={"Block": 1}))


def test_counts_per_block_by_path():
    by_path = {r"re:blocks\.\d+": {"given": 2}}
    assert len(match_modules(model(Block(), Block()), patterns("to_q", "to_out.0", expect=by_path))) == 4
    with pytest.raises(ValueError, match=r"in each block, and blocks.0 has 1: .*to_q; nearest .*: to_out.0"):
        match_modules(model(Block()), patterns("to_q", expect=by_path))
    with pytest.raises(ValueError, match=r"expects blocks re:block\\\.0, and the model has none; nearest: blocks.0"):
        match_modules(model(Block()), patterns("to_q", expect={r"re:block\.0": 1}))
    with pytest.raises(ValueError, match=r"'re:\(' of target map given is not a valid regular expression"):
        match_modules(model(Block()), patterns("to_q", expect={"re:(": 1}))


def test_the_nearest_names_of_a_pattern_with_many_alternatives():
    many = "|".join(f"(encoder|decoder)_{i}.self_attention_{i}.projection_{i}" for i in range(9))
    with pytest.raises(ValueError, match="nearest: to_q, "):
        match_modules(model(Block()), patterns(f"re:{many}|to_qq"))


def test_parts():
    two = TargetMap(
        "two",
        {"q": ("to_q",), "out": ("to_out.0",)},
        expect={"Block": {"q": 1, "out": 1}},
        default=("q",),
    )
    assert set(match_modules(model(Block()), two.select()).values()) == {"q"}
    assert set(match_modules(model(Block()), two.select(["q", "out"])).values()) == {"q", "out"}
    with pytest.raises(ValueError, match="no part 'ff'; it has q, out"):
        two.select(["ff"])
    with pytest.raises(ValueError, match="no part of target map two is selected"):
        two.select([])
    with pytest.raises(ValueError, match="must name the part"):
        TargetMap("two", {"q": ("to_q",), "out": ("to_out.0",)}, expect={"Block": 2})
    with pytest.raises(ValueError, match="in two parts"):
        match_modules(model(Block()), TargetMap("two", {"q": ("to_q",), "again": ("re:.*to_q",)}))


def test_parts_that_a_model_has():
    three = TargetMap("three", {"q": ("to_q", "to_qq"), "k": ("to_k",), "v": (r"re:.*to_v",)})
    assert parts_in(model(Block()), three) == ["q"]
    assert parts_in(model(Block(True)), three) == ["q", "k"]
